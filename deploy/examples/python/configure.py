#!/usr/bin/env python3
"""Sets a device's configuration, and shows how the device takes it. Example: configure.py python-link-1 '{"interval_s": 0.2}'"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import json_format, struct_pb2

from common import GATEWAY
from tidegate.v1 import config_service_pb2 as pb
from tidegate.v1.config_service_pb2_grpc import ConfigServiceStub

FINAL = {pb.CONFIG_STATE_APPLIED: 0, pb.CONFIG_STATE_REJECTED: 1, pb.CONFIG_STATE_REVERTED: 1}


def configure(stub: ConfigServiceStub, device: str, config: dict[str, Any], etag: str, timeout: float) -> int:
    """The exit code: 0 when the device runs with it."""
    # The side that we send on stays open while we listen: the stream ends when both are closed.
    outbox: queue.SimpleQueue[pb.ConfigureRequest | None] = queue.SimpleQueue()
    requests: Iterator[pb.ConfigureRequest] = iter(outbox.get, None)
    wanted = json_format.ParseDict(config, struct_pb2.Struct())
    request_id = str(uuid.uuid4())
    outbox.put(pb.ConfigureRequest(set=pb.SetConfig(request_id=request_id, device=device, config=wanted, etag=etag)))
    try:
        for response in stub.Configure(requests, timeout=timeout):
            if response.HasField("refusal"):
                print(f"refused: {response.refusal.reason}: {response.refusal.message}")
                return 1
            event = response.event
            if event.request_id != request_id:
                continue  # another operator's step, or set_done, which counts the devices of a request for many
            print(f"{event.device} revision {event.revision} {pb.ConfigState.Name(event.state)} {event.detail}".rstrip())
            if event.state in FINAL:
                return FINAL[event.state]
    finally:
        outbox.put(None)
    print("the gateway ended the stream before the device was done")
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateway", default=GATEWAY, metavar="HOST:PORT")
    parser.add_argument("--etag", default="", help="only when this is still the current configuration's")
    parser.add_argument("--timeout", type=float, default=30, metavar="SECONDS")
    parser.add_argument("device")
    parser.add_argument("config", type=json.loads, help="a JSON object")
    args = parser.parse_args()
    with grpc.insecure_channel(args.gateway) as channel:
        try:
            return configure(ConfigServiceStub(channel), args.device, args.config, args.etag, args.timeout)
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
