"""The gateway in one container: the embedded database, its copy to PostgreSQL, and the image without the compose file."""

import probes
from stack import NETWORK, PROJECT, Failure, Fleet, eventually

CONFINED = ("--read-only", "--cap-drop", "ALL", "--user", "65532")


def embedded_database(stack):
    """A gateway with SQLite, and then its data in PostgreSQL, under the old name."""
    stack.compose("up", "-d", "--no-build", "sqlite", "sqlite-fleet")
    stack.all_healthy("sqlite")
    container = stack.container("sqlite")
    facts = stack.docker("inspect", "-f", "{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}} {{.Config.User}}", container).strip()
    if facts != "true [ALL] 65532:65532":
        raise Failure(f"the gateway is not confined as it should be: {facts}")
    listed = lambda: stack.docker("exec", container, "tidegate", "device", "list", check=False).stdout.count("sim-1-") == 20
    eventually("20 devices are registered", listed)
    stack.compose("rm", "-sfv", "sqlite-fleet")
    acknowledged = exchange(stack, 9, "https://sqlite:50051", "sqlite-operator-secret")
    print(f"with SQLite: read-only root, no capabilities, user 65532; {acknowledged} readings, none lost, none doubled")
    stack.compose("rm", "-sfv", "sqlite")
    copy(stack, acknowledged)


def copy(stack, acknowledged):
    stack.sql("CREATE DATABASE copied")
    url = "postgres://tidegate@postgres/copied"
    secrets = [part for name in ("gateway-secret", "authority") for part in ("-v", f"{PROJECT}_{name}:/run/secrets/{name.split('-')[0]}:ro")]
    database = (*CONFINED, "--network", NETWORK, *secrets, "-e", "PGPASSFILE=/run/secrets/gateway/pgpass")
    said = stack.docker("run", "--rm", *database, "-v", f"{PROJECT}_sqlite-data:/data", stack.image, "copy", "--quiet", "--from", "sqlite:/data", "--to", url)
    print(f"tidegate copy: {said.splitlines()[0]}")
    stored = "SELECT sum(stored_readings) FROM streams JOIN devices USING (device_id) WHERE id LIKE 'sim-9-%'"
    found = stack.sql(stored, "copied")
    if found != str(acknowledged):
        raise Failure(f"of {acknowledged} readings, {found} were copied")

    # Its environment is that of the service `gateway`, whose secrets are in the same places.
    inherited = stack.docker("inspect", "-f", "{{range .Config.Env}}{{println .}}{{end}}", stack.container("gateway")).split()
    environment = [part for variable in inherited if variable.startswith("TIDEGATE_") for part in ("-e", variable)]
    environment += ["-e", f"TIDEGATE_STORAGE_URL={url}"]
    operator = ("-v", f"{PROJECT}_sqlite-operator-secret:/run/secrets/operator")
    name = f"{PROJECT}-copied"
    stack.docker("run", "-d", "--name", name, "--tmpfs", "/data", "--network-alias", "sqlite", *database, *operator, *environment, stack.image)
    eventually("the gateway on the copy is healthy", lambda: stack.healthy(name))
    more = exchange(stack, 9, "https://sqlite:50051", "sqlite-operator-secret")
    total = stack.sql(stored, "copied")
    if total != str(acknowledged + more):
        raise Failure(f"there were {acknowledged} readings, {more} came, and there are {total}")
    print(f"a gateway on the copy, under the old name: {more} readings more, by the same devices")
    stack.docker("rm", "-fv", name)
    stack.sql("DROP DATABASE copied WITH (FORCE)")


def image_alone(stack):
    """As the Dockerfile says it is run: nothing but the image and a volume. It is killed, and goes on with what it had."""
    name, volume = f"{PROJECT}-alone", f"{PROJECT}_alone"
    run = ("run", "-d", "--name", name, "--network", NETWORK, *CONFINED, "-v", f"{volume}:/data", "-p", "127.0.0.1:0:50051")
    stack.docker(*run, "-e", "TIDEGATE_INSECURE=true", stack.image)
    try:
        eventually("the image's own health check passes", lambda: stack.healthy(name))
        for service in ("", *probes.SERVICES):
            probes.expect(f"a probe without TLS of {service!r}", probes.probe(stack.port(name, 50051), service), probes.HEALTHY)
        before = exchange(stack, 10, f"http://{name}:50051", None)
        stack.docker("kill", "-s", "KILL", name)
        stack.docker("start", name)
        eventually("it is healthy again", lambda: stack.healthy(name))
        after = exchange(stack, 10, f"http://{name}:50051", None)
        log = stack.docker("logs", name, check=False)
        if "panicked" in log.stdout + log.stderr:
            raise Failure(f"the gateway panicked: {log.stdout}{log.stderr}")
        stack.docker("stop", "--time", "30", name)
        probes.expect("the exit code of a stop", stack.state(name)["ExitCode"], 0)
        print(f"the image alone: {' '.join(CONFINED)}; {before} readings, killed, {after} more; none lost, none doubled")
    finally:
        stack.docker("rm", "-fv", name, check=False)
        stack.docker("volume", "rm", "-f", volume, check=False)


def exchange(stack, seed, endpoint, operator):
    """How many readings a fleet sent in ten seconds, and found again."""
    return Fleet(stack, seed, endpoint, duration="10s", operator=operator).found()["acknowledged"]["readings"]
