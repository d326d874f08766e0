/**
 * Messages on a session socket; see kvp_wire.h.
 *
 * What a peer can send is taken to be hostile: lengths are checked against what arrived, a body's memfd must be sealed
 * against writing and shrinking (so that it can be mapped without a fault later), and unpacking runs under a budget.
 * protobuf-c checks neither UTF-8 nor NUL in strings, so that is done here for every string of the message, and in the
 * message as it came: unpacked, a string ends at its first NUL and what came behind it is forgotten.
 */
#include "kvp_wire.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define SEALS_NEEDED (F_SEAL_SHRINK | F_SEAL_WRITE)

/* ---- budget ------------------------------------------------------------------------------------------------------ */

static void *budget_alloc(void *arg, size_t n)
{
    struct kvp_wire_budget *budget = arg;
    void *memory;

    memory = n <= budget->left ? malloc(n) : NULL;
    if (memory == NULL)
        budget->refused = true;
    else
        budget->left -= n;
    return memory;
}

static void budget_free(void *arg, void *memory)
{
    (void)arg;
    free(memory);
}

void kvp_wire_budget_init(struct kvp_wire_budget *budget, size_t bytes)
{
    budget->allocator = (ProtobufCAllocator){.alloc = budget_alloc, .free = budget_free, .allocator_data = budget};
    budget->left = bytes;
    budget->refused = false;
}

/* ---- strings: RFC 3629, and no NUL ------------------------------------------------------------------------------- */

static bool text_valid(const unsigned char *s, size_t n)
{
    for (const unsigned char *end = s + n; s < end;) {
        unsigned tail = *s < 0x80                   ? 0
                        : *s >= 0xc2 && *s <= 0xdf  ? 1
                        : (*s & 0xf0) == 0xe0       ? 2
                        : *s >= 0xf0 && *s <= 0xf4  ? 3
                                                    : 4;

        if (*s == 0 || tail == 4 || (size_t)(end - s) <= tail)
            return false;
        if ((*s == 0xe0 && s[1] < 0xa0) || (*s == 0xed && s[1] > 0x9f) || (*s == 0xf0 && s[1] < 0x90) ||
            (*s == 0xf4 && s[1] > 0x8f))
            return false;
        for (s++; tail > 0; tail--, s++)
            if ((*s & 0xc0) != 0x80)
                return false;
    }
    return true;
}

enum wire_type { WIRE_VARINT = 0, WIRE_64BIT = 1, WIRE_LENGTH = 2, WIRE_32BIT = 5 };

static bool take_varint(const unsigned char **at, const unsigned char *end, uint64_t *ret_value)
{
    uint64_t value = 0;

    for (unsigned shift = 0; shift < 64 && *at < end; shift += 7) {
        unsigned char byte = *(*at)++;

        value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) {
            *ret_value = value;
            return true;
        }
    }
    return false;
}

/* Recurses into submessages: no message of kvpool.v1 contains itself, so the depth is that of the .proto file. */
static bool strings_valid(const ProtobufCMessageDescriptor *type, const unsigned char *at, size_t n)
{
    const unsigned char *end = at + n;

    while (at < end) {
        const ProtobufCFieldDescriptor *field;
        uint64_t key, bytes;

        if (!take_varint(&at, end, &key))
            return false;
        switch (key & 7) {
        case WIRE_VARINT:
            if (!take_varint(&at, end, &bytes))
                return false;
            continue;
        case WIRE_64BIT:
            bytes = 8;
            break;
        case WIRE_LENGTH:
            if (!take_varint(&at, end, &bytes))
                return false;
            break;
        case WIRE_32BIT:
            bytes = 4;
            break;
        default:
            return false;
        }
        if (bytes > (size_t)(end - at))
            return false;
        field = (key & 7) == WIRE_LENGTH && key >> 3 <= UINT32_MAX
                    ? protobuf_c_message_descriptor_get_field(type, (unsigned)(key >> 3))
                    : NULL;
        if (field != NULL && field->type == PROTOBUF_C_TYPE_STRING && !text_valid(at, bytes))
            return false;
        if (field != NULL && field->type == PROTOBUF_C_TYPE_MESSAGE && !strings_valid(field->descriptor, at, bytes))
            return false;
        at += bytes;
    }
    return true;
}

enum kvp_status kvp_wire_unpack(const ProtobufCMessageDescriptor *type, const void *bytes, size_t n,
                                struct kvp_wire_budget *budget, ProtobufCMessage **ret_body)
{
    ProtobufCMessage *body = protobuf_c_message_unpack(type, &budget->allocator, n, bytes);

    if (body == NULL) /* protobuf-c does not say why */
        return budget->refused ? KVP_ENOMEM : KVP_EPROTO;
    if (!strings_valid(type, bytes, n)) {
        protobuf_c_message_free_unpacked(body, &budget->allocator);
        return KVP_EPROTO;
    }
    *ret_body = body;
    return KVP_OK;
}

/* ---- sending ----------------------------------------------------------------------------------------------------- */

static enum kvp_status pack_memfd(const ProtobufCMessage *body, size_t n, int *ret_memfd)
{
    enum kvp_status status = KVP_ENOMEM;
    void *at;
    int fd = memfd_create("kvp-message", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0)
        return KVP_ENOMEM;
    if (fchmod(fd, 0600) != 0 || posix_fallocate(fd, 0, (off_t)n) != 0)
        goto close_fd;
    at = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        goto close_fd;
    protobuf_c_message_pack(body, at);
    munmap(at, n);
    if (fcntl(fd, F_ADD_SEALS, SEALS_NEEDED | F_SEAL_GROW | F_SEAL_SEAL) != 0)
        goto close_fd;
    *ret_memfd = fd;
    return KVP_OK;

close_fd:
    close(fd);
    return status;
}

enum kvp_status kvp_wire_pack(uint16_t method, uint16_t flags, enum kvp_status status, uint64_t tag,
                              const ProtobufCMessage *body, struct kvp_wire_packet *ret_packet)
{
    size_t n = body != NULL ? protobuf_c_message_get_packed_size(body) : 0;
    struct kvp_envelope envelope = {.magic = KVP_ENVELOPE_MAGIC, .method = method, .flags = flags, .status = status,
                                    .bytes = (uint32_t)n, .tag = tag};
    struct kvp_wire_packet packet = {.n = sizeof(envelope), .memfd = -1};

    if (n > KVP_MESSAGE_BYTES_MAX)
        return KVP_ELIMIT;
    if (sizeof(envelope) + n > KVP_DATAGRAM_BYTES_MAX) {
        enum kvp_status made = pack_memfd(body, n, &packet.memfd);

        if (made != KVP_OK)
            return made;
        envelope.flags |= KVP_ENVELOPE_MEMFD;
    } else {
        packet.n += n;
    }
    packet.bytes = malloc(packet.n);
    if (packet.bytes == NULL) {
        if (packet.memfd >= 0)
            close(packet.memfd);
        return KVP_ENOMEM;
    }
    memcpy(packet.bytes, &envelope, sizeof(envelope));
    if (packet.memfd < 0 && n > 0)
        protobuf_c_message_pack(body, (uint8_t *)packet.bytes + sizeof(envelope));
    *ret_packet = packet;
    return KVP_OK;
}

enum kvp_status kvp_wire_send(int socket, const struct kvp_wire_packet *packet, const int *fds, unsigned n_fds)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int) * (KVP_MESSAGE_FDS_MAX + 1))];
    } control;
    int all[KVP_MESSAGE_FDS_MAX + 1];
    unsigned n = 0;
    struct iovec iov = {packet->bytes, packet->n};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    ssize_t sent;

    if (n_fds > KVP_MESSAGE_FDS_MAX)
        return KVP_ELIMIT;
    if (packet->memfd >= 0)
        all[n++] = packet->memfd;
    for (unsigned i = 0; i < n_fds; i++)
        all[n++] = fds[i];
    if (n > 0) {
        memset(&control, 0, sizeof(control));
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * n);
        *CMSG_FIRSTHDR(&message) = (struct cmsghdr){
            .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int) * n)};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), all, sizeof(int) * n);
    }
    do {
        sent = sendmsg(socket, &message, MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    if (sent >= 0)
        return KVP_OK;
    if (errno == EAGAIN || errno == EWOULDBLOCK)
        return KVP_EAGAIN;
    return errno == ENOMEM || errno == ENOBUFS || errno == ETOOMANYREFS ? KVP_ENOMEM : KVP_EDISCONNECTED;
}

void kvp_wire_packet_free(struct kvp_wire_packet *packet)
{
    free(packet->bytes);
    if (packet->memfd >= 0)
        close(packet->memfd);
    *packet = (struct kvp_wire_packet){.memfd = -1};
}

/* ---- receiving --------------------------------------------------------------------------------------------------- */

static void take_fds(struct msghdr *message, struct kvp_wire_frame *frame)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c != NULL; c = CMSG_NXTHDR(message, c)) {
        size_t n;

        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
            if (frame->n_fds < KVP_MESSAGE_FDS_MAX)
                frame->fds[frame->n_fds++] = fd;
            else
                close(fd);
        }
    }
}

/* The body lies in the first fd: map it, and take that fd out of the frame's. */
static enum kvp_status map_body(struct kvp_wire_frame *frame)
{
    struct stat st;
    int seals, fd;
    void *at;

    if (frame->n_fds == 0 || frame->envelope.bytes == 0 || frame->envelope.bytes > KVP_MESSAGE_BYTES_MAX)
        return KVP_EPROTO;
    fd = frame->fds[0];
    frame->n_fds--;
    memmove(frame->fds, frame->fds + 1, sizeof(int) * frame->n_fds);
    seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & SEALS_NEEDED) != SEALS_NEEDED || fstat(fd, &st) != 0 ||
        st.st_size < (off_t)frame->envelope.bytes) {
        close(fd);
        return KVP_EPROTO;
    }
    at = mmap(NULL, frame->envelope.bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (at == MAP_FAILED)
        return KVP_ENOMEM;
    frame->mapped = at;
    frame->mapped_bytes = frame->envelope.bytes;
    frame->bytes = at;
    return KVP_OK;
}

enum kvp_status kvp_wire_receive(int socket, bool peek, struct kvp_wire_frame *frame)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int) * (KVP_MESSAGE_FDS_MAX + 1))];
    } control;
    struct iovec iov = {frame->buffer, sizeof(frame->buffer)};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    enum kvp_status status = KVP_EPROTO;
    ssize_t n;

    frame->n_fds = 0;
    frame->mapped = NULL;
    frame->bytes = NULL;
    frame->envelope = (struct kvp_envelope){0};
    do {
        n = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | (peek ? MSG_PEEK : 0));
    } while (n < 0 && errno == EINTR);
    if (n < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK ? KVP_EAGAIN : KVP_EDISCONNECTED;
    if (n == 0)
        return KVP_EDISCONNECTED;
    take_fds(&message, frame);
    if ((size_t)n < sizeof(frame->envelope) || (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0)
        goto release;
    memcpy(&frame->envelope, frame->buffer, sizeof(frame->envelope));
    if (frame->envelope.magic != KVP_ENVELOPE_MAGIC)
        goto release;
    if ((frame->envelope.flags & KVP_ENVELOPE_MEMFD) != 0) {
        status = map_body(frame);
        if (status != KVP_OK)
            goto release;
        return KVP_OK;
    }
    if (frame->envelope.bytes != (size_t)n - sizeof(frame->envelope))
        goto release;
    frame->bytes = frame->buffer + sizeof(frame->envelope);
    return KVP_OK;

release:
    kvp_wire_release(frame);
    return status;
}

void kvp_wire_release(struct kvp_wire_frame *frame)
{
    for (unsigned i = 0; i < frame->n_fds; i++)
        if (frame->fds[i] >= 0)
            close(frame->fds[i]);
    frame->n_fds = 0;
    if (frame->mapped != NULL)
        munmap(frame->mapped, frame->mapped_bytes);
    frame->mapped = NULL;
}

enum kvp_status kvp_wire_consume(int socket)
{
    char byte;
    ssize_t n;

    do {
        n = recv(socket, &byte, sizeof(byte), MSG_TRUNC | MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    return n > 0 ? KVP_OK : n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) ? KVP_EAGAIN : KVP_EDISCONNECTED;
}
