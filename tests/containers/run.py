"""Runs the compose stack for real, breaks it, and looks whether a reading was lost or doubled.

    python3 tests/containers/run.py --times 10

With images that are named, which `docker build` has made: TIDEGATE_IMAGE=… TIDEGATE_FLEET_IMAGE=… … --no-build
"""

import argparse
import os
import random
import sys
import time

import probes
import single
from stack import NETWORK, Failure, Fleet, Stack, docker_program, eventually

STACK = ("postgres", "gateway", "fleet", "prometheus")


def first_start(stack):
    """From nothing to data that Prometheus sees, and data that is still there after a down and an up."""
    begin = time.monotonic()
    stack.compose("up", "-d", "--no-build")
    stack.all_healthy(*STACK)
    eventually("Prometheus has scraped the gateway", lambda: stack.value('up{job="tidegate"}') == 1)
    stack.stores()
    print(f"all healthy and readings stored after {time.monotonic() - begin:.0f} s")

    stack.compose("stop", "fleet")
    sql = "SELECT sum(stored_readings) || ' readings in ' || count(*) FROM streams"
    before = stack.sql(sql)
    stack.compose("down", "--timeout", "40")
    stack.hasten()
    stack.compose("up", "-d", "--no-build", "--scale", "fleet=0")
    stack.all_healthy("postgres", "gateway", "prometheus")
    after = stack.sql(sql)
    if before != after or not before:
        raise Failure(f"there were {before} streams, and are {after}")
    print(f"still there after down and up: {after} streams")


NO_GATEWAY = {"TidegateGatewayDown", "TidegateNoGateway"}
NOT_READY = {"TidegateNotReady"}
OUTAGES = NO_GATEWAY | NOT_READY


class Faults:
    """What goes wrong in the life of containers. Each heals what it broke, and says which of the alerts must have fired."""

    def __init__(self, stack):
        self.stack = stack
        self.authority = stack.authority()

    def kill_gateway(self):
        return self.killed("gateway", NO_GATEWAY)

    def kill_postgres(self):
        return self.killed("postgres", NOT_READY)

    def pause_gateway(self):
        return self.away("gateway", NO_GATEWAY, ("pause",), ("unpause",))

    def pause_postgres(self):
        return self.away("postgres", NOT_READY, ("pause",), ("unpause",))

    def disconnect_gateway(self):
        back = ("network", "connect", "--alias", "gateway", NETWORK)
        return self.away("gateway", NO_GATEWAY, ("network", "disconnect", NETWORK), back)

    def restart_everything(self):
        self.stack.compose("restart", "--timeout", "40", "postgres", "gateway", "prometheus")
        return None

    def killed(self, service, alerts):
        container = self.stack.container(service)
        self.stack.docker("kill", "-s", "KILL", container)
        fired = self.wait_for(alerts)
        self.probe(service)
        self.stack.docker("start", container)
        return fired

    def away(self, service, alerts, leave, come_back):
        container, begin = self.stack.container(service), time.monotonic()
        self.stack.docker(*leave, container)
        try:
            fired = self.wait_for(alerts)
            self.probe(service)
            # Twenty seconds are longer than a ping's timeout, and shorter than a connection's.
            time.sleep(max(0.0, 20 - (time.monotonic() - begin)))
        finally:
            self.stack.docker(*come_back, container)
        return fired

    def probe(self, service):
        if service == "postgres":
            probes.unhealthy(self.stack, self.stack.container("gateway"), self.authority)

    def wait_for(self, alerts):
        return eventually(f"one of {', '.join(sorted(alerts))} fires", lambda: self.stack.firing() & alerts).pop()


def faults(stack, times, chance):
    """Every fault, `times` each, in an order of chance, under a fleet that never stops sending."""
    injector = Faults(stack)
    kinds = (injector.kill_gateway, injector.kill_postgres, injector.pause_gateway, injector.pause_postgres)
    todo = [*kinds, injector.disconnect_gateway, injector.restart_everything] * times
    chance.shuffle(todo)
    fleet = Fleet(stack, 7, "https://gateway:50051")
    stack.stores()
    for fault in todo:
        # What fires then is of this fault, and not of the one before.
        eventually("no alert of an outage fires", lambda: not stack.firing() & OUTAGES)
        # Not a wait for anything: the moment of a fault is chance.
        time.sleep(chance.uniform(0, 2))
        begin = time.monotonic()
        alert = fault()
        stack.all_healthy("postgres", "gateway", "prometheus")
        stack.stores()
        print(f"  {fault.__name__.replace('_', ' ')}: {alert or 'no alert needed'}, stores again after {time.monotonic() - begin:.0f} s", flush=True)
    found = fleet.verify()
    told = f"{found['acknowledged']['readings']} readings, {found['reconnects']} reconnects, {found['duplicates']} batches sent twice"
    gap = found["longest_ack_gap_ms"] / 1000
    print(f"{len(todo)} faults: {told}, {gap:.1f} s the longest gap between acknowledgements; none lost, none doubled")


def rolling_replacement(stack, rounds):
    """Both gateways are replaced, one after the other, while devices send through the balancer."""
    stack.compose("--profile", "balanced", "up", "-d", "--no-build", "--scale", "fleet=0", "--scale", "balanced-fleet=0", "--scale", "gateway=2")
    stack.all_healthy("gateway", "balancer")
    fleet = Fleet(stack, 8, "https://balancer:50050")
    links = 'tidegate_grpc_requests_in_flight{method="tidegate.v1.DeviceLinkService/Connect"}'
    eventually("both gateways have devices", lambda: stack.value(f"count({links} > 0)") == 2)
    for _ in range(rounds):
        for old in stack.containers("gateway"):
            stack.compose("up", "-d", "--no-build", "--no-deps", "--no-recreate", "--scale", "gateway=3", "gateway")
            stack.all_healthy("gateway")
            # SIGTERM, as every orchestrator does it.
            stack.docker("stop", "--time", "30", old)
            if stack.state(old)["ExitCode"] != 0:
                raise Failure(f"a gateway did not end well: {stack.docker('logs', '--tail', '20', old, check=False).stderr}")
            stack.docker("rm", "-v", old)
            eventually("all devices are linked again", lambda: stack.value(f"sum({links})") == 20)
    found = fleet.verify()
    gap = found["longest_ack_gap_ms"] / 1000
    print(f"{2 * rounds} gateways replaced: {found['acknowledged']['readings']} readings, {found['reconnects']} reconnects, none lost, none doubled, none failed;")
    print(f"the longest that a device was without an acknowledgement: {gap:.2f} s")
    if gap >= 5:
        raise Failure("that is 5 s or more")
    stack.compose("--profile", "balanced", "up", "-d", "--no-build", "--scale", "fleet=0", "--scale", "balanced-fleet=0", "--scale", "gateway=1")


def build(stack):
    begin = time.monotonic()
    # One after the other: the second has all of its layers from the first.
    for service in ("gateway", "fleet"):
        stack.compose("build", service)
    print(f"built in {time.monotonic() - begin:.0f} s")


def show_sizes(stack):
    for image in (stack.image, stack.fleet_image):
        size = int(stack.docker("image", "inspect", "-f", "{{.Size}}", image))
        print(f"{image}: {size / 1e6:.1f} MB")
        if size > 40e6:
            raise Failure(f"{image} is larger than 40 MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1, help="how often each fault is injected")
    parser.add_argument("--no-build", action="store_true", help="use the images that are there")
    parser.add_argument("--only", nargs="*", help="the parts to run")
    arguments = parser.parse_args()
    program = docker_program()
    if program is None:
        print("there is no container engine with the compose plugin on this machine: the containers are not tested", file=sys.stderr)
        return 1 if os.environ.get("CI") else 0

    seed = int(os.environ.get("TIDEGATE_TEST_SEED") or random.randrange(1 << 32))
    print(f"TIDEGATE_TEST_SEED={seed}")
    parts = {
        "first_start": first_start,
        "probes": probes.run,
        "faults": lambda stack: faults(stack, arguments.times, random.Random(seed)),
        "rolling_replacement": lambda stack: rolling_replacement(stack, arguments.times),
        "embedded_database": single.embedded_database,
        "image_alone": single.image_alone,
    }
    with Stack(program) as stack:
        if not arguments.no_build:
            build(stack)
        show_sizes(stack)
        for name, part in parts.items():
            if arguments.only and name not in arguments.only and name != "first_start":
                continue
            begin = time.monotonic()
            print(f"* {name.replace('_', ' ')}", flush=True)
            try:
                part(stack)
            except Failure as failure:
                print(f"{stack.compose('logs', '--no-color', '--tail', '100', check=False).stdout}\nFAILED: {name}: {failure}", file=sys.stderr)
                return 1
            print(f"  ({time.monotonic() - begin:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
