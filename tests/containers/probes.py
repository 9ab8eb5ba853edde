"""Health as probes and balancers see it: Check, Watch, and the exit codes of the gateway's own probe."""

import threading

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stack import Failure, eventually

SERVICES = [f"tidegate.v1.{name}Service" for name in ("Telemetry", "DeviceLink", "Live", "Config", "Reading", "Device", "Credential", "Operator", "DeadLetter")]
SERVING = health_pb2.HealthCheckResponse.SERVING


# How grpc_health_probe ends, which is what probes of this kind are compared with.
HEALTHY, NOT_CONNECTED, CALL_FAILED, UNHEALTHY = 0, 2, 3, 4


def run(stack):
    container, authority = stack.container("gateway"), stack.authority()
    exit_codes(stack, container)
    outside(stack, container, authority)
    with grpc.secure_channel(stack.port(container, 50051), grpc.ssl_channel_credentials(authority)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        check(health)
        watch(stack, container, health)


def probe(address, service="", authority=None, timeout=5):
    """What a probe makes of the gateway: with TLS where there is an authority, and without a token, as probes have none."""
    credentials = authority and grpc.ssl_channel_credentials(authority)
    with grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout)
        except grpc.FutureTimeoutError:
            return NOT_CONNECTED
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError:
            return CALL_FAILED
        return HEALTHY if answer.status == SERVING else UNHEALTHY


def expect(what, found, wanted):
    if found != wanted:
        raise Failure(f"{what}: {found} instead of {wanted}")


def outside(stack, container, authority):
    """Through the published port: with TLS and without."""
    address = stack.port(container, 50051)
    expect("a probe with TLS", probe(address, "", authority), HEALTHY)
    expect("a probe of a service that is not there", probe(address, "nobody", authority), CALL_FAILED)
    expect("a probe without TLS of a gateway that wants it", probe(address), NOT_CONNECTED)
    print("a probe from outside: healthy with TLS; not connected without")


def unhealthy(stack, container, authority):
    """While the database is away."""
    address = stack.port(container, 50051)
    eventually("the probe finds the gateway unhealthy", lambda: probe(address, "", authority) == UNHEALTHY)
    expect("tidegate health without a database", stack.docker("exec", container, "tidegate", "health", check=False).returncode, 1)


def exit_codes(stack, container):
    for arguments, expected in (([], 0), (["--service", SERVICES[0]], 0), (["--service", "nobody"], 1), (["--timeout", "0s"], 2)):
        code = stack.docker("exec", container, "tidegate", "health", *arguments, check=False).returncode
        expect(f"the exit code of tidegate health {arguments}", code, expected)


def check(health):
    for service in ["", *SERVICES]:
        status = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
        if status != SERVING:
            raise Failure(f"{service or 'the gateway'} is {status}")
    try:
        health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
        raise Failure("a service that is not there serves")
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:
            raise Failure(f"a service that is not there is {error.code()}") from error
    print(f"Check: the gateway and {len(SERVICES)} services serve, another is NOT_FOUND")


def watch(stack, container, health):
    """A stop is told to watchers before their connection ends."""
    seen = []

    def follow():
        try:
            for answer in health.Watch(health_pb2.HealthCheckRequest(service="")):
                status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
                # The same may be told twice: it is set by what finds it out first, and by the drain.
                if seen[-1:] != [status]:
                    seen.append(status)
        except grpc.RpcError as error:
            seen.append(error.code().name)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    eventually("Watch tells the status", lambda: seen)
    stack.docker("stop", "--time", "30", container)
    follower.join(60)
    if follower.is_alive() or seen[:2] != ["SERVING", "NOT_SERVING"] or len(seen) > 3:
        raise Failure(f"Watch saw {seen}")
    print(f"Watch: {' '.join(seen)}")
    stack.docker("start", container)
    stack.all_healthy("gateway")
