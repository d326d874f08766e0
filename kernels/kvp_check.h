/**
 * The checks that both backends make of an operation's arguments, before anything runs: private to kernels/.
 *
 * Each returns KVP_OK, or KVP_EINVAL for what the header forbids. A call that has nothing to do (no tokens, no pages)
 * passes. They read host arrays only, never data.
 */
#ifndef KVP_CHECK_H
#define KVP_CHECK_H

#include "kvp_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum kvp_status kvp_check_append(const struct kvp_append_args *args);
enum kvp_status kvp_check_quant_append(const struct kvp_quant_append_args *args);
enum kvp_status kvp_check_gather(const struct kvp_gather_args *args);
enum kvp_status kvp_check_index(const struct kvp_index_args *args);
enum kvp_status kvp_check_progress(const struct kvp_progress_args *args);
enum kvp_status kvp_check_page_copy(const struct kvp_page_copy_args *args);
enum kvp_status kvp_check_page_flat(const struct kvp_page_flat_args *args);
enum kvp_status kvp_check_page_zero(const struct kvp_page_zero_args *args);
enum kvp_status kvp_check_page_digest(const struct kvp_page_digest_args *args);

#ifdef __cplusplus
}
#endif

#endif
