/**
 * The one status enum of kvpool.
 *
 * Every function that can fail returns it, every reply carries it. The values are grouped by the largest thing that
 * is lost with the failure, so that a caller can choose a recovery from the number alone:
 *
 *     0          done
 *    -1 … -19    the call       nothing changed; mend the arguments, wait, or ask for less
 *   -20 … -29    the sequence   open it again
 *   -30 … -39    the session    open a session again; its sequences are gone, unless they were durable
 *   -40 … -49    the pool       its bytes are gone; make it again
 *   -50 … -59    the service    an operator must look
 *
 * KVP_STATUS_TABLE is the only place where a value, its text and its gRPC code stand; the name doubles as the label
 * in metrics. Plain C, no dependency: it is installed beside kvpool.h.
 */
#ifndef KVP_STATUS_H
#define KVP_STATUS_H

/* X(name, value, gRPC status code, text) */
#define KVP_STATUS_TABLE(X)                                                       \
    X(KVP_OK, 0, 0, "done")                                                       \
    X(KVP_EINVAL, -1, 3, "an argument is out of its range")                       \
    X(KVP_ENOENT, -2, 5, "no such thing")                                         \
    X(KVP_EEXIST, -3, 6, "it exists already")                                     \
    X(KVP_EPERM, -4, 7, "not allowed to this caller")                             \
    X(KVP_EBUSY, -5, 9, "it is in use; try again when it is not")                 \
    X(KVP_ENOPAGES, -6, 8, "the pool is out of pages")                            \
    X(KVP_ELIMIT, -7, 8, "a limit is reached")                                    \
    X(KVP_ENOMEM, -8, 8, "out of memory")                                         \
    X(KVP_EMISMATCH, -9, 9, "the state is not the one that the caller expects")   \
    X(KVP_ETIMEDOUT, -10, 4, "not done in time")                                  \
    X(KVP_EAGAIN, -11, 14, "not served at the moment; try again")                 \
    X(KVP_ENOSYS, -12, 12, "this version does not serve that call")               \
    X(KVP_ENODEV, -13, 9, "the device it needs is not here")                      \
    X(KVP_EDEVICE, -14, 13, "a device or driver call failed")                     \
    X(KVP_EPROTO, -15, 3, "the message can not be read")                          \
    X(KVP_ESTALE, -20, 5, "the handle's generation is not current")               \
    X(KVP_ESESSION, -30, 16, "the session is unknown or has ended")               \
    X(KVP_EDISCONNECTED, -31, 14, "the connection to the daemon is lost")         \
    X(KVP_ELOST, -40, 15, "the pool's memory is lost")                            \
    X(KVP_ECORRUPT, -50, 15, "the ledger does not pass its audit")                \
    X(KVP_EINTERNAL, -51, 13, "an internal fault")

enum kvp_status {
#define KVP_STATUS_ENUM(name, value, grpc, text) name = (value),
    KVP_STATUS_TABLE(KVP_STATUS_ENUM)
#undef KVP_STATUS_ENUM
};

/** The name of a status as it is written in the enum; "KVP_?" for a number that is none. Thread-safe. */
static inline const char *kvp_status_name(enum kvp_status status)
{
    switch (status) {
#define KVP_STATUS_NAME(name, value, grpc, text) \
    case name:                                   \
        return #name;
        KVP_STATUS_TABLE(KVP_STATUS_NAME)
#undef KVP_STATUS_NAME
    }
    return "KVP_?";
}

/** What a status means, in a few words. Thread-safe. */
static inline const char *kvp_status_text(enum kvp_status status)
{
    switch (status) {
#define KVP_STATUS_TEXT(name, value, grpc, text) \
    case name:                                   \
        return text;
        KVP_STATUS_TABLE(KVP_STATUS_TEXT)
#undef KVP_STATUS_TEXT
    }
    return "not a status of kvpool";
}

#endif
