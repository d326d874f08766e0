/** The floor that kvp_bench_grpc measures the gRPC door against; see grpc_echo.c. */
#ifndef KVP_BENCH_GRPC_ECHO_H
#define KVP_BENCH_GRPC_ECHO_H

#include <stddef.h>

/** Serve on a listening Unix socket, every call answered with reply_bytes zeroes, until killed. */
void grpc_echo_serve(int listen_fd, size_t reply_bytes);

#endif
