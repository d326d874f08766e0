/**
 * What the door has to say. A hostile or broken client must not be able to fill the journal: a few lines in a window of
 * time, then a count of what was left out. gRPC's own error lines come from any thread: the latest waits in one slot
 * for the loop.
 */
#include "door.h"

#include <grpc/support/log.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <syslog.h>

#define WINDOW_MS       10000
#define WINDOW_LINES    10
#define LINE_BYTES_MAX  512

static pthread_mutex_t slot_lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    struct kvp_rpc *rpc; /* NULL: nobody listens */
    char line[LINE_BYTES_MAX];
} slot;

void kvp_rpc_log(struct kvp_rpc *rpc, int level, const char *format, ...)
{
    struct kvp_rpc_log_window *window = &rpc->log_window;
    uint64_t now_ms = uv_now(rpc->loop);
    char line[LINE_BYTES_MAX];
    va_list args;

    if (rpc->config.log == NULL)
        return;
    if (now_ms - window->from_ms >= WINDOW_MS) {
        if (window->left_out > 0) {
            snprintf(line, sizeof(line), "grpc: %u lines were left out", window->left_out);
            rpc->config.log(rpc->config.ctx, LOG_WARNING, line);
        }
        *window = (struct kvp_rpc_log_window){.from_ms = now_ms};
    }
    if (window->lines >= WINDOW_LINES) {
        window->left_out++;
        return;
    }
    window->lines++;
    va_start(args, format);
    vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    rpc->config.log(rpc->config.ctx, level, line);
}

static void from_grpc(gpr_log_func_args *args)
{
    if (args->severity < GPR_LOG_SEVERITY_ERROR)
        return;
    pthread_mutex_lock(&slot_lock);
    if (slot.rpc != NULL) {
        snprintf(slot.line, sizeof(slot.line), "%s", args->message);
        uv_async_send(&slot.rpc->async);
    }
    pthread_mutex_unlock(&slot_lock);
}

void kvp_rpc_log_attach(struct kvp_rpc *rpc)
{
    pthread_mutex_lock(&slot_lock);
    slot.rpc = rpc;
    slot.line[0] = 0;
    pthread_mutex_unlock(&slot_lock);
    gpr_set_log_function(from_grpc);
    gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);
}

void kvp_rpc_log_detach(void)
{
    gpr_set_log_function(NULL); /* gRPC's default again */
    pthread_mutex_lock(&slot_lock);
    slot.rpc = NULL;
    pthread_mutex_unlock(&slot_lock);
}

void kvp_rpc_log_flush(struct kvp_rpc *rpc)
{
    char line[LINE_BYTES_MAX];

    pthread_mutex_lock(&slot_lock);
    memcpy(line, slot.line, sizeof(line));
    slot.line[0] = 0;
    pthread_mutex_unlock(&slot_lock);
    if (line[0] != 0)
        kvp_rpc_log(rpc, LOG_WARNING, "grpc: %s", line);
}
