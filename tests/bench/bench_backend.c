/**
 * The two backends of bench_backend.h. The CUDA half is compiled where the toolkit is.
 */
#include "bench_backend.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifdef KVP_BENCH_CUDA
#include <cuda_runtime_api.h>
#endif

#define RANDOM_BYTES ((size_t)32 << 20)
#define COPY_BYTES   ((size_t)1 << 30)

#define HOST_COPY_BYTES ((size_t)256 << 20)

static void die(const char *what, const char *why)
{
    fprintf(stderr, "kvp_bench_kernels: %s: %s\n", what, why);
    exit(1);
}

static unsigned char *random_block(void)
{
    static unsigned char *block;
    uint64_t x = 0x9e3779b97f4a7c15ull;

    if (block)
        return block;
    block = malloc(RANDOM_BYTES);
    if (!block)
        die("random bytes", "out of memory");
    for (size_t i = 0; i < RANDOM_BYTES; i += 8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        memcpy(block + i, &x, 8);
    }
    return block;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double median(double *values, unsigned n)
{
    qsort(values, n, sizeof(*values), compare_doubles);
    return values[n / 2];
}

/* ---- the host ---------------------------------------------------------------------------------------------------- */

static double now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static double host_time_us(struct bench *bench, bench_step step, void *context, unsigned launches)
{
    double *times = malloc(bench->replays * sizeof(*times)), result;

    if (!times)
        die("timing", "out of memory");
    for (unsigned r = 0; r < bench->replays + 1; r++) {
        double start = now_us();

        for (unsigned i = 0; i < launches; i++) {
            if (step(context, i, NULL) != KVP_OK)
                die("a launch", "refused");
        }
        if (r > 0) /* the first one warms up */
            times[r - 1] = (now_us() - start) / launches;
    }
    result = median(times, bench->replays);
    free(times);
    return result;
}

struct copy_part {
    pthread_t thread;
    pthread_barrier_t *barrier;
    char *to;
    const char *from;
    size_t bytes;
    unsigned rounds;
};

static void *copy_thread(void *argument)
{
    struct copy_part *part = argument;

    for (unsigned r = 0; r < part->rounds; r++) {
        pthread_barrier_wait(part->barrier);
        memcpy(part->to, part->from, part->bytes);
        pthread_barrier_wait(part->barrier);
    }
    return NULL;
}

/* memcpy by as many threads as the kernels get, one part each, the median round. */
static double host_ceiling(struct bench *bench)
{
    struct copy_part *parts = calloc((size_t)bench->threads, sizeof(*parts));
    double *times = malloc(bench->replays * sizeof(*times)), us;
    char *from = bench_alloc(bench, HOST_COPY_BYTES), *to = bench_alloc(bench, HOST_COPY_BYTES);
    size_t share = HOST_COPY_BYTES / (size_t)bench->threads;
    pthread_barrier_t barrier;

    if (!parts || !times || pthread_barrier_init(&barrier, NULL, (unsigned)bench->threads + 1))
        die("ceiling", "out of memory");
    for (int t = 0; t < bench->threads; t++) {
        size_t at = (size_t)t * share;

        parts[t] = (struct copy_part){0, &barrier, to + at, from + at, share, bench->replays};
        if (pthread_create(&parts[t].thread, NULL, copy_thread, &parts[t]))
            die("ceiling", "no thread");
    }
    for (unsigned r = 0; r < bench->replays; r++) {
        double start;

        pthread_barrier_wait(&barrier);
        start = now_us();
        pthread_barrier_wait(&barrier);
        times[r] = now_us() - start;
    }
    for (int t = 0; t < bench->threads; t++)
        pthread_join(parts[t].thread, NULL);
    us = median(times, bench->replays);
    pthread_barrier_destroy(&barrier);
    bench_free(bench, from);
    bench_free(bench, to);
    free(times);
    free(parts);
    return 2.0 * (double)(share * (size_t)bench->threads) / us * 1e-3;
}

/* ---- the GPU ----------------------------------------------------------------------------------------------------- */

#ifdef KVP_BENCH_CUDA

#define GRAPH_LAUNCHES 4 /* between two events: the first one's way to the GPU should not count much */

#define CHECK_CUDA(call)                                                                                               \
    do {                                                                                                               \
        cudaError_t error_ = (call);                                                                                   \
        if (error_ != cudaSuccess)                                                                                     \
            die(#call, cudaGetErrorString(error_));                                                                    \
    } while (0)

static double cuda_time_us(struct bench *bench, bench_step step, void *context, unsigned launches)
{
    double *times = malloc(bench->replays * sizeof(*times)), result;
    cudaEvent_t start, stop;
    cudaGraphExec_t exec;
    cudaStream_t stream;
    cudaGraph_t graph;

    if (!times)
        die("timing", "out of memory");
    CHECK_CUDA(cudaStreamCreate(&stream));
    CHECK_CUDA(cudaEventCreate(&start));
    CHECK_CUDA(cudaEventCreate(&stop));
    CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (unsigned i = 0; i < launches; i++) {
        if (step(context, i, stream) != KVP_OK)
            die("a launch", "refused");
    }
    CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    for (unsigned r = 0; r < bench->replays + 2; r++) {
        float ms;

        CHECK_CUDA(cudaEventRecord(start, stream));
        for (unsigned i = 0; i < GRAPH_LAUNCHES; i++)
            CHECK_CUDA(cudaGraphLaunch(exec, stream));
        CHECK_CUDA(cudaEventRecord(stop, stream));
        CHECK_CUDA(cudaEventSynchronize(stop));
        CHECK_CUDA(cudaEventElapsedTime(&ms, start, stop));
        if (r >= 2) /* the first two warm up */
            times[r - 2] = (double)ms * 1e3 / (launches * GRAPH_LAUNCHES);
    }
    CHECK_CUDA(cudaGraphExecDestroy(exec));
    CHECK_CUDA(cudaGraphDestroy(graph));
    CHECK_CUDA(cudaEventDestroy(start));
    CHECK_CUDA(cudaEventDestroy(stop));
    CHECK_CUDA(cudaStreamDestroy(stream));
    result = median(times, bench->replays);
    free(times);
    return result;
}

struct cuda_copy {
    char *from, *to;
    size_t bytes; /* of one copy; the launches take their turn through COPY_BYTES */
};

static enum kvp_status cuda_copy_step(void *context, unsigned number, void *stream)
{
    struct cuda_copy *copy = context;
    size_t at = number % (COPY_BYTES / copy->bytes) * copy->bytes;

    return cudaMemcpyAsync(copy->to + at, copy->from + at, copy->bytes, cudaMemcpyDeviceToDevice, stream) == cudaSuccess
               ? KVP_OK
               : KVP_EDEVICE;
}

/* Copies enqueued one by one: on some drivers they are faster than the same ones in a graph. */
static double cuda_plain_copy_us(struct bench *bench, struct cuda_copy *copy, unsigned copies)
{
    double *times = malloc(bench->replays * sizeof(*times)), result;
    cudaEvent_t start, stop;

    if (!times)
        die("ceiling", "out of memory");
    CHECK_CUDA(cudaEventCreate(&start));
    CHECK_CUDA(cudaEventCreate(&stop));
    for (unsigned r = 0; r < bench->replays; r++) {
        float ms;

        CHECK_CUDA(cudaEventRecord(start, NULL));
        for (unsigned i = 0; i < copies; i++)
            CHECK_CUDA(cudaMemcpyAsync(copy->to, copy->from, COPY_BYTES, cudaMemcpyDeviceToDevice, NULL));
        CHECK_CUDA(cudaEventRecord(stop, NULL));
        CHECK_CUDA(cudaEventSynchronize(stop));
        CHECK_CUDA(cudaEventElapsedTime(&ms, start, stop));
        times[r] = (double)ms * 1e3 / copies;
    }
    CHECK_CUDA(cudaEventDestroy(start));
    CHECK_CUDA(cudaEventDestroy(stop));
    result = median(times, bench->replays);
    free(times);
    return result;
}

/* The faster of the two ways to copy. */
static double cuda_ceiling(struct bench *bench)
{
    struct cuda_copy copy = {bench_alloc(bench, COPY_BYTES), bench_alloc(bench, COPY_BYTES), COPY_BYTES};
    double us = cuda_time_us(bench, cuda_copy_step, &copy, 2), plain_us = cuda_plain_copy_us(bench, &copy, 2);

    bench_free(bench, copy.from);
    bench_free(bench, copy.to);
    return 2.0 * (double)COPY_BYTES / (us < plain_us ? us : plain_us) * 1e-3;
}

static bool cuda_open(struct bench *bench)
{
    struct cudaDeviceProp properties;
    int count;

    if (cudaGetDeviceCount(&count) != cudaSuccess || count < 1)
        return false;
    CHECK_CUDA(cudaSetDevice(0));
    CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
    snprintf(bench->device, sizeof(bench->device), "%.100s", properties.name);
    bench->cache_bytes = (size_t)properties.l2CacheSize;
    return true;
}

#endif

#ifdef KVP_BENCH_CUDA
double bench_copy_us(struct bench *bench, size_t bytes)
{
    struct cuda_copy copy = {NULL, NULL, bytes};
    double us;

    if (!bench->cuda)
        return 0;
    copy.from = bench_alloc(bench, COPY_BYTES);
    copy.to = bench_alloc(bench, COPY_BYTES);
    us = cuda_time_us(bench, cuda_copy_step, &copy, (unsigned)(COPY_BYTES / bytes < 32 ? COPY_BYTES / bytes : 32));
    bench_free(bench, copy.from);
    bench_free(bench, copy.to);
    return us;
}
#else
double bench_copy_us(struct bench *bench, size_t bytes)
{
    (void)bench;
    (void)bytes;
    return 0;
}
#endif

/* ---- both -------------------------------------------------------------------------------------------------------- */

bool bench_open(struct bench *bench, const char *backend, int threads)
{
    bench->cuda = false;
    bench->replays = 15;
#ifdef KVP_BENCH_CUDA
    if (strcmp(backend, "host") != 0)
        bench->cuda = cuda_open(bench);
    if (bench->cuda) {
        bench->ceiling_gb_per_s = cuda_ceiling(bench);
        return true;
    }
#endif
    if (strcmp(backend, "cuda") == 0)
        return false;
    bench->threads = threads > 0 ? threads : (int)sysconf(_SC_NPROCESSORS_ONLN);
    bench->cache_bytes = (size_t)32 << 20;
    snprintf(bench->device, sizeof(bench->device), "host, %d threads", bench->threads);
    bench->ceiling_gb_per_s = host_ceiling(bench);
    return true;
}

/* Memory filled with a block of RANDOM_BYTES over and over. */
static void *alloc_filled(struct bench *bench, size_t bytes, const unsigned char *random)
{
    void *memory = NULL;

#ifdef KVP_BENCH_CUDA
    if (bench->cuda) {
        size_t done = bytes < RANDOM_BYTES ? bytes : RANDOM_BYTES;

        CHECK_CUDA(cudaMalloc(&memory, bytes));
        CHECK_CUDA(cudaMemcpy(memory, random, done, cudaMemcpyHostToDevice));
        for (size_t more; done < bytes; done += more) {
            more = bytes - done < done ? bytes - done : done;
            CHECK_CUDA(cudaMemcpy((char *)memory + done, memory, more, cudaMemcpyDeviceToDevice));
        }
        CHECK_CUDA(cudaDeviceSynchronize());
        return memory;
    }
#endif
    (void)bench;
    if (posix_memalign(&memory, 4096, bytes))
        die("memory", "not to be had");
    for (size_t done = 0; done < bytes; done += RANDOM_BYTES)
        memcpy((char *)memory + done, random, bytes - done < RANDOM_BYTES ? bytes - done : RANDOM_BYTES);
    return memory;
}

void bench_renew_ceiling(struct bench *bench)
{
    if (!bench->cuda)
        bench->ceiling_gb_per_s = host_ceiling(bench);
}

void *bench_alloc(struct bench *bench, size_t bytes)
{
    return alloc_filled(bench, bytes, random_block());
}

void *bench_alloc_numbers(struct bench *bench, size_t bytes, uint32_t dtype)
{
    const unsigned char *random = random_block();
    unsigned char *numbers = malloc(RANDOM_BYTES);
    void *memory;

    if (!numbers)
        die("numbers", "out of memory");
    for (size_t i = 0; i < RANDOM_BYTES; i += 4) { /* the mantissa stays, the exponent is one of eight */
        uint32_t x;

        memcpy(&x, random + i, 4);
        if (dtype == KVP_DTYPE_F32)
            x = (x & 0x007fffff) | (122 + (x >> 23 & 7)) << 23;
        else if (dtype == KVP_DTYPE_F16)
            x = (x & 0x83ff83ff) | (10 + (x >> 10 & 7)) << 10 | (10 + (x >> 26 & 7)) << 26;
        else
            x = (x & 0x807f807f) | (122 + (x >> 7 & 7)) << 7 | (122 + (x >> 23 & 7)) << 23;
        memcpy(numbers + i, &x, 4);
    }
    memory = alloc_filled(bench, bytes, numbers);
    free(numbers);
    return memory;
}

void bench_free(struct bench *bench, void *memory)
{
#ifdef KVP_BENCH_CUDA
    if (bench->cuda) {
        CHECK_CUDA(cudaFree(memory));
        return;
    }
#endif
    (void)bench;
    free(memory);
}

void *bench_upload(struct bench *bench, const void *from, size_t bytes)
{
    void *memory = NULL;

#ifdef KVP_BENCH_CUDA
    if (bench->cuda) {
        CHECK_CUDA(cudaMalloc(&memory, bytes));
        CHECK_CUDA(cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice));
        return memory;
    }
#endif
    (void)bench;
    memory = malloc(bytes);
    if (!memory)
        die("memory", "not to be had");
    memcpy(memory, from, bytes);
    return memory;
}

void *bench_upload_registered(struct bench *bench, const void *from, size_t bytes, void **ret_handle)
{
    int fd = memfd_create("bench", MFD_CLOEXEC);
    void *memory;

    if (fd < 0 || write(fd, from, bytes) != (ssize_t)bytes)
        die("memfd", "not to be had");
    memory = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (memory == MAP_FAILED)
        die("mmap", "failed");
    *ret_handle = memory;
#ifdef KVP_BENCH_CUDA
    if (bench->cuda) {
        void *device;

        CHECK_CUDA(cudaHostRegister(memory, bytes, cudaHostRegisterMapped | cudaHostRegisterReadOnly));
        CHECK_CUDA(cudaHostGetDevicePointer(&device, memory, 0));
        return device;
    }
#endif
    (void)bench;
    return memory;
}

void bench_free_registered(struct bench *bench, void *handle, size_t bytes)
{
#ifdef KVP_BENCH_CUDA
    if (bench->cuda)
        CHECK_CUDA(cudaHostUnregister(handle));
#endif
    (void)bench;
    if (munmap(handle, bytes))
        die("munmap", "failed");
}

double bench_time_us(struct bench *bench, bench_step step, void *context, unsigned launches)
{
#ifdef KVP_BENCH_CUDA
    if (bench->cuda)
        return cuda_time_us(bench, step, context, launches);
#endif
    return host_time_us(bench, step, context, launches);
}
