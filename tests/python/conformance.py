#!/usr/bin/env python3
"""Speaks to a running gateway with Python's gRPC and its standard stubs: what one client library takes for granted must hold.

    conformance.py --grpc HOST:PORT --http HOST:PORT
"""

from __future__ import annotations

import argparse
import queue
import re
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import stubs  # noqa: F401 (makes the stubs that are imported below)

import grpc
from google.protobuf import descriptor_pb2, json_format, struct_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from tidegate.v1 import (
    batch_pb2,
    config_service_pb2,
    config_service_pb2_grpc,
    device_link_service_pb2,
    device_link_service_pb2_grpc,
    device_service_pb2,
    device_service_pb2_grpc,
    live_service_pb2,
    live_service_pb2_grpc,
    telemetry_service_pb2,
    telemetry_service_pb2_grpc,
)

from checks import Failed, equal, eventually, run, true

DOMAIN = "tidegate"
FOLLOW_IN_FLIGHT = re.compile(r'^tidegate_grpc_requests_in_flight\{[^}]*method="tidegate\.v1\.LiveService/Follow"[^}]*\} (\S+)$', re.MULTILINE)
DEADLINE = 20.0
SERVICES = ("ConfigService", "DeviceLinkService", "DeviceService", "LiveService", "ReadingService", "TelemetryService")


def batch(*values: float) -> batch_pb2.Batch:
    now = time.time_ns() // 1000
    column = batch_pb2.Column(sensor="temperature", unit="Cel", double_values=batch_pb2.DoubleValues(values=values))
    return batch_pb2.Batch(frames=[batch_pb2.Frame(base_time_us=now, time_deltas_us=[1000] * (len(values) - 1), columns=[column])])


def refused(call: Callable[[], Any]) -> grpc.RpcError:
    """The error that the call ends with."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return error
    raise Failed(f"the call succeeded with {answer}")


def details(error: grpc.RpcError) -> dict[type, Any]:
    """The typed details of an error, by their type."""
    status = rpc_status.from_call(error)
    true(f"{error.code()} carries a google.rpc.Status", status is not None)
    found: dict[type, Any] = {}
    for any_detail in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            message = kind()
            if any_detail.Unpack(message):
                true(f"one {kind.__name__}", kind not in found)
                found[kind] = message
    return found


def error_is(error: grpc.RpcError, code: grpc.StatusCode, reason: str) -> dict[type, Any]:
    equal("code", error.code(), code)
    found = details(error)
    true("ErrorInfo is there", error_details_pb2.ErrorInfo in found)
    info = found[error_details_pb2.ErrorInfo]
    equal("reason and domain", (info.reason, info.domain), (reason, DOMAIN))
    return found


class Conformance:
    def __init__(self, channel: grpc.Channel, http: str) -> None:
        self.channel = channel
        self.http = http
        # Of its own for each run, so that a gateway can be checked again.
        self.device = f"conformance-{uuid.uuid4().hex[:12]}"
        self.stream_id = uuid.uuid4().bytes
        self.telemetry = telemetry_service_pb2_grpc.TelemetryServiceStub(channel)
        self.link = device_link_service_pb2_grpc.DeviceLinkServiceStub(channel)
        self.live = live_service_pb2_grpc.LiveServiceStub(channel)
        self.config = config_service_pb2_grpc.ConfigServiceStub(channel)
        self.devices = device_service_pb2_grpc.DeviceServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    def position(self, **options: Any) -> Any:
        request = telemetry_service_pb2.GetUploadPositionRequest(device=self.device, stream_id=self.stream_id)
        return self.telemetry.GetUploadPosition.with_call(request, **options)

    def upload(self, *numbered: tuple[int, batch_pb2.Batch]) -> Any:
        def requests() -> Iterator[Any]:
            for sequence, one in numbered:
                yield telemetry_service_pb2.UploadRequest(device=self.device, stream_id=self.stream_id, sequence=sequence, batch=one)

        return self.telemetry.Upload(requests(), timeout=DEADLINE)

    # Unary calls.

    def unary_with_deadline(self) -> None:
        response, _ = self.position(timeout=DEADLINE)
        equal("position of a new stream id", response.last_durable_sequence, 0)

    def unary_past_its_deadline(self) -> None:
        error = refused(lambda: self.position(timeout=-1))
        equal("code", error.code(), grpc.StatusCode.DEADLINE_EXCEEDED)

    def stream_past_its_deadline(self) -> None:
        request = live_service_pb2.FollowRequest(devices=[self.device], live_only=True)
        error = refused(lambda: [response for response in self.live.Follow(request, timeout=0.3)])
        equal("code", error.code(), grpc.StatusCode.DEADLINE_EXCEEDED)

    def request_id_in_initial_metadata(self) -> None:
        request_id = f"conformance.{uuid.uuid4()}"
        _, call = self.position(timeout=DEADLINE, metadata=[("x-request-id", request_id)])
        equal("x-request-id", dict(call.initial_metadata()).get("x-request-id"), request_id)
        _, call = self.position(timeout=DEADLINE)
        true("the gateway gives a request id where there is none", dict(call.initial_metadata()).get("x-request-id"))

    def details_in_trailing_metadata(self) -> None:
        error = refused(lambda: self.devices.GetDevice(device_service_pb2.GetDeviceRequest(device="no-such-device"), timeout=DEADLINE))
        trailing = {key: value for key, value in error.trailing_metadata()}
        true("grpc-status-details-bin is in the trailing metadata", isinstance(trailing.get("grpc-status-details-bin"), bytes))

    # Errors.

    def every_violation_is_told(self) -> str:
        def requests() -> Iterator[Any]:
            yield telemetry_service_pb2.UploadRequest(device="bad device", stream_id=b"short", sequence=0, batch=batch(1.0))

        error = refused(lambda: self.telemetry.Upload(requests(), timeout=DEADLINE))
        found = error_is(error, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        violations = {violation.field: violation.description for violation in found[error_details_pb2.BadRequest].field_violations}
        equal("fields", sorted(violations), ["device", "sequence", "stream_id"])
        true("each is described", all(violations.values()))
        true("no retry is asked for", error_details_pb2.RetryInfo not in found)
        return error.details()

    def missing_device(self) -> None:
        error = refused(lambda: self.devices.GetDevice(device_service_pb2.GetDeviceRequest(device="no-such-device"), timeout=DEADLINE))
        found = error_is(error, grpc.StatusCode.NOT_FOUND, "DEVICE_NOT_FOUND")
        equal("metadata", dict(found[error_details_pb2.ErrorInfo].metadata), {"device": "no-such-device"})

    def unknown_method(self) -> None:
        call = self.channel.unary_unary("/tidegate.v1.TelemetryService/NoSuchMethod", lambda _: b"", lambda answer: answer)
        equal("code", refused(lambda: call(None, timeout=DEADLINE)).code(), grpc.StatusCode.UNIMPLEMENTED)

    # Upload.

    def upload_is_stored_once(self) -> None:
        response = self.upload((1, batch(20.0, 20.5)), (2, batch(21.0)))
        equal("last durable sequence", response.last_durable_sequence, 2)
        equal("accepted", (response.accepted.batches, response.accepted.readings), (2, 3))
        response = self.upload((2, batch(21.0)), (3, batch(22.0)))
        equal("accepted", (response.accepted.batches, response.accepted.readings), (1, 1))
        equal("duplicate", (response.duplicate.batches, response.duplicate.readings), (1, 1))
        equal("position", self.position(timeout=DEADLINE)[0].last_durable_sequence, 3)

    def gap_is_refused(self) -> None:
        found = error_is(refused(lambda: self.upload((9, batch(1.0)))), grpc.StatusCode.FAILED_PRECONDITION, "SEQUENCE_GAP")
        metadata = found[error_details_pb2.ErrorInfo].metadata
        equal("sequences", (metadata["expected_sequence"], metadata["received_sequence"]), ("4", "9"))

    def bad_batch_is_rejected_alone(self) -> None:
        response = self.upload((4, batch(float("nan"))), (5, batch(23.0)))
        equal("last durable sequence", response.last_durable_sequence, 5)
        equal("accepted", response.accepted.batches, 1)
        equal("rejected", [(one.sequence, one.reason) for one in response.rejected], [(4, batch_pb2.REJECT_REASON_NON_FINITE)])

    # Follow.

    def open_follows(self) -> float:
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=DEADLINE) as response:
            found = FOLLOW_IN_FLIGHT.findall(response.read().decode())
        return float(found[0]) if found else 0.0

    def follow_and_cancel(self) -> None:
        eventually("no follower is left of the checks before", self.open_follows, 0.0)
        request = live_service_pb2.FollowRequest(devices=[self.device], beginning=True)
        stream = self.live.Follow(request, timeout=DEADLINE)
        readings = 0
        for response in stream:
            if response.HasField("synced"):
                break
            equal("kind", response.WhichOneof("message"), "readings")
            true("a token to resume from", response.resume_token)
            readings += sum(len(column.double_values.values) for frame in response.readings.batch.frames for column in frame.columns)
        equal("readings until Synced", readings, 5)
        equal("followers by the gauge", self.open_follows(), 1.0)
        stream.cancel()
        equal("code", stream.code(), grpc.StatusCode.CANCELLED)
        eventually("followers by the gauge", self.open_follows, 0.0)

    # Configure and Connect against each other.

    def configure_and_connect(self) -> str:
        link = ScriptedDevice(self)
        link.start()
        try:
            eventually("batches are acknowledged before", lambda: link.acknowledged > link.first + 5, True)
            applied = self.set_config({"interval_s": 5})
            equal("states of a good configuration", applied, ["ACCEPTED", "DELIVERED", "APPLIED"])
            rejected = self.set_config({"interval_s": -1})
            equal("states of a bad configuration", rejected, ["ACCEPTED", "DELIVERED", "REJECTED"])
            configured_at = link.acknowledged
            eventually("batches are acknowledged after", lambda: link.acknowledged > configured_at + 5, True)
        finally:
            link.stop()
        equal("configurations that the device got", link.configs, [{"interval_s": 5.0}, {"interval_s": -1.0}])
        equal("last acknowledged sequence", link.acknowledged, link.sent)
        shown = self.config.GetConfig(config_service_pb2.GetConfigRequest(device=self.device), timeout=DEADLINE).config
        equal("state", shown.state, config_service_pb2.CONFIG_STATE_REJECTED)
        equal("detail", shown.detail, "too short")
        true("the device still runs with the first one", shown.applied_revision == shown.desired.revision - 1)
        return f"{link.sent - link.first} batches meanwhile"

    def set_config(self, config: dict[str, Any]) -> list[str]:
        """The states that the new revision went through."""
        outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        request_id = str(uuid.uuid4())
        wanted = json_format.ParseDict(config, struct_pb2.Struct())
        outbox.put(config_service_pb2.ConfigureRequest(
            set=config_service_pb2.SetConfig(request_id=request_id, device=self.device, config=wanted)
        ))
        states: list[str] = []
        ends = []
        for response in self.config.Configure(iter(outbox.get, None), timeout=DEADLINE):
            if response.HasField("set_done"):
                ends.append((response.set_done.request_id, response.set_done.accepted, response.set_done.refused))
            else:
                equal("kind", response.WhichOneof("message"), "event")
                if response.event.request_id == request_id:
                    states.append(config_service_pb2.ConfigState.Name(response.event.state).removeprefix("CONFIG_STATE_"))
            if ends and states[-1] in ("APPLIED", "REJECTED", "REVERTED"):
                break
        outbox.put(None)
        equal("ends of the request", ends, [(request_id, 1, 0)])
        return states

    def refusal_does_not_end_the_stream(self) -> None:
        def requests() -> Iterator[Any]:
            wanted = json_format.ParseDict({"interval_s": 7}, struct_pb2.Struct())
            for request_id, device, etag in (("a", "no-such-device", ""), ("b", self.device, "stale"), ("c", self.device, "")):
                request_id = f"{request_id}-{self.device}"
                yield config_service_pb2.ConfigureRequest(
                    set=config_service_pb2.SetConfig(request_id=request_id, device=device, config=wanted, etag=etag)
                )

        answers = []
        # Who only sets and closes its side gets all answers, and then OK.
        for response in self.config.Configure(requests(), timeout=DEADLINE):
            kind = response.WhichOneof("message")
            answers.append(response.refusal.reason if kind == "refusal" else kind)
        equal("answers", answers, ["DEVICE_NOT_FOUND", "set_done", "CONFIG_ETAG_MISMATCH", "set_done", "event", "set_done"])

    # Health and reflection.

    def health_check(self) -> None:
        for service in ("", *(f"tidegate.v1.{name}" for name in SERVICES)):
            answer = self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE)
            equal(f"status of {service!r}", answer.status, health_pb2.HealthCheckResponse.SERVING)
        unknown = health_pb2.HealthCheckRequest(service="no.such.Service")
        equal("unknown service", refused(lambda: self.health.Check(unknown, timeout=DEADLINE)).code(), grpc.StatusCode.NOT_FOUND)

    def health_watch(self) -> None:
        stream = self.health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=DEADLINE)
        equal("first status", next(iter(stream)).status, health_pb2.HealthCheckResponse.SERVING)
        stream.cancel()

    def reflection(self) -> str:
        # grpcio-reflection has the messages of v1alpha, which are those of v1 under another name.
        call = self.channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="tidegate.v1.TelemetryService"),
        ]
        listed, file = list(call(iter(requests), timeout=DEADLINE))
        names = {service.name for service in listed.list_services_response.service}
        missing = {f"tidegate.v1.{name}" for name in SERVICES} | {"grpc.health.v1.Health"}
        equal("services that are not listed", missing - names, set())
        descriptor = descriptor_pb2.FileDescriptorProto.FromString(file.file_descriptor_response.file_descriptor_proto[0])
        methods = [method.name for service in descriptor.service for method in service.method]
        equal("methods", methods, ["Upload", "GetUploadPosition"])
        return f"{len(names)} services"

    def checks(self) -> list[tuple[str, Callable[[], Any]]]:
        return [
            ("a unary call with a deadline", self.unary_with_deadline),
            ("a unary call past its deadline", self.unary_past_its_deadline),
            ("a stream past its deadline", self.stream_past_its_deadline),
            ("initial metadata has the request id", self.request_id_in_initial_metadata),
            ("trailing metadata has the details of errors", self.details_in_trailing_metadata),
            ("an invalid request is told every violation", self.every_violation_is_told),
            ("a missing device is told with its reason", self.missing_device),
            ("an unknown method", self.unknown_method),
            ("an upload is stored once", self.upload_is_stored_once),
            ("a gap is refused with what is expected", self.gap_is_refused),
            ("a bad batch is rejected, and only that", self.bad_batch_is_rejected_alone),
            ("a follower that cancels is gone", self.follow_and_cancel),
            ("Configure and Connect at once: applied, rejected", self.configure_and_connect),
            ("a refusal does not end a Configure stream", self.refusal_does_not_end_the_stream),
            ("health: Check", self.health_check),
            ("health: Watch", self.health_watch),
            ("reflection lists the services and their methods", self.reflection),
        ]


class ScriptedDevice(threading.Thread):
    """An always-on device: a batch every few milliseconds, and an answer to each configuration."""

    def __init__(self, client: Conformance) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.configs: list[dict[str, Any]] = []
        self.first = self.sent = 0
        self.acknowledged = 0
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def stop(self) -> None:
        """Closes its side; the gateway acknowledges all and ends the stream."""
        self._stopped.set()
        self.join(DEADLINE)
        true("the device's stream has ended", not self.is_alive())
        if self._error is not None:
            raise Failed(f"the device's stream failed: {self._error}")

    def run(self) -> None:
        try:
            for response in self.client.link.Connect(self._requests(), timeout=DEADLINE):
                self._take(response)
        except BaseException as error:  # noqa: BLE001 (told by stop)
            self._error = error

    def _requests(self) -> Iterator[Any]:
        pb = device_link_service_pb2
        yield pb.ConnectRequest(hello=pb.Hello(device=self.client.device, stream_id=self.client.stream_id))
        self.first = self.sent = self._outbox.get(timeout=DEADLINE)
        while not self._stopped.is_set():
            try:
                yield pb.ConnectRequest(config_report=self._outbox.get(timeout=0.005))
            except queue.Empty:
                self.sent += 1
                yield pb.ConnectRequest(batch=pb.LinkBatch(sequence=self.sent, batch=batch(24.0)))

    def _take(self, response: Any) -> None:
        pb = device_link_service_pb2
        kind = response.WhichOneof("message")
        if kind == "welcome":
            true("the welcome tells the time", abs(response.welcome.server_time.ToSeconds() - time.time()) < 3600)
            self._outbox.put(response.welcome.last_durable_sequence)
        elif kind == "ack":
            equal("rejected", list(response.ack.rejected), [])
            self.acknowledged = response.ack.last_durable_sequence
        elif kind == "config_update":
            config = json_format.MessageToDict(response.config_update.config)
            self.configs.append(config)
            good = config["interval_s"] > 0
            outcome = pb.CONFIG_OUTCOME_APPLIED if good else pb.CONFIG_OUTCOME_REJECTED
            report = pb.ConfigReport(revision=response.config_update.revision, outcome=outcome, detail="" if good else "too short")
            self._outbox.put(report)
        else:
            raise Failed(f"the gateway sent {kind}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grpc", required=True, metavar="HOST:PORT")
    parser.add_argument("--http", required=True, metavar="HOST:PORT")
    args = parser.parse_args()
    with grpc.insecure_channel(args.grpc) as channel:
        return run(Conformance(channel, args.http).checks())


if __name__ == "__main__":
    sys.exit(main())
