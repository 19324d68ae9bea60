/* A stand-in for NVIDIA's libcuda.so.1, for tests of the real cuda-python on a machine without a GPU.
 *
 * Device memory is host memory, full of poison. Work waits until its stream is synchronized. A mistake of the caller returns the error that
 * CUDA's documentation names, and is noted in the books (books.c), which also write the trace. Signatures are those of CUDA's cuda.h.
 *
 * Settings in the environment:
 *   FAKE_LIBCUDA_TRACE=FILE       one line for each call, with symbolic addresses: d device memory, h pinned, s stream, g graph, x executable
 *   FAKE_LIBCUDA_FAIL=CALL:ERROR  the call of that number returns that error, such as 40:2 for out of memory at the 40th
 *   FAKE_LIBCUDA_MEMORY=BYTES     device memory in all (1 GiB)
 *   FAKE_LIBCUDA_DEVICES=0        a driver without a GPU
 *   FAKE_LIBCUDA_VERSION=12060    the CUDA version that the driver supports (13000)
 */

#define _GNU_SOURCE
#include "books.h"

#include <stdio.h>
#include <string.h>

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;

typedef struct {
    size_t srcXInBytes, srcY;
    int srcMemoryType;
    const void *srcHost;
    CUdeviceptr srcDevice;
    void *srcArray;
    size_t srcPitch;
    size_t dstXInBytes, dstY;
    int dstMemoryType;
    void *dstHost;
    CUdeviceptr dstDevice;
    void *dstArray;
    size_t dstPitch;
    size_t WidthInBytes, Height;
} CUDA_MEMCPY2D;

enum { MEMORYTYPE_DEVICE = 2, STREAM_NON_BLOCKING = 1, LARGEST_PITCH = 0x7fffffff };

static size_t total_memory(void) { return setting("FAKE_LIBCUDA_MEMORY", 1L << 30); }

/* --- driver and device ------------------------------------------------------------------------------------------------------------- */

CUresult cuDriverGetVersion(int *version) {
    *version = setting("FAKE_LIBCUDA_VERSION", 13000);
    return SUCCESS;
}

CUresult cuInit(unsigned flags) {
    Call call;
    enter(&call, "cuInit", 0, "%u", flags);
    if (!call.error && !setting("FAKE_LIBCUDA_DEVICES", 1)) call.error = NO_DEVICE;
    if (!call.error) initialized = true;
    return leave(&call);
}

CUresult cuGetErrorString(int error, const char **text) {
    static const struct {
        int error;
        const char *text;
    } texts[] = {
        {SUCCESS, "no error"},
        {INVALID_VALUE, "invalid argument"},
        {OUT_OF_MEMORY, "out of memory"},
        {NOT_INITIALIZED, "initialization error"},
        {NO_DEVICE, "no CUDA-capable device is detected"},
        {INVALID_DEVICE, "invalid device ordinal"},
        {INVALID_CONTEXT, "invalid device context"},
        {INVALID_HANDLE, "invalid resource handle"},
        {ILLEGAL_STATE, "the operation cannot be performed in the present state"},
        {NOT_FOUND, "named symbol not found"},
        {ILLEGAL_ADDRESS, "an illegal memory access was encountered"},
        {CONTEXT_IS_DESTROYED, "context is destroyed"},
        {LAUNCH_FAILED, "unspecified launch failure"},
        {CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"},
        {CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"},
        {CAPTURE_WRONG_THREAD, "attempt to terminate a thread-local capture sequence from another thread"},
    };
    *text = NULL;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        if (texts[i].error == error) *text = texts[i].text;
    }
    return *text ? SUCCESS : INVALID_VALUE;
}

static void check_device(Call *call, CUdevice device) {
    if (!call->error && device != 0) mistake(call, INVALID_DEVICE, "%s of device %d", call->name, device);
}

CUresult cuDeviceGetCount(int *count) {
    Call call;
    enter(&call, "cuDeviceGetCount", INITIALIZED, "%s", "");
    *count = setting("FAKE_LIBCUDA_DEVICES", 1);
    return leave(&call);
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    Call call;
    enter(&call, "cuDeviceGet", INITIALIZED, "%d", ordinal);
    check_device(&call, ordinal);
    *device = ordinal;
    return leave(&call);
}

CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    Call call;
    enter(&call, "cuDeviceGetName", INITIALIZED, "%d", device);
    check_device(&call, device);
    if (!call.error) snprintf(name, size, "Fake GPU");
    return leave(&call);
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    Call call;
    enter(&call, "cuDeviceTotalMem", INITIALIZED, "%d", device);
    check_device(&call, device);
    *bytes = total_memory();
    return leave(&call);
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    Call call;
    enter(&call, "cuDeviceGetAttribute", INITIALIZED, "%d, %d", attribute, device);
    check_device(&call, device);
    switch (attribute) {
    case 16: *value = 8; break; /* MULTIPROCESSOR_COUNT */
    case 18: *value = 1; break; /* INTEGRATED */
    case 75: *value = 8; break; /* COMPUTE_CAPABILITY_MAJOR */
    case 76: *value = 7; break; /* COMPUTE_CAPABILITY_MINOR */
    default: mistake(&call, INVALID_VALUE, "device attribute %d, which the stand-in does not have", attribute);
    }
    return leave(&call);
}

/* --- context ----------------------------------------------------------------------------------------------------------------------- */

CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned flags) {
    Call call;
    enter(&call, "cuDevicePrimaryCtxSetFlags", INITIALIZED, "%d, %u", device, flags);
    check_device(&call, device);
    if (!call.error && flags != 0 && flags != 1 && flags != 2 && flags != 4) {
        mistake(&call, INVALID_VALUE, "flags %u: one of SPIN, YIELD and BLOCKING_SYNC at most", flags);
    }
    if (!call.error) context_flags = flags;
    return leave(&call);
}

CUresult cuDevicePrimaryCtxRetain(void **context, CUdevice device) {
    static Context made[1024]; /* a new one after each release, so that the old handle is recognised */
    static int count;
    Call call;
    enter(&call, "cuDevicePrimaryCtxRetain", INITIALIZED, "%d", device);
    check_device(&call, device);
    if (!call.error) {
        if (!primary || !primary->live) {
            primary = &made[count++ % 1024];
            *primary = (Context){.live = true};
        }
        primary->references++;
        *context = primary;
    }
    return leave(&call);
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    Call call;
    enter(&call, "cuDevicePrimaryCtxRelease", INITIALIZED | COMPLETES, "%d", device);
    check_device(&call, device);
    if (!call.error && (!primary || !primary->live)) {
        mistake(&call, INVALID_CONTEXT, "the primary context was released more often than retained");
    } else if (!call.error && --primary->references == 0) {
        report_leaks(&call);
        primary->live = false;
    }
    return leave(&call);
}

CUresult cuCtxSetCurrent(void *context) {
    Call call;
    enter(&call, "cuCtxSetCurrent", INITIALIZED, "%s", context ? "primary" : "none");
    if (!call.error && context && (context != primary || !primary->live)) {
        mistake(&call, INVALID_CONTEXT, "cuCtxSetCurrent of a context that is not retained");
    }
    if (!call.error) current = context;
    return leave(&call);
}

/* --- memory ------------------------------------------------------------------------------------------------------------------------ */

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *bytes) {
    Call call;
    enter(&call, "cuMemGetInfo", CURRENT, "%s", "");
    *bytes = total_memory();
    *free_bytes = *bytes - device_bytes();
    return leave(&call);
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t nbytes) {
    Call call;
    enter(&call, "cuMemAlloc", CURRENT | UNSAFE, "%zu", nbytes);
    if (!call.error && nbytes > total_memory() - device_bytes()) call.error = OUT_OF_MEMORY;
    Block *block = call.error ? NULL : new_block(&call, DEVICE, nbytes);
    if (block) {
        *address = block->address;
        result(&call, "d%d", block->number);
    }
    return leave(&call);
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    Call call;
    enter(&call, "cuMemFree", CURRENT | UNSAFE | COMPLETES, "%s", symbol(address));
    if (!call.error) free_block(&call, DEVICE, address);
    return leave(&call);
}

CUresult cuMemHostAlloc(void **address, size_t nbytes, unsigned flags) {
    Call call;
    enter(&call, "cuMemHostAlloc", CURRENT | UNSAFE, "%zu, %u", nbytes, flags);
    Block *block = call.error ? NULL : new_block(&call, PINNED, nbytes);
    if (block) {
        *address = (void *)block->address;
        result(&call, "h%d", block->number);
    }
    return leave(&call);
}

CUresult cuMemFreeHost(void *address) {
    Call call;
    enter(&call, "cuMemFreeHost", CURRENT | UNSAFE | COMPLETES, "%s", symbol((uintptr_t)address));
    if (!call.error) free_block(&call, PINNED, (uintptr_t)address);
    return leave(&call);
}

/* --- work on a stream -------------------------------------------------------------------------------------------------------------- */

CUresult cuMemcpyAsync(CUdeviceptr destination, CUdeviceptr source, size_t nbytes, void *handle) {
    Call call;
    enter(&call, "cuMemcpyAsync", CURRENT, "%s <- %s, %zu, %s", symbol(destination), symbol(source), nbytes, stream_name(handle));
    Stream *stream = call.error ? NULL : find_stream(&call, handle);
    if (stream && destination < source + nbytes && source < destination + nbytes) {
        mistake(&call, INVALID_VALUE, "cuMemcpyAsync from %s to %s, which overlap", symbol(source), symbol(destination));
    } else if (stream) {
        Operation copy = {.kind = COPY, .name = "cuMemcpyAsync", .destination = (char *)destination, .source = (char *)source,
                          .width = nbytes, .height = 1};
        enqueue(&call, stream, copy, 2, (Range[]){{destination, nbytes}, {source, nbytes}});
    }
    return leave(&call);
}

CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D *rows, void *handle) {
    Call call;
    enter(&call, "cuMemcpy2DAsync", CURRENT, "%s pitch %zu <- %s pitch %zu, %zu x %zu, %s", symbol(rows->dstDevice), rows->dstPitch,
          symbol(rows->srcDevice), rows->srcPitch, rows->Height, rows->WidthInBytes, stream_name(handle));
    Stream *stream = call.error ? NULL : find_stream(&call, handle);
    if (!stream) return leave(&call);
    if (rows->srcMemoryType != MEMORYTYPE_DEVICE || rows->dstMemoryType != MEMORYTYPE_DEVICE || rows->srcXInBytes || rows->srcY ||
        rows->dstXInBytes || rows->dstY) {
        mistake(&call, INVALID_VALUE, "cuMemcpy2DAsync of other than rows of device memory");
    } else if (!rows->Height || !rows->WidthInBytes || rows->WidthInBytes > rows->srcPitch || rows->WidthInBytes > rows->dstPitch ||
               rows->srcPitch > LARGEST_PITCH || rows->dstPitch > LARGEST_PITCH) {
        mistake(&call, INVALID_VALUE, "cuMemcpy2DAsync of %zu rows of %zu bytes, pitches %zu and %zu", rows->Height, rows->WidthInBytes,
                rows->dstPitch, rows->srcPitch);
    } else {
        Operation copy = {.kind = COPY, .name = "cuMemcpy2DAsync", .destination = (char *)rows->dstDevice, .source = (char *)rows->srcDevice,
                          .destination_pitch = rows->dstPitch, .source_pitch = rows->srcPitch, .width = rows->WidthInBytes,
                          .height = rows->Height};
        size_t before = rows->Height - 1, width = rows->WidthInBytes;
        enqueue(&call, stream, copy, 2,
                (Range[]){{rows->dstDevice, before * rows->dstPitch + width}, {rows->srcDevice, before * rows->srcPitch + width}});
    }
    return leave(&call);
}

CUresult cuMemsetD8Async(CUdeviceptr destination, unsigned char value, size_t nbytes, void *handle) {
    Call call;
    enter(&call, "cuMemsetD8Async", CURRENT, "%s, %d, %zu, %s", symbol(destination), value, nbytes, stream_name(handle));
    Stream *stream = call.error ? NULL : find_stream(&call, handle);
    if (stream) {
        Operation fill = {.kind = FILL, .name = "cuMemsetD8Async", .destination = (char *)destination, .value = value, .width = nbytes};
        enqueue(&call, stream, fill, 1, &(Range){destination, nbytes});
    }
    return leave(&call);
}

/* Not of CUDA: the work of an engine, as a kernel that reads and writes `ranges`. It fails if `callback` does not return 0. */
CUresult fake_enqueue(void *handle, const char *name, int (*callback)(void *), void *argument, int count, const Range *ranges) {
    Call call;
    enter(&call, name, CURRENT, "%s", stream_name(handle));
    Stream *stream = call.error ? NULL : find_stream(&call, handle);
    if (stream) {
        Operation work = {.kind = CALLBACK, .callback = callback, .argument = argument};
        snprintf(work.name, sizeof work.name, "%s", name);
        enqueue(&call, stream, work, count, ranges);
    }
    return leave(&call);
}

/* --- streams ----------------------------------------------------------------------------------------------------------------------- */

CUresult cuStreamCreate(void **handle, unsigned flags) {
    Call call;
    enter(&call, "cuStreamCreate", CURRENT, "%s", flags == STREAM_NON_BLOCKING ? "non-blocking" : "blocking");
    if (!call.error) {
        *handle = new_stream();
        result(&call, "%s", stream_name(*handle));
    }
    return leave(&call);
}

CUresult cuStreamDestroy_v2(void *handle) {
    Call call;
    enter(&call, "cuStreamDestroy", CURRENT | COMPLETES, "%s", stream_name(handle));
    Stream *stream = call.error ? NULL : find_stream(&call, handle);
    if (stream) {
        if (stream->capturing) mistake(&call, ILLEGAL_STATE, "s%d is destroyed while it captures", stream->number);
        if (stream->waiting.count) mistake(&call, SUCCESS, "s%d is destroyed, but was not synchronized", stream->number);
        stream->live = false;
    }
    return leave(&call);
}

CUresult cuStreamSynchronize(void *handle) {
    Call call;
    enter(&call, "cuStreamSynchronize", CURRENT | COMPLETES, "%s", stream_name(handle));
    Stream *stream = call.error ? NULL : find_stream(&call, handle);
    if (stream && stream->capturing) {
        stream->invalidated = true;
        mistake(&call, CAPTURE_UNSUPPORTED, "cuStreamSynchronize while s%d captures", stream->number);
    } else if (stream) {
        result(&call, "%d done", run_waiting(&call, stream));
    }
    return leave(&call);
}

CUresult cuStreamIsCapturing(void *handle, int *status) {
    Call call;
    enter(&call, "cuStreamIsCapturing", CURRENT, "%s", stream_name(handle));
    Stream *stream = call.error ? NULL : find_stream(&call, handle);
    if (stream) *status = !stream->capturing ? 0 : stream->invalidated ? 2 : 1;
    return leave(&call);
}

/* --- graphs ------------------------------------------------------------------------------------------------------------------------ */

CUresult cuStreamBeginCapture_v2(void *handle, int mode) {
    static const char *const modes[] = {"global", "thread-local", "relaxed"};
    Call call;
    enter(&call, "cuStreamBeginCapture", CURRENT, "%s, %s", stream_name(handle), mode >= 0 && mode <= 2 ? modes[mode] : "unknown mode");
    Stream *stream = call.error ? NULL : find_stream(&call, handle);
    if (stream && stream->capturing) mistake(&call, ILLEGAL_STATE, "s%d captures already", stream->number);
    else if (stream && (mode < 0 || mode > 2)) mistake(&call, INVALID_VALUE, "capture mode %d", mode);
    else if (stream) {
        stream->capturing = true, stream->invalidated = false;
        stream->mode = mode, stream->thread = this_thread();
        stream->recorded.count = 0;
    }
    return leave(&call);
}

CUresult cuStreamEndCapture(void *handle, void **graph) {
    Call call;
    enter(&call, "cuStreamEndCapture", CURRENT | COMPLETES, "%s", stream_name(handle));
    *graph = NULL;
    Stream *stream = call.error ? NULL : find_stream(&call, handle);
    if (!stream) return leave(&call);
    if (!stream->capturing) mistake(&call, ILLEGAL_STATE, "s%d does not capture", stream->number);
    else if (stream->mode != CAPTURE_RELAXED && stream->thread != this_thread()) {
        mistake(&call, CAPTURE_WRONG_THREAD, "the capture of s%d began in another thread", stream->number);
    } else {
        stream->capturing = false;
        if (stream->invalidated) call.error = CAPTURE_INVALIDATED;
        else if (!call.late_error) {
            Graph *made = new_graph('g', &stream->recorded);
            *graph = made;
            result(&call, "g%d of %d", made->number, made->operations.count);
        }
    }
    return leave(&call);
}

CUresult cuGraphInstantiateWithFlags(void **executable, void *handle, unsigned long long flags) {
    Call call;
    enter(&call, "cuGraphInstantiate", CURRENT, "%llu", flags);
    Graph *graph = call.error ? NULL : find_graph(&call, 'g', handle);
    if (graph) {
        Graph *made = new_graph('x', &graph->operations);
        *executable = made;
        result(&call, "x%d of g%d", made->number, graph->number);
    }
    return leave(&call);
}

CUresult cuGraphLaunch(void *handle, void *stream_handle) {
    Call call;
    Graph *graph;
    enter(&call, "cuGraphLaunch", CURRENT, "%s", stream_name(stream_handle));
    Stream *stream = call.error ? NULL : find_stream(&call, stream_handle);
    if (!stream || !(graph = find_graph(&call, 'x', handle))) return leave(&call);
    if (stream->capturing) {
        stream->invalidated = true;
        mistake(&call, CAPTURE_UNSUPPORTED, "cuGraphLaunch while s%d captures", stream->number);
    } else {
        for (int i = 0; i < graph->operations.count && !check_ranges(&call, &graph->operations.items[i]);) i++;
        if (!call.error) append(&stream->waiting, &graph->operations);
        result(&call, "x%d", graph->number);
    }
    return leave(&call);
}

static CUresult destroy(const char *name, char letter, void *handle) {
    Call call;
    enter(&call, name, CURRENT | COMPLETES, "%s", "");
    Graph *graph = call.error ? NULL : find_graph(&call, letter, handle);
    if (graph) {
        graph->live = false;
        result(&call, "%c%d", letter, graph->number);
    }
    return leave(&call);
}

CUresult cuGraphDestroy(void *graph) { return destroy("cuGraphDestroy", 'g', graph); }

CUresult cuGraphExecDestroy(void *executable) { return destroy("cuGraphExecDestroy", 'x', executable); }

/* --- how bindings find all of this ------------------------------------------------------------------------------------------------- */

typedef void Function(void);

/* The name without suffix, the CUDA version since which it has this signature, and the function. */
static const struct {
    const char *name;
    int since;
    Function *function;
} table[] = {
#define ROW(name, since, function) {name, since, (Function *)function}
    ROW("cuDriverGetVersion", 2020, cuDriverGetVersion),
    ROW("cuInit", 2000, cuInit),
    ROW("cuGetErrorString", 6000, cuGetErrorString),
    ROW("cuDeviceGetCount", 2000, cuDeviceGetCount),
    ROW("cuDeviceGet", 2000, cuDeviceGet),
    ROW("cuDeviceGetName", 2000, cuDeviceGetName),
    ROW("cuDeviceTotalMem", 3020, cuDeviceTotalMem_v2),
    ROW("cuDeviceGetAttribute", 2000, cuDeviceGetAttribute),
    ROW("cuDevicePrimaryCtxSetFlags", 11000, cuDevicePrimaryCtxSetFlags_v2),
    ROW("cuDevicePrimaryCtxRetain", 7000, cuDevicePrimaryCtxRetain),
    ROW("cuDevicePrimaryCtxRelease", 11000, cuDevicePrimaryCtxRelease_v2),
    ROW("cuCtxSetCurrent", 4000, cuCtxSetCurrent),
    ROW("cuMemGetInfo", 3020, cuMemGetInfo_v2),
    ROW("cuMemAlloc", 3020, cuMemAlloc_v2),
    ROW("cuMemFree", 3020, cuMemFree_v2),
    ROW("cuMemHostAlloc", 2020, cuMemHostAlloc),
    ROW("cuMemFreeHost", 2000, cuMemFreeHost),
    ROW("cuMemcpyAsync", 4000, cuMemcpyAsync),
    ROW("cuMemcpy2DAsync", 3020, cuMemcpy2DAsync_v2),
    ROW("cuMemsetD8Async", 3020, cuMemsetD8Async),
    ROW("cuStreamCreate", 2000, cuStreamCreate),
    ROW("cuStreamDestroy", 4000, cuStreamDestroy_v2),
    ROW("cuStreamSynchronize", 2000, cuStreamSynchronize),
    ROW("cuStreamIsCapturing", 10000, cuStreamIsCapturing),
    ROW("cuStreamBeginCapture", 10010, cuStreamBeginCapture_v2),
    ROW("cuStreamEndCapture", 10000, cuStreamEndCapture),
    ROW("cuGraphInstantiate", 12000, cuGraphInstantiateWithFlags),
    ROW("cuGraphInstantiateWithFlags", 11040, cuGraphInstantiateWithFlags),
    ROW("cuGraphLaunch", 10000, cuGraphLaunch),
    ROW("cuGraphDestroy", 10000, cuGraphDestroy),
    ROW("cuGraphExecDestroy", 10000, cuGraphExecDestroy),
};

CUresult cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
    (void)flags;
    *function = NULL;
    int found = 1; /* CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND; 0 is success, 2 VERSION_NOT_SUFFICIENT */
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (strcmp(table[i].name, name)) continue;
        found = version < table[i].since ? 2 : 0;
        if (!found) *function = (void *)table[i].function;
    }
    if (status) *status = found;
    return found ? NOT_FOUND : SUCCESS;
}

/* What bindings before CUDA 12 look up. */
CUresult cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
