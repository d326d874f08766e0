/**
 * What the two files that audit a pool share. Private.
 *
 * The scratch memory holds, for the pool at hand, two words a page and a mark a sequence:
 *
 *   page   bits 0–28 references counted · 29 on the free list · 30 writable by an OPEN row · 31 in an eviction list
 *   page   published pages that extend it
 *   seq    bit 0 seen in the list of its state
 */
#ifndef KVP_POOL_AUDIT_H
#define KVP_POOL_AUDIT_H

#include "internal.h"

#define MARK_REFS     0x1fffffffu
#define MARK_FREE     (1u << 29)
#define MARK_WRITABLE (1u << 30)
#define MARK_LISTED   (1u << 31)

struct pool_audit {
    struct audit *audit;
    struct pool_map m;
    uint32_t states[KVP_SEQ_PIN + 1];       /* sequences found in each state */
    uint32_t retiring[KVP_ATTACHMENTS_MAX]; /* RETIRING rows of each attachment */
    uint32_t tenant_pages[KVP_TENANTS_MAX], tenant_cached[KVP_TENANTS_MAX];
    uint32_t published, cached, dirty;
};

/* A violation at sequence, page, tenant or attachment `i` of the pool. */
#define REPORT(a, what, i, format, ...)                                                                                \
    audit_report((a)->audit, "pool %u " what " %u: " format, (a)->m.slot, (i), ##__VA_ARGS__)

/* audit_cache.c: pages and index; the references are counted. */
void audit_pages(struct pool_audit *a);

#endif
