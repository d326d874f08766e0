/**
 * grpc.health.v1.Health/Check: SERVING for the whole server ("") and for kvpool.v1.KvPool; what load balancers and
 * container probes ask. Watch is not served: clients of it are told UNIMPLEMENTED, which the protocol foresees.
 */
#include "door.h"

#include "health.pb-c.h"

#include <string.h>

bool kvp_rpc_health_path(const char *path)
{
    return strcmp(path, "/grpc.health.v1.Health/Check") == 0;
}

const ProtobufCMessageDescriptor *kvp_rpc_health_request(void)
{
    return &grpc__health__v1__health_check_request__descriptor;
}

void kvp_rpc_health_serve(struct kvp_rpc_call *call)
{
    const Grpc__Health__V1__HealthCheckRequest *request = (const void *)call->call.message.body;
    Grpc__Health__V1__HealthCheckResponse response = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;

    if (request->service[0] != 0 && strcmp(request->service, "kvpool.v1.KvPool") != 0) {
        kvp_rpc_refuse(call, KVP_ENOENT, "there is no service \"%.64s\" here", request->service);
        return;
    }
    response.status = call->rpc->stopping ? GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING
                                          : GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
    kvp_rpc_answer(call, KVP_OK, &response.base);
}
