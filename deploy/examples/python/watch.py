#!/usr/bin/env python3
"""Follows readings as they are stored, until ctrl-C: each once, also when the gateway is away in between."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import grpc

from common import EPOCH, GATEWAY, KEEPALIVE, PASSING, retry_delay
from tidegate.v1 import batch_pb2, live_service_pb2 as pb
from tidegate.v1.live_service_pb2_grpc import LiveServiceStub


def readings(batch: batch_pb2.Batch) -> Iterator[tuple[int, str, object, str]]:
    """Time in microseconds, sensor, value and unit, row by row."""
    for frame in batch.frames:
        columns = [(column, getattr(column, column.WhichOneof("values")).values) for column in frame.columns]
        at = frame.base_time_us
        for row, delta in enumerate([0, *frame.time_deltas_us]):
            at += delta
            for column, values in columns:
                yield at, column.sensor, values[row], column.unit


def follow(stub: LiveServiceStub, request: pb.FollowRequest) -> Iterator[pb.FollowResponse]:
    """All messages, over as many streams as it takes."""
    attempt = 0
    while True:
        delay = 0.5
        try:
            for response in stub.Follow(request):
                attempt = 0
                yield response
                # Behind the yield: what was not worked on is shown again.
                if response.resume_token:
                    request.resume_token = response.resume_token
        except grpc.RpcError as error:
            if error.code() not in PASSING:
                raise
            delay = retry_delay(error, attempt)
            attempt += 1
            print(f"{error.code().name}: {error.details()}; following again in {delay:.1f} s", file=sys.stderr)
        time.sleep(delay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateway", default=GATEWAY, metavar="HOST:PORT")
    parser.add_argument("--device", action="append", default=[], help="only this device; may be given several times")
    parser.add_argument("--selector", default="", help="only devices whose labels match, such as site=berlin")
    parser.add_argument("--beginning", action="store_true", help="begin with the oldest reading, not with the latest values")
    args = parser.parse_args()

    request = pb.FollowRequest(devices=args.device, label_selector=args.selector)
    if args.beginning:
        request.beginning = True
    else:
        request.latest = True
    with contextlib.suppress(KeyboardInterrupt), grpc.insecure_channel(args.gateway, options=KEEPALIVE) as channel:
        for response in follow(LiveServiceStub(channel), request):
            kind = response.WhichOneof("message")
            if kind in ("latest", "readings"):
                message = getattr(response, kind)
                for at, sensor, value, unit in readings(message.batch):
                    print((EPOCH + timedelta(microseconds=at)).isoformat(), message.device, sensor, value, unit, flush=True)


if __name__ == "__main__":
    main()
