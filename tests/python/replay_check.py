#!/usr/bin/env python3
"""Compares what a gateway has of a recording with the recording, which it reads by itself.

    replay_check.py query  --grpc HOST:PORT --device ID --csv FILE
    replay_check.py follow --grpc HOST:PORT --device ID --csv FILE [--from beginning|live] [--timeout SECONDS]

`query`: for each sensor the number of distinct times, the sum of the values, and the first and last time; where a time stands
twice, the later row wins. `follow`: each reading is received exactly once, and for each sensor in the order of the rows; it prints
"synced" when the follower is live, so that the replay may begin. It follows across restarts of the gateway.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from itertools import pairwise
from typing import Any

import stubs  # noqa: F401 (makes the stubs that are imported below)

import grpc
from tidegate.v1 import live_service_pb2, live_service_pb2_grpc, reading_service_pb2, reading_service_pb2_grpc

from checks import Failed, equal, run, true

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
SUM_TOLERANCE = 1e-9
MISSING = {"", "nan", "na", "n/a", "null", "none"}
PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}

# The readings of each sensor: time in microseconds and value.
Series = dict[str, list[tuple[int, float]]]


def micros(text: str) -> int:
    """Microseconds since the epoch; a time without a zone is UTC."""
    at = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return ((at if at.tzinfo else at.replace(tzinfo=timezone.utc)) - EPOCH) // timedelta(microseconds=1)


def recorded(path: str, ignored: set[str]) -> Series:
    """All readings of the file, in the order of its rows. The first column is the time."""
    with open(path, newline="", encoding="utf-8") as file:
        dialect = csv.Sniffer().sniff(file.read(4096), delimiters=",;\t")
        file.seek(0)
        rows = csv.reader(file, dialect)
        sensors = [name.strip() for name in next(rows)][1:]
        series: Series = {sensor: [] for sensor in sensors if sensor not in ignored}
        for cells in rows:
            at = micros(cells[0].strip())
            for sensor, cell in zip(sensors, cells[1:]):
                if sensor in series and cell.strip().lower() not in MISSING:
                    series[sensor].append((at, float(cell)))
    return {sensor: readings for sensor, readings in series.items() if readings}


def times_of(base: int, deltas: Any) -> Iterator[int]:
    yield base
    for delta in deltas:
        base += delta
        yield base


def values_of(column: Any) -> Any:
    return getattr(column, column.WhichOneof("values")).values


# query


def queried(channel: grpc.Channel, device: str, timeout: float) -> Series:
    """All readings that the gateway has of the device."""
    series: Series = {}
    summary = None
    request = reading_service_pb2.QueryReadingsRequest(device=device)
    for response in reading_service_pb2_grpc.ReadingServiceStub(channel).QueryReadings(request, timeout=timeout):
        true("nothing comes behind the summary", summary is None)
        if response.HasField("summary"):
            summary = response.summary.readings
        else:
            column = response.readings
            times = list(times_of(column.base_time_us, column.time_deltas_us))
            equal(f"times and values of a column of {column.sensor!r}", len(times), len(values_of(column)))
            series.setdefault(column.sensor, []).extend(zip(times, values_of(column)))
    equal("readings by the summary", summary, sum(map(len, series.values())))
    return series


def compare(sensor: str, rows: list[tuple[int, float]], stored: list[tuple[int, float]]) -> str:
    expected = dict(rows)  # Where a time stands twice, the later row wins.
    times = [at for at, _ in stored]
    true(f"{sensor}: the times of the answer ascend", all(a < b for a, b in pairwise(times)))
    equal(f"{sensor}: distinct times", len(stored), len(expected))
    equal(f"{sensor}: first and last time", (times[0], times[-1]), (min(expected), max(expected)))
    expected_sum, found_sum = math.fsum(expected.values()), math.fsum(value for _, value in stored)
    if not math.isclose(expected_sum, found_sum, rel_tol=SUM_TOLERANCE, abs_tol=0.0):
        raise Failed(f"{sensor}: the values sum up to {found_sum!r}, expected {expected_sum!r}")
    wrong = next((at for at, value in stored if expected[at] != value), None)
    true(f"{sensor}: the value at {wrong} is another", wrong is None)
    return f"{len(stored)} readings, {len(rows) - len(expected)} times stand twice, sum {found_sum!r}"


def query(channel: grpc.Channel, args: argparse.Namespace) -> list[tuple[str, Callable[[], Any]]]:
    rows = recorded(args.csv, set(args.ignore))
    stored = queried(channel, args.device, args.timeout)
    checks: list[tuple[str, Callable[[], Any]]] = [("the sensors are those of the file", lambda: equal("sensors", sorted(stored), sorted(rows)))]
    for sensor in rows:
        checks.append((f"the readings of {sensor}", partial(compare, sensor, rows[sensor], stored.get(sensor, []))))
    return checks


# follow


def received(channel: grpc.Channel, device: str, start: str, expected: int, timeout: float) -> Series:
    """What a follower gets, until that is as much as expected and the stream is live."""
    series: Series = {}
    count, synced = 0, False
    request = live_service_pb2.FollowRequest(devices=[device])
    if start == "live":
        request.live_only = True
    else:
        request.beginning = True
    deadline = time.monotonic() + timeout
    while True:
        try:
            stream = live_service_pb2_grpc.LiveServiceStub(channel).Follow(
                request, timeout=max(0.001, deadline - time.monotonic()), wait_for_ready=True
            )
            for response in stream:
                if response.HasField("synced") and not synced:
                    synced = True
                    print("synced", flush=True)
                for frame in response.readings.batch.frames:
                    times = list(times_of(frame.base_time_us, frame.time_deltas_us))
                    for column in frame.columns:
                        count += len(times)
                        series.setdefault(column.sensor, []).extend(zip(times, values_of(column)))
                request.resume_token = response.resume_token or request.resume_token
                if count >= expected and synced:
                    stream.cancel()
                    return series
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED or time.monotonic() > deadline:
                raise Failed(f"{count} of {expected} readings were received in {timeout} s") from error
            if error.code() not in PASSING:
                raise
        time.sleep(0.05)


def in_order(sensor: str, rows: list[tuple[int, float]], series: Series) -> str:
    found = series[sensor]
    for index, (expected, got) in enumerate(zip(rows, found)):
        equal(f"{sensor}: reading {index + 1}", got, expected)
    equal(f"{sensor}: readings", len(found), len(rows))
    return f"{len(found)} readings"


def follow(channel: grpc.Channel, args: argparse.Namespace) -> list[tuple[str, Callable[[], Any]]]:
    rows = recorded(args.csv, set(args.ignore))
    found: Series = {}

    def receive() -> str:
        found.update(received(channel, args.device, args.start, sum(map(len, rows.values())), args.timeout))
        equal("sensors", sorted(found), sorted(rows))
        return f"{sum(map(len, found.values()))} readings"

    checks: list[tuple[str, Callable[[], Any]]] = [("the follower received as many readings as the file has", receive)]
    for sensor in rows:
        checks.append((f"each reading of {sensor} once, in order", partial(in_order, sensor, rows[sensor], found)))
    return checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["query", "follow"])
    parser.add_argument("--grpc", required=True, metavar="HOST:PORT")
    parser.add_argument("--device", required=True, metavar="ID")
    parser.add_argument("--csv", required=True, metavar="FILE")
    parser.add_argument("--ignore", action="append", default=[], metavar="COLUMN", help="a column that is not sent; may be given several times")
    parser.add_argument("--from", dest="start", choices=["beginning", "live"], default="beginning")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")
    args = parser.parse_args()
    with grpc.insecure_channel(args.grpc) as channel:
        return run({"query": query, "follow": follow}[args.mode](channel, args))


if __name__ == "__main__":
    sys.exit(main())
