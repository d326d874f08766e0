/**
 * Registered buffers, as much of them as a daemon needs to go on with them after another: whose, how large, on what
 * device, and the handle of those that came by one. The others' memory is a parked fd.
 *
 * One table for all sessions, searched from its start: registering happens a few times in a process's life. A record
 * counts while its session has the generation that it names, so that the end of a session costs nothing here.
 */
#include "internal.h"

#include <string.h>

static bool in_use(const struct kvp_ledger *ledger, const struct block_buffer *buffer)
{
    const struct block_session *session;
    struct kvp_session_id id = {buffer->session_slot, buffer->session_generation};
    return find_session(ledger, id, &session) == KVP_OK;
}

static const struct block_buffer *find(const struct kvp_ledger *ledger, struct kvp_session_id session, uint32_t number)
{
    const struct block_buffer *buffers = buffers_of(ledger);
    for (uint32_t i = 0; i < KVP_BUFFERS_ALL_MAX; i++) {
        if (buffers[i].session_slot == session.slot && buffers[i].session_generation == session.generation &&
            buffers[i].number == number)
            return &buffers[i];
    }
    return NULL;
}

enum kvp_status kvp_buffer_put(struct kvp_ledger *ledger, const struct kvp_buffer_view *buffer)
{
    const struct block_buffer *records = buffers_of(ledger);
    const struct block_session *session;
    uint64_t device[8] = {0}, ipc[8];
    uint32_t i = 0;
    if (buffer->number == 0 || buffer->number > KVP_BUFFERS_MAX ||
        memchr(buffer->device, 0, sizeof(buffer->device)) == NULL)
        return KVP_EINVAL;
    TRY(find_session(ledger, buffer->session, &session));
    if (find(ledger, buffer->session, buffer->number) != NULL)
        return KVP_EEXIST;
    while (i < KVP_BUFFERS_ALL_MAX && in_use(ledger, &records[i]))
        i++;
    if (i == KVP_BUFFERS_ALL_MAX)
        return KVP_ELIMIT;
    TRY(txn_room(ledger, ROOM_SMALL));
    memcpy(device, buffer->device, strlen(buffer->device));
    memcpy(ipc, buffer->ipc, sizeof(ipc));
    const struct block_buffer *record = &records[i];
    put32(ledger, &record->session_slot, buffer->session.slot);
    put32(ledger, &record->session_generation, buffer->session.generation);
    put32(ledger, &record->number, buffer->number);
    put32(ledger, &record->has_ipc, buffer->has_ipc);
    put64(ledger, &record->bytes, buffer->bytes);
    put64(ledger, &record->offset, buffer->offset);
    for (int word = 0; word < 8; word++) {
        put64(ledger, &record->device[word], device[word]);
        put64(ledger, &record->ipc[word], ipc[word]);
    }
    return KVP_OK;
}

enum kvp_status kvp_buffer_remove(struct kvp_ledger *ledger, struct kvp_session_id session, uint32_t number)
{
    const struct block_session *record;
    TRY(find_session(ledger, session, &record));
    const struct block_buffer *buffer = find(ledger, session, number);
    if (buffer == NULL)
        return KVP_ENOENT;
    TRY(txn_room(ledger, ROOM_SMALL));
    put32(ledger, &buffer->session_generation, 0);
    return KVP_OK;
}

static void view_of(const struct block_buffer *record, struct kvp_buffer_view *ret_view)
{
    *ret_view = (struct kvp_buffer_view){
        .session = {record->session_slot, record->session_generation},
        .number = record->number,
        .bytes = record->bytes,
        .offset = record->offset,
        .has_ipc = record->has_ipc != 0,
    };
    memcpy(ret_view->device, record->device, sizeof(ret_view->device) - 1);
    memcpy(ret_view->ipc, record->ipc, sizeof(ret_view->ipc));
}

enum kvp_status kvp_buffer_get(const struct kvp_ledger *ledger, struct kvp_session_id session, uint32_t number,
                               struct kvp_buffer_view *ret_view)
{
    const struct block_session *record;
    TRY(find_session(ledger, session, &record));
    const struct block_buffer *buffer = find(ledger, session, number);
    if (buffer == NULL)
        return KVP_ENOENT;
    view_of(buffer, ret_view);
    return KVP_OK;
}

enum kvp_status kvp_buffer_at(const struct kvp_ledger *ledger, uint32_t index, struct kvp_buffer_view *ret_view)
{
    if (index >= KVP_BUFFERS_ALL_MAX || !in_use(ledger, &buffers_of(ledger)[index]))
        return KVP_ENOENT;
    view_of(&buffers_of(ledger)[index], ret_view);
    return KVP_OK;
}
