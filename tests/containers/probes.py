"""Health as probes and balancers see it: Check, Watch, and the exit codes of the gateway's own probe."""

import threading

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stack import Failure, eventually

SERVICES = [f"tidegate.v1.{name}Service" for name in ("Telemetry", "DeviceLink", "Live", "Config", "Reading", "Device", "Credential", "Operator")]
SERVING = health_pb2.HealthCheckResponse.SERVING


def run(stack):
    container = stack.container("gateway")
    exit_codes(stack, container)
    show = ("run", "--rm", "--no-deps", "-T", "--entrypoint", "cat", "secrets", "/secrets/authority/authority.pem")
    authority = stack.compose(*show)
    with grpc.secure_channel(stack.port(container, 50051), grpc.ssl_channel_credentials(authority.encode())) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        check(health)
        watch(stack, container, health)


def without_tls(stack, container):
    exit_codes(stack, container)
    with grpc.insecure_channel(stack.port(container, 50051)) as channel:
        check(health_pb2_grpc.HealthStub(channel))


def exit_codes(stack, container):
    for arguments, expected in (([], 0), (["--service", SERVICES[0]], 0), (["--service", "nobody"], 1), (["--timeout", "0s"], 2)):
        code = stack.docker("exec", container, "tidegate", "health", *arguments, check=False).returncode
        if code != expected:
            raise Failure(f"tidegate health {arguments} ended with {code} instead of {expected}")


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
                seen.append(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
        except grpc.RpcError as error:
            seen.append(error.code().name)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    eventually("Watch tells the status", lambda: seen)
    stack.docker("stop", "--time", "30", container)
    follower.join(60)
    if follower.is_alive() or seen[:2] != ["SERVING", "NOT_SERVING"] or len(seen) > 3:
        raise Failure(f"Watch saw {seen}")
    if stack.docker("exec", container, "tidegate", "health", check=False).returncode == 0:
        raise Failure("a gateway that is stopped is healthy")
    print(f"Watch: {' '.join(seen)}")
    stack.docker("start", container)
    stack.all_healthy("gateway")
