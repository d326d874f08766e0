/**
 * Traces of requests in the Mooncake format, read from a file or put together.
 *
 * One JSON object a line with timestamp, input_length, output_length and hash_ids, one id a block of the prompt; an id
 * stands for the block and all before it, so equal ids can be reused. Requests are served in the order of their
 * timestamps, those of one time in the order of the file. The size of a block is not in the file: it is the one for
 * which the counts of ids fit the lengths (the last block may be partial or missing).
 */
#ifndef KVPOOL_TRACE_H
#define KVPOOL_TRACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct trace_request {
    long double timestamp;                /* whole numbers of 64 bits are told apart, too */
    size_t first_block;                   /* its blocks: trace.blocks + this */
    size_t line;                          /* of the file */
    uint32_t input_length, output_length; /* tokens */
    uint32_t n_blocks;
};

struct trace {
    struct trace_request *requests; /* in the order in which they are served */
    uint64_t *blocks;
    size_t n, n_blocks;
    uint32_t block_tokens; /* 0: there is no size that fits */
    size_t requests_room, blocks_room;
};

static inline const uint64_t *trace_blocks(const struct trace *trace, size_t request)
{
    return trace->blocks + trace->requests[request].first_block;
}

/** Read a trace. @return false: what is wrong, with the line, is said on stderr; there is nothing to free */
bool trace_read(const char *path, struct trace *ret_trace);

/* Put one together: each request's blocks, then the request. @return false: no memory */
bool trace_add_block(struct trace *trace, uint64_t id);
bool trace_add_request(struct trace *trace, const struct trace_request *request);

void trace_free(struct trace *trace);

#endif
