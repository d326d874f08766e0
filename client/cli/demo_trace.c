/**
 * What the demo serves: requests of a trace file (trace.h), or of the built-in workload in the same form, as fast as the
 * workers can.
 *
 * A request goes to the worker that served the deepest of its blocks, as routers of requests do, else to the one with
 * fewer tokens so far. Both workers work that out for themselves, from the same trace.
 */
#include "demo.h"

#include "trace.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHAT_BLOCK_TOKENS 64u

/* ---- which worker ------------------------------------------------------------------------------------------------ */

/* A hash table from block id to the worker that served it last: open addressing, at most half full. */
struct owners {
    uint64_t *ids; /* id + 1; 0: free */
    unsigned char *workers;
    size_t mask;
};

static size_t find_owner(const struct owners *owners, uint64_t id)
{
    size_t at = (size_t)((id + 1) * 0x9e3779b97f4a7c15ull >> 20) & owners->mask;

    while (owners->ids[at] != 0 && owners->ids[at] != id + 1)
        at = (at + 1) & owners->mask;
    return at;
}

static bool assign_workers(struct demo_trace *trace, size_t n_blocks)
{
    uint64_t load[DEMO_WORKERS] = {0};
    struct owners owners;
    size_t room = 1024;

    while (room < 2 * n_blocks)
        room *= 2;
    owners = (struct owners){calloc(room, sizeof(uint64_t)), calloc(room, 1), room - 1};
    if (owners.ids == NULL || owners.workers == NULL)
        goto free_owners;
    for (size_t r = 0; r < trace->n; r++) {
        struct demo_request *request = &trace->requests[r];
        uint32_t depth = 0;

        request->worker = load[0] <= load[1] ? 0 : 1;
        /* The first block is a system prompt that all share: it decides nothing. */
        for (uint32_t b = 0; b < request->n_blocks; b++) {
            size_t at = find_owner(&owners, request->blocks[b]);

            if (owners.ids[at] == 0)
                break;
            depth = b + 1;
            if (depth > 1)
                request->worker = owners.workers[at];
        }
        for (uint32_t b = 0; b < request->n_blocks; b++) {
            size_t at = find_owner(&owners, request->blocks[b]);

            owners.ids[at] = request->blocks[b] + 1;
            owners.workers[at] = (unsigned char)request->worker;
        }
        load[request->worker] +=
            request->input_length - (depth > 1 ? (depth - 1) * trace->block_tokens : 0) + request->output_length;
    }

free_owners:
    free(owners.workers);
    free(owners.ids);
    return owners.ids != NULL && owners.workers != NULL;
}

/* ---- a trace becomes the demo's ---------------------------------------------------------------------------------- */

/* Takes the trace over. @return false: no memory; it is freed */
static bool make_trace(struct trace *from, struct demo_trace *ret_trace)
{
    struct demo_trace trace = {.requests = calloc(from->n, sizeof(*trace.requests)),
                               .n = from->n,
                               .block_tokens = from->block_tokens,
                               .memory = from->blocks};

    if (trace.requests == NULL)
        goto fail;
    for (size_t i = 0; i < from->n; i++) {
        const struct trace_request *r = &from->requests[i];

        trace.requests[i] = (struct demo_request){.input_length = r->input_length,
                                                  .output_length = r->output_length,
                                                  .n_blocks = r->n_blocks,
                                                  .blocks = trace_blocks(from, i)};
        if (r->input_length + r->output_length > trace.longest)
            trace.longest = r->input_length + r->output_length;
    }
    if (!assign_workers(&trace, from->n_blocks))
        goto fail;
    free(from->requests);
    *ret_trace = trace;
    return true;

fail:
    free(trace.requests);
    trace_free(from);
    return false;
}

void demo_trace_free(struct demo_trace *trace)
{
    free(trace->requests);
    free(trace->memory);
    *trace = (struct demo_trace){0};
}

uint64_t demo_content_key(const struct demo_trace *trace, size_t request, uint32_t position)
{
    const struct demo_request *r = &trace->requests[request];
    uint32_t block = position / trace->block_tokens;

    return position < r->input_length && block < r->n_blocks ? r->blocks[block] : 1ull << 63 | request;
}

bool demo_trace_read(const char *path, struct demo_trace *ret_trace)
{
    struct trace trace;

    if (!trace_read(path, &trace))
        return false;
    if (trace.block_tokens == 0) {
        fprintf(stderr, "kvpool: trace %s: there is no block size by which hash_ids fit the input lengths\n", path);
        trace_free(&trace);
        return false;
    }
    if (!make_trace(&trace, ret_trace)) {
        fprintf(stderr, "kvpool: trace %s: out of memory\n", path);
        return false;
    }
    return true;
}

/* ---- the built-in workload --------------------------------------------------------------------------------------- */

#define CHAT_CONVERSATIONS 4096u
#define CHAT_AT_A_TIME     12u /* conversations whose turns alternate */
#define CHAT_PROMPTS       3u  /* system prompts, shared by all conversations */
#define CHAT_PROMPT_BLOCKS 4u

static uint32_t chat_random(uint64_t *state, uint32_t min, uint32_t max)
{
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return min + (uint32_t)((*state >> 33) % (max - min + 1));
}

/* A turn's prompt: the system prompt's blocks, then the conversation's own, whose content stays as it grows. */
static bool add_turn(struct trace *trace, uint32_t conversation, uint32_t turn_time, uint32_t input, uint32_t output)
{
    struct trace_request request = {.first_block = trace->n_blocks,
                                    .input_length = input,
                                    .output_length = output,
                                    .n_blocks = (input + CHAT_BLOCK_TOKENS - 1) / CHAT_BLOCK_TOKENS};
    uint32_t prompt = conversation % CHAT_PROMPTS;

    for (uint32_t b = 0; b < request.n_blocks; b++) {
        /* A partial last block is content of this turn alone: the next turn's block there is another. */
        bool partial = (b + 1) * CHAT_BLOCK_TOKENS > input;
        uint64_t id = b < CHAT_PROMPT_BLOCKS
                          ? prompt * CHAT_PROMPT_BLOCKS + b
                          : 1000 + ((uint64_t)conversation << 24 | b << 8 | (partial ? turn_time % 255 + 1 : 0));

        if (!trace_add_block(trace, id))
            return false;
    }
    return trace_add_request(trace, &request);
}

/* Conversations of three to six turns; each turn's prompt is all before it and a new question. */
static bool make_chat(struct trace *trace)
{
    uint64_t random = 20240613;
    uint32_t time = 0;

    for (uint32_t first = 0; first < CHAT_CONVERSATIONS; first += CHAT_AT_A_TIME) {
        uint32_t lengths[CHAT_AT_A_TIME], turns[CHAT_AT_A_TIME];

        for (uint32_t c = 0; c < CHAT_AT_A_TIME; c++) {
            lengths[c] = CHAT_PROMPT_BLOCKS * CHAT_BLOCK_TOKENS;
            turns[c] = chat_random(&random, 3, 6);
        }
        for (uint32_t turn = 0; turn < 6; turn++) {
            for (uint32_t c = 0; c < CHAT_AT_A_TIME; c++) {
                uint32_t output = chat_random(&random, 20, 180);

                if (turn >= turns[c])
                    continue;
                lengths[c] += chat_random(&random, 40, 320);
                if (!add_turn(trace, first + c, time++, lengths[c], output))
                    return false;
                lengths[c] += output;
            }
        }
    }
    return true;
}

bool demo_trace_chat(struct demo_trace *ret_trace)
{
    struct trace trace = {.block_tokens = CHAT_BLOCK_TOKENS};

    if (!make_chat(&trace)) {
        trace_free(&trace);
        return false;
    }
    return make_trace(&trace, ret_trace);
}
