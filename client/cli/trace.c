/**
 * Reading traces; see trace.h. A line is one JSON document by itself, so that a wrong one is named by its number.
 */
#include "trace.h"

#include "kvp_limits.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUESTS_MAX (1u << 20)

/* ---- growing arrays ---------------------------------------------------------------------------------------------- */

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

bool trace_add_block(struct trace *trace, uint64_t id)
{
    uint64_t *blocks = grow(trace->blocks, sizeof(*blocks), trace->n_blocks + 1, &trace->blocks_room);

    if (blocks == NULL)
        return false;
    trace->blocks = blocks;
    blocks[trace->n_blocks++] = id;
    return true;
}

bool trace_add_request(struct trace *trace, const struct trace_request *request)
{
    struct trace_request *requests = grow(trace->requests, sizeof(*requests), trace->n + 1, &trace->requests_room);

    if (requests == NULL)
        return false;
    trace->requests = requests;
    requests[trace->n++] = *request;
    return true;
}

void trace_free(struct trace *trace)
{
    free(trace->requests);
    free(trace->blocks);
    *trace = (struct trace){0};
}

/* ---- a line ------------------------------------------------------------------------------------------------------ */

static bool take_length(const json_t *object, const char *name, json_int_t min, uint32_t *ret_length)
{
    const json_t *value = json_object_get(object, name);

    if (!json_is_integer(value) || json_integer_value(value) < min ||
        json_integer_value(value) > KVP_SEQUENCE_TOKENS_MAX / 2)
        return false;
    *ret_length = (uint32_t)json_integer_value(value);
    return true;
}

/* @return NULL, or what is wrong with it */
static const char *take_line(const char *text, size_t bytes, size_t line, struct trace *trace)
{
    json_t *object = json_loadb(text, bytes, 0, NULL);
    const json_t *timestamp = json_object_get(object, "timestamp"), *ids = json_object_get(object, "hash_ids");
    const char *wrong = NULL;
    struct trace_request request = {.first_block = trace->n_blocks, .line = line};

    if (!json_is_object(object))
        wrong = "it is no JSON object";
    else if (!json_is_number(timestamp) || json_number_value(timestamp) < 0)
        wrong = "timestamp is no number from 0 on";
    else if (!take_length(object, "input_length", 1, &request.input_length))
        wrong = "input_length is no number of tokens";
    else if (!take_length(object, "output_length", 0, &request.output_length))
        wrong = "output_length is no number of tokens";
    else if (!json_is_array(ids) || json_array_size(ids) > request.input_length)
        wrong = "hash_ids is no list of one id a block";
    for (size_t i = 0; wrong == NULL && i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);

        if (!json_is_integer(id) || json_integer_value(id) < 0)
            wrong = "hash_ids holds something else than numbers from 0 on";
        else if (!trace_add_block(trace, (uint64_t)json_integer_value(id)))
            wrong = "out of memory";
    }
    if (wrong == NULL) {
        request.timestamp = json_number_value(timestamp);
        request.n_blocks = (uint32_t)json_array_size(ids);
        if (trace->n == REQUESTS_MAX)
            wrong = "there are too many requests";
        else if (!trace_add_request(trace, &request))
            wrong = "out of memory";
    }
    json_decref(object);
    return wrong;
}

/* ---- the file ---------------------------------------------------------------------------------------------------- */

static bool take_lines(const char *path, FILE *file, struct trace *trace)
{
    const char *wrong = NULL;
    char *text = NULL;
    size_t room = 0, line = 0;
    ssize_t bytes;

    while (wrong == NULL && (bytes = getline(&text, &room, file)) >= 0) {
        line++;
        if (strspn(text, " \t\r\n") != (size_t)bytes)
            wrong = take_line(text, (size_t)bytes, line, trace);
    }
    free(text);
    if (wrong != NULL)
        fprintf(stderr, "kvpool: trace %s, line %zu: %s\n", path, line, wrong);
    else if (ferror(file))
        fprintf(stderr, "kvpool: trace %s: %s\n", path, strerror(errno));
    else if (trace->n == 0)
        fprintf(stderr, "kvpool: trace %s has no request\n", path);
    return wrong == NULL && !ferror(file) && trace->n > 0;
}

static int by_timestamp(const void *a, const void *b)
{
    const struct trace_request *x = a, *y = b;

    if (x->timestamp != y->timestamp)
        return x->timestamp < y->timestamp ? -1 : 1;
    return x->line < y->line ? -1 : x->line > y->line;
}

static bool blocks_fit(const struct trace *trace, uint32_t block_tokens)
{
    for (size_t i = 0; i < trace->n; i++) {
        const struct trace_request *r = &trace->requests[i];

        if (r->n_blocks != r->input_length / block_tokens &&
            r->n_blocks != (r->input_length + block_tokens - 1) / block_tokens)
            return false;
    }
    return true;
}

/* Several may fit a short trace: first those that traces have. */
static uint32_t find_block_tokens(const struct trace *trace)
{
    static const uint32_t sizes[] = {512, 64, 16, 32, 128, 256, 1024, 2048, 4096};

    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        if (blocks_fit(trace, sizes[i]))
            return sizes[i];
    return 0;
}

bool trace_read(const char *path, struct trace *ret_trace)
{
    struct trace trace = {0};
    FILE *file = fopen(path, "r");
    bool good;

    if (file == NULL) {
        fprintf(stderr, "kvpool: trace %s: %s\n", path, strerror(errno));
        return false;
    }
    good = take_lines(path, file, &trace);
    fclose(file);
    if (!good) {
        trace_free(&trace);
        return false;
    }
    qsort(trace.requests, trace.n, sizeof(*trace.requests), by_timestamp);
    trace.block_tokens = find_block_tokens(&trace);
    *ret_trace = trace;
    return true;
}
