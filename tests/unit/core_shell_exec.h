/**
 * The executors' side of the test shell: what the actions that concern executors do. See core_shell.h.
 */
#ifndef KVP_CORE_SHELL_EXEC_H
#define KVP_CORE_SHELL_EXEC_H

#include "core_shell.h"

void shell_exec_start(void *ctx, uint32_t executor, const char *device);
void shell_exec_send(void *ctx, uint32_t executor, uint16_t method, uint64_t tag, const ProtobufCMessage *body,
                     const struct kvp_thing *things, unsigned n_things);
void shell_exec_stop(void *ctx, uint32_t executor);
/* It forgets all that it has. */
void shell_exec_clear(struct shell_executor *executor);

void shell_memory_release(struct shell_memory *memory);
struct shell_thing *shell_find_thing(struct shell *shell, struct kvp_thing thing);
void shell_event(struct shell *shell, const struct shell_event *event);

#endif
