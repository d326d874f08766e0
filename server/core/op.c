/**
 * Calls in hand: answering, waiting, running again. See op.h for the life of an op.
 *
 * Invariant: a call is answered once. After core_answer, or a handler's refusal, neither the call nor its op is
 * touched.
 */
#include "op.h"

#include "kill_point.h"

#include <stdio.h>

/* ---- answers ----------------------------------------------------------------------------------------------------- */

static void op_unlink(struct kvp_core *core, struct op *op)
{
    if (op->prev != NULL)
        op->prev->next = op->next;
    else
        core->ops = op->next;
    if (op->next != NULL)
        op->next->prev = op->prev;
    core->n_ops--;
}

/* Its things go with it, unless they were given to someone. */
static void op_free(struct kvp_core *core, struct op *op)
{
    if (op->undo != NULL)
        op->undo(core, op);
    for (unsigned i = 0; i < op->n_things; i++)
        core->act->thing_drop(core->ctx, op->things[i].thing);
    if (core->pool_maker == op) {
        core->pool_maker = NULL;
        core_wake(core, WAIT_MAKER, 0);
    }
    op_unlink(core, op);
    op->call->op = NULL;
    free(op->own);
    free(op);
}

static void answer(struct kvp_core *core, struct kvp_call *call, enum kvp_status status, const ProtobufCMessage *reply,
                   const struct kvp_thing *things, unsigned n_things)
{
    if (call->op != NULL)
        op_free(core, call->op);
    core->counts.calls++;
    core->counts.calls_failed += status != KVP_OK;
    core->act->reply(core->ctx, call, status, reply, things, n_things);
}

enum kvp_status core_answer(struct kvp_core *core, struct turn *turn, const ProtobufCMessage *reply,
                            const struct kvp_thing *things, unsigned n_things)
{
    answer(core, turn->call, KVP_OK, reply, things, n_things);
    turn->call = NULL;
    turn->op = NULL;
    return KVP_OK;
}

static void answer_error(struct kvp_core *core, struct kvp_call *call, enum kvp_status status)
{
    Kvpool__V1__Error error = KVPOOL__V1__ERROR__INIT;
    error.status = status;
    error.message = core->error_text[0] != '\0' ? core->error_text : (char *)kvp_status_text(status);
    error.missing = core->error_missing;
    answer(core, call, status, &error.base, NULL, 0);
}

enum kvp_status core_refuse(struct kvp_core *core, enum kvp_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(core->error_text, sizeof(core->error_text), format, args);
    va_end(args);
    return status;
}

enum kvp_status core_refuse_plain(struct kvp_core *core, enum kvp_status status, const char *what)
{
    return core_refuse(core, status, "%s: %s", what, kvp_status_text(status));
}

/* ---- waiting ----------------------------------------------------------------------------------------------------- */

enum kvp_status core_op(struct kvp_core *core, struct turn *turn, struct op **ret_op)
{
    if (turn->op == NULL) {
        struct op *op = calloc(1, sizeof(*op));
        if (op == NULL)
            return core_refuse(core, KVP_ENOMEM, "no memory for a call that waits");
        op->call = turn->call;
        op->serial = ++core->op_serial;
        op->next = core->ops;
        if (core->ops != NULL)
            core->ops->prev = op;
        core->ops = op;
        core->n_ops++;
        turn->op = op;
        turn->call->op = op;
        if (turn->call->deadline_ms != 0)
            core_due(core, turn->call->deadline_ms);
    }
    *ret_op = turn->op;
    return KVP_OK;
}

enum kvp_status core_wait(struct kvp_core *core, struct turn *turn, enum wait_for wait, uint64_t key)
{
    struct op *op = NULL;
    TRY(core_op(core, turn, &op));
    op->wait = wait;
    op->key = key;
    op->ready = false;
    return KVP_WAIT;
}

void core_wake(struct kvp_core *core, enum wait_for wait, uint64_t key)
{
    for (struct op *op = core->ops; op != NULL; op = op->next) {
        if (op->wait == wait && op->key == key)
            op->ready = true;
    }
}

void core_ops_executor_gone(struct kvp_core *core, uint32_t executor, const char *why)
{
    for (struct op *op = core->ops; op != NULL; op = op->next) {
        if (op->wait != WAIT_REPLY || op->executor != executor)
            continue;
        op->result = KVP_EDEVICE;
        snprintf(op->text, sizeof(op->text), "%s", why);
        op->ready = true;
    }
}

struct op *core_op_by_serial(struct kvp_core *core, uint64_t serial)
{
    for (struct op *op = core->ops; op != NULL; op = op->next) {
        if (op->serial == serial)
            return op;
    }
    return NULL;
}

/* ---- running ----------------------------------------------------------------------------------------------------- */

static void run(struct kvp_core *core, struct kvp_call *call)
{
    struct turn turn = {.call = call, .op = call->op, .method = call->message.method, .body = call->message.body};
    core->error_text[0] = '\0';
    core->error_missing = 0;
    handler *handle = core_handler(turn.method);
    enum kvp_status status;
    if (handle == NULL)
        status = core_refuse(core, KVP_ENOSYS, "method %u is not served", turn.method);
    else if (core->adopting != ADOPT_DONE)
        status = core_wait(core, &turn, WAIT_ADOPT, 0);
    else
        status = core_turn_begin(core, &turn);
    if (status == KVP_OK)
        status = handle(core, &turn);
    CORE_ASSERT(!core->ledger->in_txn);
    if (status != KVP_OK && status != KVP_WAIT)
        answer_error(core, call, status);
    core_alloc_reset(core);
}

void core_ops_run(struct kvp_core *core)
{
    struct op *op = core->ops;
    while (op != NULL) {
        if (!op->ready) {
            op = op->next;
            continue;
        }
        op->ready = false;
        op->wait = WAIT_NONE;
        run(core, op->call);
        op = core->ops; /* any op may be gone now */
    }
}

void kvp_core_call(struct kvp_core *core, struct kvp_call *call)
{
    call->op = NULL;
    if (core->draining) {
        core->error_missing = 0;
        core_refuse(core, KVP_EAGAIN, "the daemon is shutting down");
        answer_error(core, call, KVP_EAGAIN);
    } else {
        run(core, call);
    }
    core_settle(core);
}

void kvp_core_call_gone(struct kvp_core *core, struct kvp_call *call)
{
    if (call->op != NULL)
        op_free(core, call->op);
    core_settle(core);
}

void core_ops_tick(struct kvp_core *core)
{
    struct op *next;
    for (struct op *op = core->ops; op != NULL; op = next) {
        next = op->next;
        uint64_t deadline = op->call->deadline_ms;
        if (deadline == 0)
            continue;
        if (deadline > core->now_ms) {
            core_due(core, deadline);
            continue;
        }
        core->error_missing = 0;
        core_refuse(core, KVP_ETIMEDOUT, "the call's deadline passed while it waited");
        answer_error(core, op->call, KVP_ETIMEDOUT);
    }
}

void core_ops_drop(struct kvp_core *core)
{
    while (core->ops != NULL) {
        struct op *op = core->ops;
        op->undo = NULL;
        op->n_things = 0;
        op_free(core, op);
    }
}

/* ---- things that an op asks for ---------------------------------------------------------------------------------- */

static void await_thing(struct op *op, struct kvp_thing thing)
{
    CORE_ASSERT(op->n_things < sizeof(op->things) / sizeof(op->things[0]));
    op->things[op->n_things++] = (struct op_thing){.thing = thing};
    op->things_awaited++;
}

void core_op_make(struct kvp_core *core, struct op *op, struct kvp_thing thing, uint64_t bytes)
{
    await_thing(op, thing);
    core->act->thing_make(core->ctx, thing, bytes);
}

void core_op_keep(struct kvp_core *core, struct op *op, struct kvp_thing thing, struct kvp_message *from,
                  unsigned index)
{
    await_thing(op, thing);
    core->act->thing_keep(core->ctx, thing, from, index);
}

static struct op_thing *find_thing(struct op *op, struct kvp_thing thing)
{
    for (unsigned i = 0; i < op->n_things; i++) {
        struct kvp_thing *own = &op->things[i].thing;
        if (own->kind == thing.kind && own->a == thing.a && own->b == thing.b)
            return &op->things[i];
    }
    return NULL;
}

const struct op_thing *core_op_thing(const struct op *op, struct kvp_thing thing)
{
    struct op_thing *found = find_thing((struct op *)op, thing);
    return found != NULL && found->ready ? found : NULL;
}

bool core_op_thing_ready(struct kvp_core *core, struct kvp_thing thing, enum kvp_status status, void *address,
                         uint64_t bytes)
{
    for (struct op *op = core->ops; op != NULL; op = op->next) {
        struct op_thing *asked = find_thing(op, thing);
        if (asked == NULL || asked->ready)
            continue;
        asked->ready = true;
        asked->address = address;
        asked->bytes = bytes;
        op->things_awaited--;
        if (status != KVP_OK) {
            op->result = status;
            snprintf(op->text, sizeof(op->text), "the memory object %c.%u.%u could not be made or kept", thing.kind,
                     thing.a, thing.b);
        }
        if (op->things_awaited == 0)
            core_wake(core, WAIT_THING, op->serial);
        return true;
    }
    return false;
}

/* ---- transactions ------------------------------------------------------------------------------------------------ */

enum kvp_status core_abort(struct kvp_core *core, enum kvp_status status)
{
    kvp_txn_abort(core->ledger);
    return status;
}

enum kvp_status core_abort_taking(struct kvp_core *core, struct turn *turn, struct pool_state *pool,
                                  enum kvp_status status)
{
    uint32_t parked = 0;
    kvp_txn_abort(core->ledger);
    if (status != KVP_EAGAIN)
        return status;
    kvp_txn_begin(core->ledger);
    if (kvp_cache_park(core->ledger, pool->id, &parked) != KVP_OK || parked == 0)
        return core_abort(core, status);
    kvp_txn_commit(core->ledger);
    pool->reclaim_due = true;
    core_due(core, core->now_ms);
    return core_wait(core, turn, WAIT_RECLAIM, pool->id.slot);
}

enum kvp_status core_commit(struct kvp_core *core, struct turn *turn, uint64_t value0, uint64_t value1)
{
    if (turn->has_session && turn->call_id != 0) {
        struct kvp_outcome outcome = {
            .call_id = turn->call_id, .method = turn->method, .status = KVP_OK, .values = {value0, value1}};
        enum kvp_status status = kvp_outcome_put(core->ledger, turn->session.id, &outcome);
        if (status != KVP_OK) {
            core_refuse_plain(core, status, "the outcome of the call");
            return core_abort(core, status);
        }
    }
    kvp_txn_commit(core->ledger);
    kvp_kill_point(KVP_KILL_AFTER_COMMIT);
    return KVP_OK;
}
