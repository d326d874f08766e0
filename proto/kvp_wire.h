/**
 * One message on a session socket: envelope, protobuf body, fds (kvp_abi.h has the envelope). Used by both ends, and
 * between daemon and executor.
 *
 * A body that does not fit a datagram travels in a sealed memfd, which is then the first of the message's fds; the
 * receiver never sees that fd. Nothing here blocks unless the socket does. Thread-safe over different frames.
 */
#ifndef KVP_WIRE_H
#define KVP_WIRE_H

#include "kvp_abi.h"
#include "kvp_limits.h"
#include "kvp_status.h"

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>

/* ---- unpacking under a cap: a small message can ask for a large structure ---------------------------------------- */

struct kvp_wire_budget {
    ProtobufCAllocator allocator; /* hand &allocator to protobuf-c; it lives as long as what it unpacked */
    size_t left;                  /* bytes that may still be allocated */
    bool refused;                 /* an allocation was refused */
};
void kvp_wire_budget_init(struct kvp_wire_budget *budget, size_t bytes);

/**
 * Unpack a body; free it by protobuf_c_message_free_unpacked(body, &budget->allocator).
 * @retval KVP_EPROTO  it is not a message of that type, nests too deep to be one, or holds a string that is not UTF-8 or
 *                     has a NUL in it
 * @retval KVP_ENOMEM  it would take more than the budget
 */
enum kvp_status kvp_wire_unpack(const ProtobufCMessageDescriptor *type, const void *bytes, size_t n,
                                struct kvp_wire_budget *budget, ProtobufCMessage **ret_body);

/* ---- sending ----------------------------------------------------------------------------------------------------- */

/* A message packed and ready: kept by who must try again when the socket is full. */
struct kvp_wire_packet {
    void *bytes; /* envelope and body */
    size_t n;
    int memfd; /* the body's, or -1 */
};

/** @param body  NULL: an empty body. @retval KVP_ELIMIT over KVP_MESSAGE_BYTES_MAX @retval KVP_ENOMEM */
enum kvp_status kvp_wire_pack(uint16_t method, uint16_t flags, enum kvp_status status, uint64_t tag,
                              const ProtobufCMessage *body, struct kvp_wire_packet *ret_packet);
/**
 * @param fds  [n_fds], at most KVP_MESSAGE_FDS_MAX; they stay the caller's
 * @retval KVP_EAGAIN        the socket is full; try the same packet again
 * @retval KVP_EDISCONNECTED the peer is gone
 */
enum kvp_status kvp_wire_send(int socket, const struct kvp_wire_packet *packet, const int *fds, unsigned n_fds);
void kvp_wire_packet_free(struct kvp_wire_packet *packet);

/* ---- receiving --------------------------------------------------------------------------------------------------- */

struct kvp_wire_frame {
    struct kvp_envelope envelope;
    const void *bytes; /* the body, envelope.bytes of it; in `buffer` or mapped */
    int fds[KVP_MESSAGE_FDS_MAX];
    unsigned n_fds;
    /* private */
    void *mapped;
    size_t mapped_bytes;
    unsigned char buffer[KVP_DATAGRAM_BYTES_MAX];
};

/**
 * Read the next message, or with `peek` look at it and leave it there (its fds are installed anew by each look).
 * Release the frame when done with it; fds taken over are set to -1 in it first.
 * @retval KVP_EAGAIN        none is there
 * @retval KVP_EDISCONNECTED end-of-file
 * @retval KVP_EPROTO        one is there and it can not be read (bad magic, sizes, memfd not sealed, too many fds); with
 *                           `peek` it is still to be consumed. The envelope is valid if its magic is.
 */
enum kvp_status kvp_wire_receive(int socket, bool peek, struct kvp_wire_frame *ret_frame);
void kvp_wire_release(struct kvp_wire_frame *frame);
/** Take the message that was peeked off the socket, fds and all. */
enum kvp_status kvp_wire_consume(int socket);

#endif
