/**
 * What the demo serves: requests of a trace file in the Mooncake format, or of the built-in workload in the same form.
 *
 * Mooncake format: one JSON object a line with timestamp, input_length, output_length and hash_ids, one id a block of
 * the prompt; an id stands for the block and all before it, so equal ids can be reused. Requests are served in the
 * order of their timestamps (those of one time in the order of the file), as fast as the workers can. The size of a
 * block is not in the file: it is the power of two for which the counts of ids fit the lengths (the last block may be
 * partial or missing).
 *
 * A request goes to the worker that served the deepest of its blocks, since that one holds their pages, else to the one
 * with fewer tokens so far. Both workers work that out for themselves, from the same trace.
 */
#include "demo.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK_TOKENS_MIN  16u
#define BLOCK_TOKENS_MAX  4096u
#define REQUESTS_MAX      (1u << 20)
#define CHAT_BLOCK_TOKENS 64u

/* ---- growing arrays ---------------------------------------------------------------------------------------------- */

/* Requests and their blocks while they are gathered: blocks by offset, since their array moves. */
struct gathered {
    struct entry {
        uint64_t timestamp;
        size_t first_block;
        uint32_t input_length, output_length, n_blocks;
        size_t order;
    } * entries;
    size_t n, room;
    uint64_t *blocks;
    size_t n_blocks, blocks_room;
};

static void *grow(void *array, size_t item_bytes, size_t needed, size_t *room)
{
    size_t larger = *room > 0 ? *room : 1024;
    void *grown;

    if (needed <= *room)
        return array;
    while (larger < needed)
        larger *= 2;
    grown = realloc(array, larger * item_bytes);
    if (grown != NULL)
        *room = larger;
    return grown;
}

static bool add_entry(struct gathered *g, const struct entry *entry)
{
    struct entry *entries = grow(g->entries, sizeof(*entries), g->n + 1, &g->room);

    if (entries == NULL)
        return false;
    g->entries = entries;
    entries[g->n] = *entry;
    entries[g->n].order = g->n;
    g->n++;
    return true;
}

static bool add_block(struct gathered *g, uint64_t id)
{
    uint64_t *blocks = grow(g->blocks, sizeof(*blocks), g->n_blocks + 1, &g->blocks_room);

    if (blocks == NULL)
        return false;
    g->blocks = blocks;
    blocks[g->n_blocks++] = id;
    return true;
}

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

/* ---- what was gathered becomes a trace --------------------------------------------------------------------------- */

static int by_timestamp(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;

    if (x->timestamp != y->timestamp)
        return x->timestamp < y->timestamp ? -1 : 1;
    return x->order < y->order ? -1 : x->order > y->order;
}

static bool blocks_fit(const struct gathered *g, uint32_t block_tokens)
{
    for (size_t i = 0; i < g->n; i++) {
        uint32_t whole = g->entries[i].input_length / block_tokens;

        if (g->entries[i].n_blocks != whole &&
            g->entries[i].n_blocks != (g->entries[i].input_length + block_tokens - 1) / block_tokens)
            return false;
    }
    return true;
}

static uint32_t find_block_tokens(const struct gathered *g)
{
    for (uint32_t tokens = BLOCK_TOKENS_MIN; tokens <= BLOCK_TOKENS_MAX; tokens *= 2)
        if (blocks_fit(g, tokens))
            return tokens;
    return 0;
}

/* Takes over what was gathered. @return false: no memory; it is freed */
static bool make_trace(struct gathered *g, uint32_t block_tokens, struct demo_trace *ret_trace)
{
    struct demo_trace trace = {.requests = calloc(g->n, sizeof(*trace.requests)),
                               .n = g->n,
                               .block_tokens = block_tokens,
                               .memory = g->blocks};

    if (trace.requests == NULL)
        goto fail;
    qsort(g->entries, g->n, sizeof(*g->entries), by_timestamp);
    for (size_t i = 0; i < g->n; i++) {
        const struct entry *from = &g->entries[i];

        trace.requests[i] = (struct demo_request){.input_length = from->input_length,
                                                  .output_length = from->output_length,
                                                  .n_blocks = from->n_blocks,
                                                  .blocks = g->blocks + from->first_block};
        if (from->input_length + from->output_length > trace.longest)
            trace.longest = from->input_length + from->output_length;
    }
    if (!assign_workers(&trace, g->n_blocks))
        goto fail;
    free(g->entries);
    *ret_trace = trace;
    return true;

fail:
    free(trace.requests);
    free(g->entries);
    free(g->blocks);
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

/* ---- a trace file ------------------------------------------------------------------------------------------------ */

static bool take_length(const json_t *object, const char *name, json_int_t min, uint32_t *ret_length)
{
    const json_t *value = json_object_get(object, name);

    if (!json_is_integer(value) || json_integer_value(value) < min ||
        json_integer_value(value) > KVP_SEQUENCE_TOKENS_MAX / 2)
        return false;
    *ret_length = (uint32_t)json_integer_value(value);
    return true;
}

/* One line. @return NULL, or what is wrong with it */
static const char *take_line(const char *line, size_t bytes, struct gathered *g)
{
    json_t *object = json_loadb(line, bytes, 0, NULL);
    const json_t *timestamp = json_object_get(object, "timestamp"), *ids = json_object_get(object, "hash_ids");
    const char *wrong = NULL;
    struct entry entry = {.first_block = g->n_blocks};

    if (!json_is_object(object))
        wrong = "it is no JSON object";
    else if (!json_is_number(timestamp) || json_number_value(timestamp) < 0)
        wrong = "timestamp is no number from 0 on";
    else if (!take_length(object, "input_length", 1, &entry.input_length))
        wrong = "input_length is no number of tokens";
    else if (!take_length(object, "output_length", 0, &entry.output_length))
        wrong = "output_length is no number of tokens";
    else if (!json_is_array(ids) || json_array_size(ids) > entry.input_length)
        wrong = "hash_ids is no list of one id a block";
    for (size_t i = 0; wrong == NULL && i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);

        if (!json_is_integer(id) || json_integer_value(id) < 0)
            wrong = "hash_ids holds something else than numbers from 0 on";
        else if (!add_block(g, (uint64_t)json_integer_value(id)))
            wrong = "out of memory";
    }
    if (wrong == NULL) {
        entry.timestamp = (uint64_t)json_number_value(timestamp);
        entry.n_blocks = (uint32_t)json_array_size(ids);
        if (g->n == REQUESTS_MAX)
            wrong = "there are too many requests";
        else if (!add_entry(g, &entry))
            wrong = "out of memory";
    }
    json_decref(object);
    return wrong;
}

static bool take_lines(const char *path, FILE *file, struct gathered *g)
{
    const char *wrong = NULL;
    char *line = NULL;
    size_t room = 0, number = 0;
    ssize_t bytes;

    while (wrong == NULL && (bytes = getline(&line, &room, file)) >= 0) {
        number++;
        if (strspn(line, " \t\r\n") != (size_t)bytes)
            wrong = take_line(line, (size_t)bytes, g);
    }
    free(line);
    if (wrong != NULL)
        fprintf(stderr, "kvpool: trace %s, line %zu: %s\n", path, number, wrong);
    else if (ferror(file))
        fprintf(stderr, "kvpool: trace %s: %s\n", path, strerror(errno));
    else if (g->n == 0)
        fprintf(stderr, "kvpool: trace %s has no request\n", path);
    return wrong == NULL && !ferror(file) && g->n > 0;
}

bool demo_trace_read(const char *path, struct demo_trace *ret_trace)
{
    struct gathered g = {0};
    FILE *file = fopen(path, "r");
    uint32_t block_tokens;
    bool good;

    if (file == NULL) {
        fprintf(stderr, "kvpool: trace %s: %s\n", path, strerror(errno));
        return false;
    }
    good = take_lines(path, file, &g);
    fclose(file);
    block_tokens = good ? find_block_tokens(&g) : 0;
    if (good && block_tokens == 0)
        fprintf(stderr, "kvpool: trace %s: there is no block size by which hash_ids fit the input lengths\n", path);
    if (block_tokens == 0) {
        free(g.entries);
        free(g.blocks);
        return false;
    }
    good = make_trace(&g, block_tokens, ret_trace);
    if (!good)
        fprintf(stderr, "kvpool: trace %s: out of memory\n", path);
    return good;
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
static bool add_turn(struct gathered *g, uint32_t conversation, uint32_t turn_time, uint32_t input, uint32_t output)
{
    struct entry entry = {.timestamp = turn_time,
                          .first_block = g->n_blocks,
                          .input_length = input,
                          .output_length = output,
                          .n_blocks = (input + CHAT_BLOCK_TOKENS - 1) / CHAT_BLOCK_TOKENS};
    uint32_t prompt = conversation % CHAT_PROMPTS;

    for (uint32_t b = 0; b < entry.n_blocks; b++) {
        /* A partial last block is content of this turn alone: the next turn's block there is another. */
        bool partial = (b + 1) * CHAT_BLOCK_TOKENS > input;
        uint64_t id = b < CHAT_PROMPT_BLOCKS
                          ? prompt * CHAT_PROMPT_BLOCKS + b
                          : 1000 + ((uint64_t)conversation << 24 | b << 8 | (partial ? turn_time % 255 + 1 : 0));

        if (!add_block(g, id))
            return false;
    }
    return add_entry(g, &entry);
}

/* Conversations of three to six turns; each turn's prompt is all before it and a new question. */
static bool gather_chat(struct gathered *g)
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
                if (!add_turn(g, first + c, time++, lengths[c], output))
                    return false;
                lengths[c] += output;
            }
        }
    }
    return true;
}

bool demo_trace_chat(struct demo_trace *ret_trace)
{
    struct gathered g = {0};

    if (!gather_chat(&g)) {
        free(g.entries);
        free(g.blocks);
        return false;
    }
    return make_trace(&g, CHAT_BLOCK_TOKENS, ret_trace);
}
