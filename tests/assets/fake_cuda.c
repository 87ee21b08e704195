/* A CUDA driver without a GPU, for tests of what the runtime asks of it: device memory is host memory, copies
   happen at once, kernels and graphs only leave a line in the log (stderr). Built as libcuda.so.1. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t Address;
typedef void *Handle;
#define LOG(...) fprintf(stderr, __VA_ARGS__)
#define HANDLE(h) (*(h) = malloc(8))

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, NOT_FOUND = 500, NOT_READY = 600 };
enum { ILLEGAL_ADDRESS = 700, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };
enum { GLOBAL = 0, RELAXED = 2 }; /* of CUstreamCaptureMode */
enum { CAPTURING = 1, INVALIDATED = 2 }; /* of CUstreamCaptureStatus */
enum { REFUSED_IN_CAPTURE = 13, CRASHING = 66 }; /* threads of launches that end so */
enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 }; /* of CUdevice_attribute */

#define FOREIGN ((Handle)7) /* a context of the caller's */
static __thread Handle context;
static __thread int thread_mode; /* what the calling thread may do while others capture */
static int capture_mode, capturing, broken; /* how, a capture's status, the error of all calls from now on */

static int nothing(void) { return SUCCESS; }

/* Functions that are not here are absent, but for some that may do nothing. */
int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  char second[128];
  Dl_info own;
  dladdr((void *)nothing, &own);
  void *self = dlopen(own.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  snprintf(second, sizeof second, "%s_v2", name);
  *function = dlsym(self, name);
  if (!*function) *function = dlsym(self, second);
  if (!*function && (!strncmp(name, "cuGraph", 7) || !strncmp(name, "cuUserObject", 12))) *function = nothing;
  if (status) *status = *function ? 0 : 1;
  return *function ? SUCCESS : NOT_FOUND;
}
int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { return *version = 13020, SUCCESS; }
int cuGetErrorName(int error, const char **text) {
  *text = error == OUT_OF_MEMORY     ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                                     : "FAKE_ERROR";
  return SUCCESS;
}
int cuGetErrorString(int error, const char **text) { return *text = "a fake error", SUCCESS; }

int cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
int cuDeviceGet(int *device, int index) { return *device = index, SUCCESS; }
int cuDeviceGetName(char *name, int size, int device) { return snprintf(name, size, "Fake GPU"), SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == CAPABILITY_MAJOR ? 8 : attribute == CAPABILITY_MINOR ? 9 : 1;
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(Handle *made, int device) { return HANDLE(made), SUCCESS; }
int cuDevicePrimaryCtxRelease(int device) { return SUCCESS; }
int cuCtxSetCurrent(Handle to) {
  return LOG(to == FOREIGN ? "foreign\n" : to ? "current\n" : "none\n"), context = to, SUCCESS;
}
int cuCtxGetCurrent(Handle *now) { return *now = context, SUCCESS; }
int cuCtxPushCurrent(Handle to) { return context = to, SUCCESS; }
int cuCtxPopCurrent(Handle *now) { return *now = context, SUCCESS; }
int cuCtxGetDevice(int *device) { return *device = 0, SUCCESS; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0, SUCCESS; }

int cuStreamCreateWithPriority(Handle *made, unsigned flags, int p) { return HANDLE(made), SUCCESS; }
int cuStreamDestroy(Handle stream) { return SUCCESS; }
int cuStreamSynchronize(Handle stream) { return LOG("sync\n"), SUCCESS; }
int cuStreamGetCtx(Handle stream, Handle *its) { return *its = context, SUCCESS; }
int cuStreamGetDevice(Handle stream, int *device) { return *device = 0, SUCCESS; }
int cuStreamBeginCapture(Handle stream, int mode) {
  if (capturing) return CAPTURE_UNSUPPORTED;
  return LOG("capture %d\n", mode), capture_mode = mode, capturing = CAPTURING, SUCCESS;
}
int cuStreamEndCapture(Handle stream, Handle *graph) {
  int before = capturing;
  LOG("end\n"), capturing = 0, *graph = NULL;
  return before == INVALIDATED ? CAPTURE_INVALIDATED : (HANDLE(graph), SUCCESS);
}
int cuStreamIsCapturing(Handle stream, int *status) { return *status = capturing, SUCCESS; }
int cuStreamGetCaptureInfo_v2(Handle stream, int *status, uint64_t *id, Handle *graph, void *d, size_t *count) {
  *status = capturing;
  if (id) *id = capturing;
  if (graph) *graph = capturing == CAPTURING ? (Handle)1 : NULL;
  if (d) *(void **)d = NULL;
  if (count) *count = 0;
  return SUCCESS;
}
int cuStreamGetCaptureInfo(Handle s, int *status, uint64_t *id, Handle *graph, void *d, void *e, size_t *count) {
  return cuStreamGetCaptureInfo_v2(s, status, id, graph, d, count);
}
int cuStreamGetCaptureInfo_v3(Handle s, int *st, uint64_t *id, Handle *graph, void *d, void *e, size_t *count) {
  return cuStreamGetCaptureInfo_v2(s, st, id, graph, d, count);
}
int cuThreadExchangeStreamCaptureMode(int *mode) {
  int before = thread_mode;
  return thread_mode = *mode, *mode = before, SUCCESS;
}
/* Calls that end a global capture of any thread, unless their own thread is in the relaxed mode. */
static int unsafe(void) {
  if (!capturing || capture_mode != GLOBAL || thread_mode == RELAXED) return SUCCESS;
  return LOG("unsafe\n"), capturing = INVALIDATED, CAPTURE_UNSUPPORTED;
}

struct instantiation { uint64_t flags; Handle stream, node; int result; };
int cuGraphInstantiateWithParams(Handle *made, Handle graph, struct instantiation *how) {
  return how->result = 0, HANDLE(made), SUCCESS;
}
int cuGraphLaunch(Handle graph, Handle stream) { return LOG("replay\n"), SUCCESS; }

int cuDeviceGetMemPool(Handle *pool, int device) { return HANDLE(pool), SUCCESS; }
int cuDeviceGetDefaultMemPool(Handle *pool, int device) { return HANDLE(pool), SUCCESS; }
int cuMemGetMemPool(Handle *pool, void *place, int kind) { return HANDLE(pool), SUCCESS; }
int cuMemGetDefaultMemPool(Handle *pool, void *place, int kind) { return HANDLE(pool), SUCCESS; }
int cuMemPoolSetAttribute(Handle pool, int attribute, void *value) { return SUCCESS; }
int cuMemPoolGetAttribute(Handle pool, int attribute, uint64_t *value) {
  if (unsafe() || broken) return broken ? broken : CAPTURE_UNSUPPORTED;
  return *value = attribute == 5 ? 5000 : attribute == 7 ? 3000 : 0, SUCCESS; /* reserved, used */
}
int cuMemGetInfo(size_t *free, size_t *total) { return *free = 1000000, *total = 4000000, SUCCESS; }
int cuMemAllocFromPoolAsync(Address *made, size_t size, Handle pool, Handle stream) {
  if (broken) return broken;
  if (size > 1u << 30) return OUT_OF_MEMORY;
  *made = (Address)aligned_alloc(256, (size + 255) / 256 * 256);
  return LOG("alloc %zu\n", size), SUCCESS;
}
int cuMemFreeAsync(Address block, Handle stream) { return LOG("free\n"), free((void *)block), SUCCESS; }
int cuMemAllocHost(void **made, size_t size) {
  return *made = aligned_alloc(256, (size + 255) / 256 * 256), LOG("pinned %zu\n", size), SUCCESS;
}
int cuMemFreeHost(void *block) { return free(block), SUCCESS; }
int cuMemsetD8Async(Address to, unsigned char value, size_t size, Handle stream) {
  return memset((void *)to, value, size), LOG("clear %zu\n", size), SUCCESS;
}
int cuMemcpyAsync(Address to, Address from, size_t size, Handle stream) {
  return memmove((void *)to, (void *)from, size), LOG("copy %zu\n", size), SUCCESS;
}
int cuPointerGetAttribute(void *value, int attribute, Address of) { return memset(value, 0, 4), SUCCESS; }
int cuPointerGetAttributes(unsigned count, int *attributes, void **values, Address of) {
  for (unsigned i = 0; i < count; i++) memset(values[i], 0, 4);
  return SUCCESS;
}

int cuEventCreate(Handle *made, unsigned flags) { return HANDLE(made), SUCCESS; }
int cuEventRecord(Handle event, Handle stream) { return LOG("event\n"), SUCCESS; }
int cuStreamWaitEvent(Handle stream, Handle event, unsigned flags) {
  return LOG(stream == (Handle)7 ? "another stream waits\n" : "the stream waits\n"), SUCCESS;
}
int cuEventQuery(Handle event) { return NOT_READY; }
int cuEventSynchronize(Handle event) { return LOG("wait\n"), SUCCESS; }
int cuEventDestroy(Handle event) { return SUCCESS; }

int cuLibraryLoadData(Handle *made, const char *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
  return HANDLE(made), strncmp(code, "bad", 3) ? SUCCESS : INVALID_IMAGE;
}
int cuLibraryUnload(Handle library) { return SUCCESS; }
int cuLibraryGetKernel(Handle *made, Handle library, const char *name) {
  return LOG("kernel %s\n", name), HANDLE(made), SUCCESS;
}
int cuKernelGetFunction(Handle *function, Handle kernel) { return *function = kernel, SUCCESS; }
int cuKernelGetLibrary(Handle *library, Handle kernel) { return HANDLE(library), SUCCESS; }
int cuKernelGetAttribute(int *value, int attribute, Handle kernel, int device) { return *value = 0, SUCCESS; }
int cuKernelSetAttribute(int attribute, int value, Handle kernel, int device) {
  return LOG("attribute %d = %d\n", attribute, value), SUCCESS;
}
struct launch { unsigned grid[3], block[3], shared; Handle stream; void *attributes; unsigned count; };
int cuLaunchKernelEx(const struct launch *l, Handle function, void **arguments, void **extra) {
  if (l->block[0] == REFUSED_IN_CAPTURE && capturing) return capturing = INVALIDATED, CAPTURE_INVALIDATED;
  if (l->block[0] == CRASHING) broken = ILLEGAL_ADDRESS;
  LOG("launch %u %u %u, %u threads, %u bytes: %d %d %g\n", l->grid[0], l->grid[1], l->grid[2], l->block[0],
      l->shared, **(int **)*arguments, *(int *)arguments[1], *(float *)arguments[2]);
  return SUCCESS;
}
int cuLaunchKernel(Handle function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Handle stream, void **arguments, void **extra) {
  struct launch l = {{x, y, z}, {bx, by, bz}, shared, stream, NULL, 0};
  return cuLaunchKernelEx(&l, function, arguments, extra);
}
