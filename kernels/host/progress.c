/**
 * Progress words on the host: the release store by which a worker says how many tokens of a sequence are written.
 *
 * The daemon loads the word with acquire, so it sees the bytes that were stored before. Called by the thread that
 * appended, or after it in any order that happens-before makes.
 */
#include "../kvp_check.h"
#include "address.h"

enum kvp_status kvp_host_progress(const struct kvp_progress_args *args, int threads)
{
    (void)threads; /* a batch is too small to share out */
    enum kvp_status status = kvp_check_progress(args);
    if (status != KVP_OK)
        return status;
    int64_t n = args->n;
    if (args->n_device != NULL) {
        int64_t counted = kvp_index_load(args->n_device, args->index_bits);
        n = counted < n ? counted : n;
    }
    for (int64_t i = 0; i < n; i++) {
        int32_t slot = args->seq_slots[i];
        int64_t length = kvp_index_at(args->lengths, args->index_bits, i);
        if (slot < 0 || length < 0)
            continue;
        if ((uint32_t)slot >= args->max_sequences) {
            kvp_report(args->errors, KVP_BAD_SLOT, i, slot);
            continue;
        }
        __atomic_store_n(&args->progress[slot], KVP_PROGRESS_WORD(args->versions[i], length), __ATOMIC_RELEASE);
    }
    return KVP_OK;
}
