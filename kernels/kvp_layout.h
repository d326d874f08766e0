/**
 * Where the bytes of a pool lie: from a pool's geometry to the offset and the strides of each of its planes.
 *
 * A pool has P pages of T tokens each. A plane is one component (K, V, CKV, KPE) of one layer; an element of it has the
 * coordinates (page, token, head, element), its address is
 *
 *     slab + offset + page · page_stride + token · token_stride + head · head_stride + element · sizeof(dtype)
 *
 * and the elements of one (page, token, head) always lie together. The order within a page of a plane:
 *
 *     NHD   [T, H, D]    head_stride = D·e    token_stride = H·D·e
 *     HND   [H, T, D]    head_stride = T·D·e  token_stride = D·e
 *
 * and where the pages of a plane lie:
 *
 *     LAYER            plane 0: [P, page] | plane 1: [P, page] | …          each plane a tensor of its own
 *     LAYER, joined    layer 0: [P, 2, page] | layer 1: [P, 2, page] | …    K and V, where their shapes agree
 *                      layer 0: [P, T, ckv + kpe] | …                       MLA: CKV and KPE, 1 head each
 *     PAGE             page 0: plane 0, plane 1, … | page 1: plane 0, …     a page is one run of page_bytes
 *
 * The base of each tensor (LAYER) is 256-byte aligned. With PAGE every plane starts 16-byte aligned within its page and
 * page_bytes is a multiple of 256 where that costs at most one part in 64, else of 16.
 *
 * Used by the daemon, the executor and the client, so that all compute the same; the digest is what they compare.
 * Plain C, thread-safe, no state. Installed beside kvpool.h.
 */
#ifndef KVP_LAYOUT_H
#define KVP_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include "kvp_limits.h"
#include "kvp_status.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default) /* exported by libkvpool.so, which carries them */

/* The values are those of kvpool.proto. */
enum kvp_dtype {
    KVP_DTYPE_F32 = 1,
    KVP_DTYPE_F16 = 2,
    KVP_DTYPE_BF16 = 3,
    KVP_DTYPE_FP8_E4M3 = 4,
    KVP_DTYPE_FP8_E5M2 = 5,
    KVP_DTYPE_U8 = 6,
};

enum kvp_component {
    KVP_COMPONENT_K = 1,
    KVP_COMPONENT_V = 2,
    KVP_COMPONENT_CKV = 3,
    KVP_COMPONENT_KPE = 4,
};

enum kvp_order {
    KVP_ORDER_NHD = 1,
    KVP_ORDER_HND = 2,
};

enum kvp_placement {
    KVP_PLACEMENT_LAYER = 1,
    KVP_PLACEMENT_PAGE = 2,
};

/* A plane as its owner describes it. Each (layer, component) at most once in a pool. */
struct kvp_plane_spec {
    uint32_t layer;
    uint32_t component; /* enum kvp_component */
    uint32_t heads;     /* 1..KVP_HEADS_MAX */
    uint32_t dim;       /* elements of one head, 1..KVP_DIM_MAX */
    uint32_t dtype;     /* enum kvp_dtype */
};

struct kvp_layout_spec {
    uint32_t pages;                      /* P, 1..KVP_PAGES_MAX */
    uint32_t page_tokens;                /* T, 1..KVP_PAGE_TOKENS_MAX */
    uint32_t n_planes;                   /* 1..KVP_PLANES_MAX */
    uint32_t order;                      /* enum kvp_order */
    uint32_t placement;                  /* enum kvp_placement */
    uint32_t joined;                     /* 0 or 1; 1 only with KVP_PLACEMENT_LAYER */
    const struct kvp_plane_spec *planes; /* [n_planes] */
};

/* Where a plane lies. All in bytes. */
struct kvp_plane_layout {
    uint64_t offset; /* of page 0, from the slab's start */
    uint64_t page_stride;
    uint64_t token_stride;
    uint64_t head_stride;
};

struct kvp_layout_totals {
    uint64_t slab_bytes; /* of all planes, padding included */
    uint64_t page_bytes; /* of one page over all planes, without padding between tensors */
};

/* Bytes of one element; 0 for what is no dtype. */
uint32_t kvp_dtype_bytes(uint32_t dtype);

/**
 * Check a geometry and place its planes.
 *
 * @param ret_planes   [spec->n_planes]; undefined on failure
 * @param ret_totals   may be NULL
 * @param reterr_text  on KVP_EINVAL and KVP_ELIMIT what is wrong, with the value and the limit; may be NULL
 * @param text_bytes   of reterr_text
 *
 * With `joined`, K and V (or CKV and KPE) of a layer that can not be joined (shapes or dtypes differ, CKV or KPE of
 * more than one head, the partner missing) lie apart, as without it.
 *
 * @retval KVP_EINVAL  a value is out of its range, or a (layer, component) stands twice
 * @retval KVP_ELIMIT  the slab would not fit in 2^63 bytes
 */
enum kvp_status kvp_layout_compute(const struct kvp_layout_spec *spec, struct kvp_plane_layout *ret_planes,
                                   struct kvp_layout_totals *ret_totals, char *reterr_text, size_t text_bytes);

/**
 * The 128-bit digest of a geometry: XXH3 over its fields in the order of the structs above, each as a little-endian
 * 32-bit word, behind a word that counts the versions of this layout rule. Only for a spec that kvp_layout_compute
 * takes.
 */
void kvp_layout_digest(const struct kvp_layout_spec *spec, uint64_t ret_digest[2]);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

#endif
