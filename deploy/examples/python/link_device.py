#!/usr/bin/env python3
"""A device that is always on: it measures at the interval that its configuration says, until ctrl-C.

Its configuration: {"interval_s": seconds between measurements, 0.01 to 3600}.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
from collections import deque
from collections.abc import AsyncIterator
from datetime import datetime, timezone

import grpc
from google.protobuf import json_format

from common import GATEWAY, KEEPALIVE, PASSING, Queue, Row, log_rejected, make_batch, retry_delay
from tidegate.v1 import device_link_service_pb2 as pb
from tidegate.v1.device_link_service_pb2_grpc import DeviceLinkServiceStub

# How many batches may be on their way without an acknowledgement.
WINDOW = 32


class LinkDevice:
    def __init__(self, device: str, queue: Queue) -> None:
        self._device = device
        self._queue = queue
        self._interval_s = 1.0
        self._revision = 0
        self._durable = 0
        self._answered = False
        # Set whenever there may be something to send: a new batch, or room in the window.
        self._wake = asyncio.Event()

    async def measure(self) -> None:
        """Into the queue, whether a gateway is there or not."""
        while True:
            now = datetime.now(timezone.utc)
            value = 20 + 5 * math.sin(now.timestamp() / 60) + random.gauss(0, 0.1)
            self._queue.append(make_batch(["temperature"], ["Cel"], [Row(now, [value])]))
            self._wake.set()
            await asyncio.sleep(self._interval_s)

    async def stay_connected(self, gateway: str) -> None:
        attempt = 0
        while True:
            self._answered = False
            delay = random.uniform(0.1, 1.0)
            try:
                async with grpc.aio.insecure_channel(gateway, options=KEEPALIVE) as channel:
                    await self._connect(DeviceLinkServiceStub(channel))
            except grpc.aio.AioRpcError as error:
                if error.code() not in PASSING:
                    raise
                attempt = 0 if self._answered else attempt + 1
                delay = retry_delay(error, attempt)
                print(f"{error.code().name}: {error.details()}; connecting again in {delay:.1f} s")
            await asyncio.sleep(delay)

    async def _connect(self, stub: DeviceLinkServiceStub) -> None:
        """One stream, from Hello to its end."""
        outbox: asyncio.Queue[pb.ConnectRequest] = asyncio.Queue(maxsize=WINDOW)

        async def requests() -> AsyncIterator[pb.ConnectRequest]:
            hello = pb.Hello(device=self._device, stream_id=self._queue.stream_id, applied_revision=self._revision)
            yield pb.ConnectRequest(hello=hello)
            while True:
                yield await outbox.get()

        call = stub.Connect(requests())
        sender: asyncio.Task[None] | None = None
        try:
            async for response in call:
                self._answered = True
                kind = response.WhichOneof("message")
                if kind == "welcome":
                    self._acknowledged(response.welcome.last_durable_sequence)
                    sender = asyncio.create_task(self._send(outbox, self._durable))
                elif kind == "ack":
                    log_rejected(response.ack.rejected)
                    self._acknowledged(response.ack.last_durable_sequence)
                elif kind == "config_update":
                    report = self._apply(response.config_update)
                    await outbox.put(pb.ConnectRequest(config_report=report))
                elif kind == "sequence_gap":
                    raise RuntimeError(f"the gateway misses batch {response.sequence_gap.expected_sequence}: the queue has a hole")
                elif kind == "draining":
                    print("the gateway is being stopped")
        finally:
            call.cancel()
            if sender:
                sender.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await sender

    async def _send(self, outbox: asyncio.Queue[pb.ConnectRequest], sent: int) -> None:
        """Batches in order, never more than the window ahead of the acknowledgements."""
        unacknowledged: deque[int] = deque()
        while True:
            self._wake.clear()
            while unacknowledged and unacknowledged[0] <= self._durable:
                unacknowledged.popleft()
            for sequence, batch in list(self._queue.after(sent, limit=WINDOW - len(unacknowledged))):
                # A gateway that came back without its data misses what it had acknowledged, and what is gone here.
                lost = sequence - sent - 1
                await outbox.put(pb.ConnectRequest(batch=pb.LinkBatch(sequence=sequence, batch=batch, lost_batches=lost)))
                unacknowledged.append(sequence)
                sent = sequence
            await self._wake.wait()

    def _acknowledged(self, sequence: int) -> None:
        self._durable = sequence
        self._queue.forget(sequence)
        self._wake.set()

    def _apply(self, update: pb.ConfigUpdate) -> pb.ConfigReport:
        """Takes a configuration, or says why not."""
        config = json_format.MessageToDict(update.config)
        interval_s = config.get("interval_s")
        if not isinstance(interval_s, (int, float)) or not 0.01 <= interval_s <= 3600:
            detail = f"interval_s is {interval_s!r}: 0.01 to 3600 seconds are possible"
            print(f"revision {update.revision} is refused: {detail}")
            return pb.ConfigReport(revision=update.revision, outcome=pb.CONFIG_OUTCOME_REJECTED, detail=detail)
        self._interval_s, self._revision = float(interval_s), update.revision
        print(f"revision {update.revision} is applied: every {self._interval_s} s")
        return pb.ConfigReport(revision=update.revision, outcome=pb.CONFIG_OUTCOME_APPLIED)


async def run(args: argparse.Namespace) -> None:
    device = LinkDevice(args.device, Queue(args.queue or f"{args.device}.queue"))
    await asyncio.gather(device.measure(), device.stay_connected(args.gateway))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gateway", default=GATEWAY, metavar="HOST:PORT")
    parser.add_argument("--device", default="python-link-1", help="the device's id")
    parser.add_argument("--queue", metavar="FILE", help="default: DEVICE.queue")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
