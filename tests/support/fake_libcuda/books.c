#define _GNU_SOURCE
#include "books.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define POISON 0xA5
#define ALIGNMENT 256
#define ROUND(number, step) (((number) + (step) - 1) / (step) * (step))

bool initialized;
unsigned context_flags;
Context *primary;
_Thread_local Context *current;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local int thread_number;
static int threads, calls, mistakes, fail_at, fail_with, lost;
static bool fails_for_good;
static size_t page;
static char last_mistake[400], failed[48];
static FILE *trace;

/* Nothing leaves these lists, so that a handle or an address that is no longer alive is recognised. */
static Block **blocks;
static Stream **streams;
static Graph **graphs;
static int block_count, stream_count, graph_count;

#define ADD(list, count, item) \
    do { \
        if (((count) & ((count) + 1)) == 0) (list) = realloc((list), sizeof *(list) * 2 * ((count) + 1)); \
        (list)[(count)++] = (item); \
    } while (0)

long setting(const char *name, long usual) {
    const char *text = getenv(name);
    return text && *text ? strtol(text, NULL, 10) : usual;
}

/* For tests, through ctypes: fail at the n-th call from now on (0: never); `for_good` as after an illegal address. */
void fake_fail_at(int call, int error, bool for_good) {
    pthread_mutex_lock(&lock);
    calls = lost = *failed = 0;
    fail_at = call, fail_with = error, fails_for_good = for_good;
    pthread_mutex_unlock(&lock);
}

/* The name of the call that failed because `fake_fail_at` asked for it. */
const char *fake_failed(void) { return failed; }

int fake_calls(void) { return calls; }

int fake_mistakes(void) { return mistakes; }

const char *fake_last_mistake(void) { return last_mistake; }

unsigned fake_context_flags(void) { return context_flags; }

int fake_alive(void) {
    int alive = primary && primary->live;
    for (int i = 0; i < block_count; i++) alive += blocks[i]->live;
    for (int i = 0; i < stream_count; i++) alive += streams[i]->live;
    for (int i = 0; i < graph_count; i++) alive += graphs[i]->live;
    return alive;
}

static void __attribute__((constructor)) start(void) {
    const char *file = getenv("FAKE_LIBCUDA_TRACE"), *failure = getenv("FAKE_LIBCUDA_FAIL");
    page = sysconf(_SC_PAGESIZE);
    if (file && *file) trace = fopen(file, "w");
    if (failure) sscanf(failure, "%d:%d", &fail_at, &fail_with);
}

int this_thread(void) {
    if (!thread_number) thread_number = ++threads;
    return thread_number;
}

static const char *error_name(int error) {
    static char text[32];
    switch (error) {
    case OUT_OF_MEMORY: return "OUT_OF_MEMORY";
    case INVALID_CONTEXT: return "INVALID_CONTEXT";
    case CAPTURE_UNSUPPORTED: return "STREAM_CAPTURE_UNSUPPORTED";
    case CAPTURE_INVALIDATED: return "STREAM_CAPTURE_INVALIDATED";
    default: snprintf(text, sizeof text, "error %d", error); return text;
    }
}

/* The stream of this thread, or of another one if that captures for all, whose capture forbids unsafe calls here. */
static Stream *forbidding(void) {
    for (int i = 0; i < stream_count; i++) {
        Stream *stream = streams[i];
        if (!stream->live || !stream->capturing || stream->mode == CAPTURE_RELAXED) continue;
        if (stream->thread == this_thread() || stream->mode == CAPTURE_GLOBAL) return stream;
    }
    return NULL;
}

void enter(Call *call, const char *name, int needs, const char *format, ...) {
    pthread_mutex_lock(&lock);
    this_thread();
    *call = (Call){.name = name};
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(call->text, sizeof call->text, format, arguments);
    va_end(arguments);
    calls++;
    if (calls == fail_at || lost) {
        if (!lost) snprintf(failed, sizeof failed, "%s", name);
        if (needs & COMPLETES && !lost) call->late_error = fail_with;
        else call->error = fail_with;
        lost = fails_for_good;
        return;
    }
    if (needs & (INITIALIZED | CURRENT) && !initialized) {
        mistake(call, NOT_INITIALIZED, "%s before cuInit", name);
    } else if (needs & CURRENT && !current) {
        mistake(call, INVALID_CONTEXT, "%s in a thread without a context", name);
    } else if (needs & CURRENT && !current->live) {
        mistake(call, CONTEXT_IS_DESTROYED, "%s after the context was released", name);
    } else if (needs & UNSAFE && forbidding()) {
        Stream *stream = forbidding();
        stream->invalidated = true;
        mistake(call, CAPTURE_UNSUPPORTED, "%s while s%d captures", name, stream->number);
    }
}

int leave(Call *call) {
    if (call->late_error && !call->error) call->error = call->late_error;
    if (trace) {
        if (this_thread() > 1) fprintf(trace, "[thread %d] ", this_thread());
        fprintf(trace, "%s%s(%s)", call->recorded ? "    " : "", call->name, call->text);
        if (call->error) fprintf(trace, " fails: %s", error_name(call->error));
        else if (*call->result) fprintf(trace, " = %s", call->result);
        fputc('\n', trace);
        fflush(trace);
    }
    pthread_mutex_unlock(&lock);
    return call->error;
}

void result(Call *call, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(call->result, sizeof call->result, format, arguments);
    va_end(arguments);
}

void mistake(Call *call, int error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_mistake, sizeof last_mistake, format, arguments);
    va_end(arguments);
    mistakes++;
    if (trace) fprintf(trace, "MISTAKE: %s\n", last_mistake);
    if (!call->error) call->error = error;
}

/* --- memory ------------------------------------------------------------------------------------------------------------------------ */

/* The youngest block that `address` is in, dead or alive. */
static Block *find_block(uintptr_t address) {
    for (int i = block_count; i--;) {
        if (blocks[i]->address <= address && address < blocks[i]->address + blocks[i]->nbytes) return blocks[i];
    }
    return NULL;
}

const char *symbol(uintptr_t address) {
    static _Thread_local char texts[4][48];
    static _Thread_local int next;
    char *text = texts[next++ % 4];
    const Block *block = find_block(address);
    if (!block) snprintf(text, sizeof texts[0], "unknown address");
    else if (address == block->address) snprintf(text, sizeof texts[0], "%c%d", block->kind, block->number);
    else snprintf(text, sizeof texts[0], "%c%d+%zu", block->kind, block->number, (size_t)(address - block->address));
    return text;
}

static size_t live_bytes(Kind kind) {
    size_t bytes = 0;
    for (int i = 0; i < block_count; i++) bytes += blocks[i]->live && blocks[i]->kind == kind ? blocks[i]->nbytes : 0;
    return bytes;
}

size_t device_bytes(void) { return live_bytes(DEVICE); }

/* A block ends at the end of a page, and the page after it cannot be touched. */
Block *new_block(Call *call, Kind kind, size_t nbytes) {
    if (!nbytes) {
        mistake(call, INVALID_VALUE, "%s of no bytes", call->name);
        return NULL;
    }
    int number = 1;
    for (int i = 0; i < block_count; i++) number += blocks[i]->kind == kind;
    size_t size = ROUND(nbytes, ALIGNMENT), mapped = ROUND(size, page) + page;
    char *pages = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) {
        call->error = OUT_OF_MEMORY;
        return NULL;
    }
    mprotect(pages + mapped - page, page, PROT_NONE);
    memset(pages, POISON, mapped - page);
    Block *block = malloc(sizeof *block);
    *block = (Block){kind, number, true, (uintptr_t)(pages + mapped - page - size), nbytes, pages, mapped};
    ADD(blocks, block_count, block);
    return block;
}

static bool holds(const Block *block, Range range) {
    return block->address <= range.address && range.address + range.nbytes <= block->address + block->nbytes;
}

static const Operation *user(const Queue *queue, const Block *block) {
    for (int i = 0; i < queue->count; i++) {
        for (int k = 0; k < queue->items[i].count; k++) {
            if (holds(block, queue->items[i].ranges[k])) return &queue->items[i];
        }
    }
    return NULL;
}

void free_block(Call *call, Kind kind, uintptr_t address) {
    Block *block = find_block(address);
    if (!block || block->kind != kind || block->address != address) {
        mistake(call, INVALID_VALUE, "%s of an address that was never allocated", call->name);
        return;
    }
    if (!block->live) {
        mistake(call, INVALID_VALUE, "%s of %s, which was freed before", call->name, symbol(address));
        return;
    }
    for (int i = 0; i < stream_count; i++) {
        const Operation *waits = streams[i]->live ? user(&streams[i]->waiting, block) : NULL;
        if (waits) mistake(call, SUCCESS, "%s of %s, which %s on s%d uses", call->name, symbol(address), waits->name, streams[i]->number);
    }
    for (int i = 0; i < graph_count; i++) {
        const Operation *recorded = graphs[i]->live && graphs[i]->letter == 'x' ? user(&graphs[i]->operations, block) : NULL;
        if (recorded) mistake(call, SUCCESS, "%s of %s, which %s in x%d uses", call->name, symbol(address), recorded->name, graphs[i]->number);
    }
    for (const unsigned char *byte = (unsigned char *)block->pages; byte < (unsigned char *)(block->pages + block->mapped - page); byte++) {
        bool inside = (uintptr_t)byte >= block->address && (uintptr_t)byte < block->address + block->nbytes;
        if (inside) byte = (unsigned char *)(block->address + block->nbytes) - 1;
        else if (*byte != POISON) {
            mistake(call, SUCCESS, "something wrote beside %s", symbol(address));
            break;
        }
    }
    block->live = false;
    /* The addresses stay taken, and whoever touches them from now on is stopped. */
    mmap(block->pages, block->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
}

/* --- streams and graphs ------------------------------------------------------------------------------------------------------------ */

const char *stream_name(const void *handle) {
    static _Thread_local char text[16];
    for (int i = 0; i < stream_count; i++) {
        if (streams[i] == handle) {
            snprintf(text, sizeof text, "s%d", streams[i]->number);
            return text;
        }
    }
    return handle ? "unknown stream" : "default stream";
}

Stream *new_stream(void) {
    Stream *stream = calloc(1, sizeof *stream);
    stream->number = stream_count + 1, stream->live = true;
    ADD(streams, stream_count, stream);
    return stream;
}

Stream *find_stream(Call *call, const void *handle) {
    for (int i = 0; i < stream_count; i++) {
        if (streams[i] == handle && streams[i]->live) return streams[i];
    }
    mistake(call, INVALID_HANDLE, "%s on the %s", call->name, stream_name(handle));
    return NULL;
}

Graph *new_graph(char letter, const Queue *operations) {
    Graph *graph = calloc(1, sizeof *graph);
    graph->letter = letter, graph->number = 1, graph->live = true;
    for (int i = 0; i < graph_count; i++) graph->number += graphs[i]->letter == letter;
    append(&graph->operations, operations);
    ADD(graphs, graph_count, graph);
    return graph;
}

Graph *find_graph(Call *call, char letter, const void *handle) {
    for (int i = 0; i < graph_count; i++) {
        if (graphs[i] == handle && graphs[i]->live && graphs[i]->letter == letter) return graphs[i];
    }
    mistake(call, INVALID_HANDLE, "%s of a graph that is not there", call->name);
    return NULL;
}

void append(Queue *queue, const Queue *more) {
    for (int i = 0; i < more->count; i++) {
        if (queue->count == queue->room) {
            queue->room = 2 * queue->room + 8;
            queue->items = realloc(queue->items, sizeof *queue->items * queue->room);
        }
        queue->items[queue->count++] = more->items[i];
    }
}

int check_ranges(Call *call, const Operation *operation) {
    for (int i = 0; i < operation->count; i++) {
        Range range = operation->ranges[i];
        const Block *block = find_block(range.address);
        if (!block) mistake(call, INVALID_VALUE, "%s at an unknown address", operation->name);
        else if (!block->live) mistake(call, ILLEGAL_ADDRESS, "%s at %s, which was freed", operation->name, symbol(range.address));
        else if (!holds(block, range)) {
            mistake(call, INVALID_VALUE, "%s of %zu bytes at %s, which has %zu in all", operation->name, range.nbytes,
                    symbol(range.address), block->nbytes);
        }
    }
    return call->error;
}

void enqueue(Call *call, Stream *stream, Operation operation, int count, const Range *ranges) {
    if (stream->capturing && stream->invalidated) {
        mistake(call, CAPTURE_INVALIDATED, "%s into the capture of s%d, which is invalid", call->name, stream->number);
        return;
    }
    operation.count = count;
    operation.ranges = (Range *)ranges;
    if (check_ranges(call, &operation)) return;
    operation.ranges = memcpy(malloc(sizeof *ranges * (count + 1)), ranges, sizeof *ranges * count);
    call->recorded = stream->capturing;
    append(stream->capturing ? &stream->recorded : &stream->waiting, &(Queue){.items = &operation, .count = 1});
}

static int run(Call *call, const Operation *operation) {
    if (check_ranges(call, operation)) return call->error;
    switch (operation->kind) {
    case COPY:
        for (size_t row = 0; row < operation->height; row++) {
            memmove(operation->destination + row * operation->destination_pitch, operation->source + row * operation->source_pitch,
                    operation->width);
        }
        break;
    case FILL: memset(operation->destination, operation->value, operation->width); break;
    case CALLBACK:
        pthread_mutex_unlock(&lock); /* it may need the GIL, which another thread may hold while it waits for the lock */
        int failed = operation->callback(operation->argument);
        pthread_mutex_lock(&lock);
        if (failed) call->error = LAUNCH_FAILED;
    }
    return call->error;
}

int run_waiting(Call *call, Stream *stream) {
    Queue waiting = stream->waiting;
    stream->waiting = (Queue){0};
    for (int i = 0; i < waiting.count; i++) {
        if (run(call, &waiting.items[i])) break;
    }
    free(waiting.items);
    return waiting.count;
}

void report_leaks(Call *call) {
    for (int i = 0; i < block_count; i++) {
        if (blocks[i]->live) mistake(call, SUCCESS, "%s of %zu bytes was not freed", symbol(blocks[i]->address), blocks[i]->nbytes);
    }
    for (int i = 0; i < stream_count; i++) {
        if (streams[i]->live) mistake(call, SUCCESS, "s%d was not destroyed", streams[i]->number);
    }
    for (int i = 0; i < graph_count; i++) {
        if (graphs[i]->live) mistake(call, SUCCESS, "%c%d was not destroyed", graphs[i]->letter, graphs[i]->number);
    }
}
