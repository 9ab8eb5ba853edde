"""The compose stack under test: real containers, told what to do by Docker's own commands."""

import json
import os
import pathlib
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = os.environ.get("TIDEGATE_TEST_PROJECT", "tidegate-test")
NETWORK = f"{PROJECT}_default"
# How long what must happen may take. Long, as machines are slow; reached only by a failing test.
PATIENCE = 180.0

# The machine stays usable, and nothing is published on a port that somebody else may use.
LIMITS = """
services:
  gateway: {deploy: {resources: {limits: {cpus: "1"}}}}
  postgres: {deploy: {resources: {limits: {cpus: "1"}}}}
  fleet: {deploy: {resources: {limits: {cpus: "0.5"}}}}
  prometheus:
    # A Prometheus that is stopped does not mark what it saw last as over: for five minutes that would count along.
    command: [--config.file=/etc/prometheus/prometheus.yml, --storage.tsdb.path=/prometheus, --query.lookback-delta=5s]
    deploy: {resources: {limits: {cpus: "0.5"}}}
    volumes: ["%s:/etc/prometheus:ro"]
"""


class Failure(Exception):
    """Something is not as it must be."""


def docker_program():
    """The first Docker client that knows `compose`, or None where there is no engine."""
    for program in (os.environ.get("TIDEGATE_TEST_DOCKER", "docker"), "/usr/bin/docker"):
        try:
            subprocess.run([program, "compose", "version"], check=True, capture_output=True)
            subprocess.run([program, "info"], check=True, capture_output=True, timeout=30)
            return program
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def eventually(what, ask, patience=PATIENCE):
    """Asks again until the answer is there."""
    begin = time.monotonic()
    while time.monotonic() - begin < patience:
        answer = ask()
        if answer:
            return answer
        time.sleep(0.25)
    raise Failure(f"did not happen in {patience:.0f} s: {what}")


class Stack:
    """A project of its own, whose containers and volumes are removed in the end."""

    def __init__(self, program):
        self.program = program
        self.files = [ROOT / "compose.yaml"]
        self.environment = dict(os.environ, DOCKER_BUILDKIT="1")
        self.image = self.environment.setdefault("TIDEGATE_IMAGE", "tidegate")
        self.fleet_image = self.environment.setdefault("TIDEGATE_FLEET_IMAGE", "tidegate-fleet")
        for ports in ("GRPC_PORTS", "PROMETHEUS_PORT", "BALANCER_PORT", "SQLITE_PORT", "GRAFANA_PORT"):
            self.environment[f"TIDEGATE_{ports}"] = "0"
        self.directory = tempfile.TemporaryDirectory(prefix="tidegate-containers-")

    def __enter__(self):
        self.remove()
        return self

    def __exit__(self, *_):
        self.remove()
        self.directory.cleanup()

    def docker(self, *arguments, check=True, timeout=1800):
        """What a command printed."""
        command = [self.program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=self.environment)
        if check and done.returncode != 0:
            raise Failure(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout if check else done

    def compose(self, *arguments, check=True):
        files = [part for file in self.files for part in ("-f", str(file))]
        return self.docker("compose", "-p", PROJECT, *files, *arguments, check=check)

    def remove(self):
        for name in self.docker("ps", "-aq", "--filter", f"network={NETWORK}").split():
            self.docker("rm", "-fv", name, check=False)
        self.compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "30", check=False)

    def hasten(self):
        """From here on the containers are bounded, and Prometheus looks each second and alerts after two."""
        rules = pathlib.Path(self.directory.name, "prometheus")
        rules.mkdir()
        for file in (ROOT / "deploy/prometheus").iterdir():
            text = re.sub(r"\bfor: \w+", "for: 2s", file.read_text())
            (rules / file.name).write_text(re.sub(r"(interval|timeout): \d+s", r"\1: 1s", text))
            (rules / file.name).chmod(0o644)
        rules.chmod(0o755)
        pathlib.Path(self.directory.name).chmod(0o755)
        limits = pathlib.Path(self.directory.name, "limits.yaml")
        limits.write_text(LIMITS % rules)
        self.files = [ROOT / "deploy/compose.yaml", limits]

    def containers(self, service):
        return self.compose("ps", "-aq", service).split()

    def container(self, service):
        found = self.containers(service)
        if len(found) != 1:
            raise Failure(f"{service} has {len(found)} containers")
        return found[0]

    def state(self, container):
        return json.loads(self.docker("inspect", "-f", "{{json .State}}", container))

    def healthy(self, container):
        state = self.state(container)
        return state["Status"] == "running" and state.get("Health", {}).get("Status", "healthy") == "healthy"

    def all_healthy(self, *services):
        for service in services:
            containers = self.containers(service)
            if not containers:
                raise Failure(f"{service} has no container")
            for container in containers:
                eventually(f"{service} is healthy", lambda: self.healthy(container))

    def port(self, container, port):
        return self.docker("port", container, str(port)).split()[0]

    def authority(self):
        """The certificate that the stack's own certificates go back to."""
        show = ("run", "--rm", "--no-deps", "-T", "--entrypoint", "cat", "secrets", "/secrets/authority/authority.pem")
        return self.compose(*show).encode()

    def sql(self, query, database="tidegate"):
        return self.compose("exec", "-T", "postgres", "psql", "-U", "tidegate", "-d", database, "-Atc", query).strip()

    def prometheus(self, path):
        """What Prometheus' HTTP API answers; None while it is away."""
        try:
            address = self.port(self.container("prometheus"), 9090)
            with urllib.request.urlopen(f"http://{address}/api/v1/{path}", timeout=5) as answer:
                return json.load(answer)["data"]
        except (Failure, IndexError, OSError, urllib.error.URLError):
            return None

    def value(self, expression):
        """The value of an expression, 0 where it has none."""
        answer = self.prometheus("query?" + urllib.parse.urlencode({"query": expression}))
        return float(answer["result"][0]["value"][1]) if answer and answer["result"] else 0.0

    def firing(self):
        answer = self.prometheus("alerts")
        return {alert["labels"]["alertname"] for alert in answer["alerts"] if alert["state"] == "firing"} if answer else set()

    def stores(self):
        """Waits until Prometheus sees that readings were stored; a gateway that was started anew counts from 0."""
        before = self.value("sum(tidegate_stored_readings_total)")
        eventually("readings are stored", lambda: 0 < self.value("sum(tidegate_stored_readings_total)") != before)


class Fleet:
    """Simulated devices in a container of their own, which nothing restarts."""

    def __init__(self, stack, seed, endpoint, devices=20, duration="100h", operator="operator-secret"):
        """Of the devices of `seed`; with `operator`, the volume of an administrator's token, or None where nobody is asked for one."""
        self.stack = stack
        self.name = f"{PROJECT}-fleet-{seed}"
        simulate = ["simulate", "--devices", str(devices), "--connections", str(devices), "--duration", duration, "--interval", "200ms"]
        simulate += ["--batch", "6", "--seed", str(seed), "--verify", "--json", "--quiet", "--drain-timeout", "3m", "--endpoint", endpoint]
        hardened = ["--read-only", "--cap-drop", "ALL", "--network", NETWORK, "--cpus", "0.5"]
        trusting = []
        if operator:
            trusting += ["-v", f"{PROJECT}_authority:/authority:ro", "-e", "TIDEGATE_CA_FILE=/authority/authority.pem"]
            trusting += ["-v", f"{PROJECT}_{operator}:/operator:ro", "-e", "TIDEGATE_TOKEN_FILE=/operator/admin-token"]
        stack.docker("rm", "-fv", self.name, check=False)
        stack.docker("run", "-d", "--name", self.name, *hardened, *trusting, stack.fleet_image, *simulate)

    def verify(self):
        """Lets the devices end, and returns what they found; it must be all that they sent, once."""
        self.stack.docker("kill", "-s", "INT", self.name)
        return self.found()

    def found(self):
        """The same of devices that end by themselves."""
        eventually("the fleet ends", lambda: self.stack.state(self.name)["Status"] == "exited", patience=600)
        code = self.stack.state(self.name)["ExitCode"]
        logs = self.stack.docker("logs", self.name, check=False)
        if code != 0:
            raise Failure(f"the fleet ended with {code}\n{logs.stdout}{logs.stderr}")
        summary = json.loads(logs.stdout)
        self.stack.docker("rm", "-v", self.name)
        if summary["verification"]["devices_with_differences"] or summary["unacknowledged_readings"] or summary["rejected"]:
            raise Failure(f"not all is there once: {summary}")
        return summary
