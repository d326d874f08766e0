/**
 * The progress store: how many tokens of each sequence are written, told to whoever maps the progress page.
 *
 * A launch of its own: the stream orders it behind the appends, whose stores are then performed on the device (that is
 * what wait_for_stream waits for); the fence before each store orders them for the rest of the system. (Fused into
 * append it would have to wait for that kernel's last block.)
 */
#include "device.cuh"

__global__ void __launch_bounds__(KVP_BLOCK_THREADS) progress_kernel(const __grid_constant__ kvp_progress_args a)
{
    const bool wide = a.index_bits == 64;
    int64_t i = (int64_t)blockIdx.x * KVP_BLOCK_THREADS + threadIdx.x, length;
    int32_t slot;

    wait_for_stream();
    if (i >= a.n || (a.n_device && i >= load_index(a.n_device, 0, wide)))
        return;
    slot = a.seq_slots[i];
    length = load_index(a.lengths, i, wide);
    if (slot < 0 || length < 0)
        return;
    if ((uint32_t)slot >= a.max_sequences) {
        report(a.errors, KVP_BAD_SLOT, i, slot);
        return;
    }
    __threadfence_system();
    *reinterpret_cast<volatile uint64_t *>(&a.progress[slot]) = KVP_PROGRESS_WORD(a.versions[i], length);
}

extern "C" enum kvp_status kvp_cuda_progress(const struct kvp_progress_args *args, void *stream)
{
    enum kvp_status status = kvp_check_progress(args);

    if (status != KVP_OK || args->n == 0)
        return status;
    return launch_early(progress_kernel, *args, (uint32_t)((args->n + KVP_BLOCK_THREADS - 1) / KVP_BLOCK_THREADS),
                        KVP_BLOCK_THREADS, 0, stream);
}
