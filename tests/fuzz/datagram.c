/**
 * Fuzz target: what a peer may put on a session socket: a datagram of any bytes, with no fd, with a memfd in any state
 * of seals, or with several fds. The first byte says which, the rest is the datagram; its start is made an envelope that
 * is right in every second input, so that the checks behind it are met.
 *
 * Holds: the frame is read or refused; a body lies within what arrived; peeking leaves the message, consuming takes it;
 * and not one fd is left open.
 */
#include "kvp_wire.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

static void check(bool holds)
{
    if (!holds)
        abort();
}

static int next_fd(void)
{
    int fd = dup(STDIN_FILENO);

    check(fd >= 0);
    close(fd);
    return fd;
}

static unsigned attach_fds(uint8_t kind, const uint8_t *data, size_t size, int fds[3])
{
    unsigned n = kind % 4;

    for (unsigned i = 0; i < n; i++) {
        fds[i] = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        check(fds[i] >= 0 && write(fds[i], data, size) == (ssize_t)size);
        if ((kind & 0x10) != 0)
            check(fcntl(fds[i], F_ADD_SEALS, F_SEAL_SHRINK | ((kind & 0x20) != 0 ? F_SEAL_WRITE : 0)) == 0);
    }
    return n;
}

static void put(int socket, uint8_t kind, const uint8_t *data, size_t size)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int) * 3)];
    } control = {0};
    struct kvp_envelope envelope;
    uint8_t bytes[4096];
    struct iovec iov = {bytes, size < sizeof(bytes) ? size : sizeof(bytes)};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    int fds[3];
    unsigned n = attach_fds(kind, data, iov.iov_len, fds);

    memcpy(bytes, data, iov.iov_len);
    if ((kind & 0x40) != 0 && iov.iov_len >= sizeof(envelope)) {
        memcpy(&envelope, bytes, sizeof(envelope));
        envelope.magic = KVP_ENVELOPE_MAGIC;
        if ((kind & 0x80) != 0)
            envelope.bytes = (uint32_t)(iov.iov_len - sizeof(envelope));
        memcpy(bytes, &envelope, sizeof(envelope));
    }
    if (n > 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * n);
        *CMSG_FIRSTHDR(&message) = (struct cmsghdr){
            .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int) * n)};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), fds, sizeof(int) * n);
    }
    check(sendmsg(socket, &message, MSG_NOSIGNAL) == (ssize_t)iov.iov_len);
    for (unsigned i = 0; i < n; i++)
        close(fds[i]);
}

static void read_all_of(const struct kvp_wire_frame *frame)
{
    volatile uint8_t sum = 0;

    for (uint32_t i = 0; i < frame->envelope.bytes; i++)
        sum = (uint8_t)(sum + ((const uint8_t *)frame->bytes)[i]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct kvp_wire_frame frame;
    int ends[2], before = next_fd();
    enum kvp_status peeked, received;

    if (size < 2)
        return 0;
    check(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
    put(ends[0], data[0], data + 1, size - 1);
    peeked = kvp_wire_receive(ends[1], true, &frame);
    check(peeked == KVP_OK || peeked == KVP_EPROTO);
    if (peeked == KVP_OK) {
        read_all_of(&frame);
        kvp_wire_release(&frame);
    }
    received = kvp_wire_receive(ends[1], false, &frame);
    check(received == peeked);
    if (received == KVP_OK) {
        read_all_of(&frame);
        kvp_wire_release(&frame);
    }
    check(kvp_wire_receive(ends[1], true, &frame) == KVP_EAGAIN);
    close(ends[0]);
    check(kvp_wire_receive(ends[1], true, &frame) == KVP_EDISCONNECTED);
    close(ends[1]);
    check(next_fd() == before);
    return 0;
}
