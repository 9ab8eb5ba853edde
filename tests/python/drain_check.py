#!/usr/bin/env python3
"""Watches a gateway that is being stopped: what its probes, its followers and their retries are told.

    drain_check.py --grpc HOST:PORT

It prints "watching" when the gateway may be stopped, which is to keep `shutdown.notice` of some seconds.
"""

from __future__ import annotations

import argparse
import sys

import stubs  # noqa: F401 (makes the stubs that are imported below)

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from tidegate.v1 import live_service_pb2, live_service_pb2_grpc

from checks import Failed, equal, run, true

DEADLINE = 60.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "tidegate.v1.TelemetryService", "tidegate.v1.LiveService")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grpc", required=True, metavar="HOST:PORT")
    args = parser.parse_args()
    with grpc.insecure_channel(args.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = {name: health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE) for name in SERVICES}
        follow = live_service_pb2_grpc.LiveServiceStub(channel).Follow(live_service_pb2.FollowRequest(), timeout=DEADLINE)

        def before() -> None:
            for name, watch in watches.items():
                equal(f"Watch of {name!r}", next(watch).status, SERVING)
                equal(f"Check of {name!r}", health.Check(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE).status, SERVING)
            true("the follower is live", next(follow).HasField("synced"))
            print("watching", flush=True)

        def watched() -> None:
            for name, watch in watches.items():
                equal(f"Watch of {name!r}", next(watch).status, NOT_SERVING)

        def checked() -> None:
            for name in SERVICES:
                equal(f"Check of {name!r}", health.Check(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE).status, NOT_SERVING)

        def follower_is_told() -> str:
            try:
                response = next(follow)
            except grpc.RpcError as error:
                equal("code", error.code(), grpc.StatusCode.UNAVAILABLE)
                status = rpc_status.from_call(error)
                true("the status has details", status is not None)
                info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
                true("ErrorInfo", any(detail.Unpack(info) for detail in status.details))
                true("RetryInfo", any(detail.Unpack(retry) for detail in status.details))
                equal("reason", (info.reason, info.domain), ("DRAINING", "tidegate"))
                delay = retry.retry_delay.ToTimedelta().total_seconds()
                true("a delay is said", delay > 0)
                return f"again after {delay} s"
            raise Failed(f"the follower got {response}")

        return run(
            [
                ("SERVING before the stop", before),
                ("Watch says NOT_SERVING", watched),
                ("Check says NOT_SERVING while new calls are still taken", checked),
                ("the follower is told to come again, with ErrorInfo and RetryInfo", follower_is_told),
            ]
        )


if __name__ == "__main__":
    sys.exit(main())
