#!/usr/bin/env python3
"""A device that wakes up, measures, and hands over what it has.

With --csv it takes its readings from a recording: the first column is the time (taken as UTC when it has no zone), the others
are sensors, whose cells may be empty. Without, it makes some up. What the gateway does not take now stays in the queue for the next run.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import random
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import grpc

from common import GATEWAY, PASSING, Queue, Row, log_rejected, make_batch, retry_delay
from tidegate.v1 import telemetry_service_pb2 as pb
from tidegate.v1.telemetry_service_pb2_grpc import TelemetryServiceStub

BATCH_ROWS = 100
ATTEMPTS = 8


def recorded(path: str) -> tuple[list[str], Iterator[Row]]:
    """The sensors' names, and the rows of a recording."""
    with open(path, newline="", encoding="utf-8") as file:
        dialect = csv.Sniffer().sniff(file.read(4096), delimiters=",;\t")
        file.seek(0)
        names = next(csv.reader(file, dialect))[1:]

    def rows() -> Iterator[Row]:
        with open(path, newline="", encoding="utf-8") as file:
            for cells in itertools.islice(csv.reader(file, dialect), 1, None):
                at = datetime.fromisoformat(cells[0])
                yield Row(at if at.tzinfo else at.replace(tzinfo=timezone.utc), [float(cell) if cell else None for cell in cells[1:]])

    return names, rows()


def made_up(count: int) -> tuple[list[str], Iterator[Row]]:
    """A day's temperature and humidity, one reading a second, up to now."""
    begin = datetime.now(timezone.utc) - timedelta(seconds=count)

    def rows() -> Iterator[Row]:
        for second in range(count):
            day = math.sin(2 * math.pi * second / 86_400)
            yield Row(begin + timedelta(seconds=second), [20 + 5 * day + random.gauss(0, 0.1), 50 - 10 * day + random.gauss(0, 0.5)])

    return ["temperature", "humidity"], rows()


def enqueue(queue: Queue, sensors: list[str], units: list[str], rows: Iterator[Row]) -> None:
    while chunk := list(itertools.islice(rows, BATCH_ROWS)):
        if (batch := make_batch(sensors, units, chunk)).frames:
            queue.append(batch)


def upload(stub: TelemetryServiceStub, device: str, queue: Queue) -> None:
    """Sends what the gateway does not have yet, and forgets what is durable there."""
    position = stub.GetUploadPosition(pb.GetUploadPositionRequest(device=device, stream_id=queue.stream_id), timeout=10)
    queue.forget(position.last_durable_sequence)

    def requests() -> Iterator[pb.UploadRequest]:
        sent = position.last_durable_sequence
        for sequence, batch in queue.after(sent):
            # A gateway that came back without its data misses what it had acknowledged, and what is gone here.
            lost = sequence - sent - 1
            yield pb.UploadRequest(device=device, stream_id=queue.stream_id, sequence=sequence, batch=batch, lost_batches=lost)
            sent = sequence

    if len(queue) == 0:
        return
    response = stub.Upload(requests(), timeout=120)
    queue.forget(response.last_durable_sequence)
    print(f"stored {response.accepted.readings} readings; {response.duplicate.batches} batches were there already")
    log_rejected(response.rejected)


def upload_all(stub: TelemetryServiceStub, device: str, queue: Queue) -> bool:
    """Tries until the queue is empty; whether it is."""
    for attempt in range(ATTEMPTS):
        try:
            upload(stub, device, queue)
            if len(queue) == 0:
                return True
            delay = 0.5  # The gateway is being stopped and took a part: the rest goes to the next one.
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            if error.code() not in PASSING:
                return False
            delay = retry_delay(error, attempt)
        time.sleep(delay)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gateway", default=GATEWAY, metavar="HOST:PORT")
    parser.add_argument("--device", default="python-1", help="the device's id")
    parser.add_argument("--csv", metavar="FILE", help="take the readings from a recording")
    parser.add_argument("--unit", action="append", default=[], help="a sensor's unit, in the order of the columns")
    parser.add_argument("--count", type=int, default=1000, help="how many rows to make up without --csv")
    parser.add_argument("--queue", metavar="FILE", help="default: DEVICE.queue")
    args = parser.parse_args()

    queue = Queue(args.queue or f"{args.device}.queue")
    sensors, rows = recorded(args.csv) if args.csv else made_up(args.count)
    units = args.unit if args.csv else ["Cel", "%RH"]
    enqueue(queue, sensors, [*units, *[""] * (len(sensors) - len(units))], rows)
    with grpc.insecure_channel(args.gateway) as channel:
        if upload_all(TelemetryServiceStub(channel), args.device, queue):
            return 0
    print(f"{len(queue)} batches are kept for the next run", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
