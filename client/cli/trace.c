/**
 * Reading traces; see trace.h. A line is one JSON document by itself, so that a wrong one is named by its number.
 */
#include "trace.h"
#include "cli.h"
#include "kvp_limits.h"

#include <errno.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUESTS_MAX (1u << 20)
#define LENGTH_MAX   (KVP_SEQUENCE_TOKENS_MAX / 2) /* of a prompt, and of what is decoded behind it */

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

/* What is wrong with it, for the user. */
struct complaint {
    char text[160];
};

__attribute__((format(printf, 2, 3))) static bool complain(struct complaint *wrong, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(wrong->text, sizeof(wrong->text), format, args);
    va_end(args);
    return false;
}

static bool complain_of_value(struct complaint *wrong, const char *name, const json_t *value, const char *wanted)
{
    char *text = value != NULL ? json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;

    complain(wrong, "%s is %.40s, must be %s", name, text != NULL ? text : "missing", wanted);
    free(text);
    return false;
}

static bool take_length(const json_t *object, const char *name, json_int_t min, uint32_t *ret_length,
                        struct complaint *reterr_wrong)
{
    const json_t *value = json_object_get(object, name);
    char wanted[64];

    snprintf(wanted, sizeof(wanted), "a number of tokens from %d to %u", (int)min, LENGTH_MAX);
    if (!json_is_integer(value) || json_integer_value(value) < min || json_integer_value(value) > LENGTH_MAX)
        return complain_of_value(reterr_wrong, name, value, wanted);
    *ret_length = (uint32_t)json_integer_value(value);
    return true;
}

static bool take_ids(const json_t *object, struct trace *trace, struct trace_request *request,
                     struct complaint *reterr_wrong)
{
    const json_t *ids = json_object_get(object, "hash_ids");
    char name[40];

    if (!json_is_array(ids))
        return complain_of_value(reterr_wrong, "hash_ids", ids, "a list of one id a block");
    if (json_array_size(ids) > request->input_length)
        return complain(reterr_wrong, "hash_ids has %zu ids, more than the %u tokens of input_length",
                        json_array_size(ids), request->input_length);
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);

        if (!json_is_integer(id) || json_integer_value(id) < 0) {
            snprintf(name, sizeof(name), "hash_ids[%zu]", i);
            return complain_of_value(reterr_wrong, name, id, "a number from 0 to 9223372036854775807");
        }
        if (!trace_add_block(trace, (uint64_t)json_integer_value(id)))
            return complain(reterr_wrong, "out of memory");
    }
    request->n_blocks = (uint32_t)json_array_size(ids);
    return true;
}

static bool take_request(const json_t *object, size_t line, struct trace *trace, struct complaint *reterr_wrong)
{
    const json_t *timestamp = json_object_get(object, "timestamp");
    struct trace_request request = {.first_block = trace->n_blocks, .line = line};

    if (!json_is_number(timestamp) || json_number_value(timestamp) < 0)
        return complain_of_value(reterr_wrong, "timestamp", timestamp, "a number from 0 on");
    request.timestamp = json_is_integer(timestamp) ? (long double)json_integer_value(timestamp)
                                                   : (long double)json_real_value(timestamp);
    if (!take_length(object, "input_length", 1, &request.input_length, reterr_wrong) ||
        !take_length(object, "output_length", 0, &request.output_length, reterr_wrong) ||
        !take_ids(object, trace, &request, reterr_wrong))
        return false;
    if (trace->n == REQUESTS_MAX)
        return complain(reterr_wrong, "it is one more than the %u requests that a trace may have", REQUESTS_MAX);
    return trace_add_request(trace, &request) || complain(reterr_wrong, "out of memory");
}

static bool take_line(const char *text, size_t bytes, size_t line, struct trace *trace, struct complaint *reterr_wrong)
{
    json_error_t error;
    json_t *object = json_loadb(text, bytes, 0, &error);
    bool good;

    if (object == NULL)
        return complain(reterr_wrong, "it is no JSON object: %s", error.text);
    good = json_is_object(object) ? take_request(object, line, trace, reterr_wrong)
                                  : complain(reterr_wrong, "it is no JSON object");
    json_decref(object);
    return good;
}

/* ---- the file ---------------------------------------------------------------------------------------------------- */

static bool take_lines(const char *path, FILE *file, struct trace *trace)
{
    struct complaint wrong;
    char *text = NULL;
    size_t room = 0, line = 0;
    ssize_t bytes;
    bool good = true;

    while (good && (bytes = cli_getdelim(&text, &room, '\n', file)) >= 0) {
        line++;
        if (strspn(text, " \t\r\n") != (size_t)bytes)
            good = take_line(text, (size_t)bytes, line, trace, &wrong);
    }
    if (good && !feof(file) && !ferror(file)) {
        line++;
        good = errno == EFBIG ? complain(&wrong, "it has more than %u bytes", CLI_READ_MAX)
                              : complain(&wrong, "out of memory");
    }
    free(text);
    if (!good)
        fprintf(stderr, "kvpool: trace %s, line %zu: %s\n", path, line, wrong.text);
    else if (ferror(file))
        fprintf(stderr, "kvpool: trace %s: %s\n", path, strerror(errno));
    else if (trace->n == 0)
        fprintf(stderr, "kvpool: trace %s has no request\n", path);
    return good && !ferror(file) && trace->n > 0;
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
