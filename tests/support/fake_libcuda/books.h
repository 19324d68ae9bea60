/* The books of the stand-in for libcuda.so.1: what exists, what is enqueued, what was done wrong. libcuda.c has the calls of CUDA. */

#ifndef BOOKS_H
#define BOOKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Numbers and names of the driver API (CUDA's cuda.h, CUresult). */
enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    CONTEXT_IS_DESTROYED = 709,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_WRONG_THREAD = 908,
};

enum { CAPTURE_GLOBAL = 0, CAPTURE_THREAD_LOCAL = 1, CAPTURE_RELAXED = 2 };

typedef enum { DEVICE = 'd', PINNED = 'h' } Kind;

typedef struct {
    uintptr_t address;
    size_t nbytes;
} Range;

typedef struct {
    Kind kind;
    int number;
    bool live;
    uintptr_t address;
    size_t nbytes;
    char *pages;
    size_t mapped;
} Block;

/* One piece of work on a stream or in a graph. */
typedef struct {
    enum { COPY, FILL, CALLBACK } kind;
    char name[48];
    char *destination, *source;
    size_t destination_pitch, source_pitch, width, height;
    int value;
    int (*callback)(void *);
    void *argument;
    int count;
    Range *ranges;
} Operation;

typedef struct {
    Operation *items;
    int count, room;
} Queue;

typedef struct {
    int number;
    bool live;
    Queue waiting;
    bool capturing, invalidated;
    int mode, thread;
    Queue recorded;
} Stream;

/* A graph (letter g) or an executable graph (letter x). */
typedef struct {
    char letter;
    int number;
    bool live;
    Queue operations;
} Graph;

typedef struct {
    bool live;
    int references;
} Context;

/* A call of CUDA in progress: `enter` begins it and takes the lock, `leave` ends it. */
typedef struct {
    const char *name;
    char text[400];
    char result[64];
    int error, late_error;
    bool recorded;
} Call;

/* What a call needs, for `enter`. */
enum {
    INITIALIZED = 1, /* cuInit was called */
    CURRENT = 2,     /* a live context is current in this thread */
    UNSAFE = 4,      /* forbidden during a capture */
    COMPLETES = 8,   /* does its work also when it returns the error of earlier work, as calls that release or wait */
};

extern bool initialized;
extern unsigned context_flags;
extern Context *primary;
extern _Thread_local Context *current;

long setting(const char *name, long usual);

void enter(Call *call, const char *name, int needs, const char *format, ...) __attribute__((format(printf, 4, 5)));
int leave(Call *call);
void result(Call *call, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Note a mistake of the caller and let the call return `error`. */
void mistake(Call *call, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));

int this_thread(void);
const char *symbol(uintptr_t address);
const char *stream_name(const void *handle);

Block *new_block(Call *call, Kind kind, size_t nbytes);
void free_block(Call *call, Kind kind, uintptr_t address);
size_t device_bytes(void);

Stream *new_stream(void);
Stream *find_stream(Call *call, const void *handle);
Graph *new_graph(char letter, const Queue *operations);
Graph *find_graph(Call *call, char letter, const void *handle);

void enqueue(Call *call, Stream *stream, Operation operation, int count, const Range *ranges);
void append(Queue *queue, const Queue *more);
int check_ranges(Call *call, const Operation *operation);
/* Run what waits on the stream, without the lock while a callback runs. Returns the number of operations. */
int run_waiting(Call *call, Stream *stream);
/* Everything that was not released, as mistakes. */
void report_leaks(Call *call);

#endif
