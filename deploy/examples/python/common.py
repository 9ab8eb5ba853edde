"""What the examples share: a batch queue on disk, and when to try a call again."""

from __future__ import annotations

import random
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import compress, groupby, pairwise

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tidegate.v1 import batch_pb2

GATEWAY = "127.0.0.1:50051"
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

# A connection that is dead without a word, as after a router's restart, is noticed within half a minute.
KEEPALIVE = [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 10_000), ("grpc.http2.max_pings_without_data", 0)]

# The same call may do better in a moment. For anything else a person is needed.
PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
}


@dataclass(frozen=True)
class Row:
    """What all sensors measured at one instant."""

    time: datetime
    values: Sequence[float | None]  # None: this sensor did not measure then.


def to_micros(time: datetime) -> int:
    """Microseconds since the epoch, exactly: a float of seconds would round."""
    return (time - EPOCH) // timedelta(microseconds=1)


def make_batch(sensors: Sequence[str], units: Sequence[str], rows: Sequence[Row]) -> batch_pb2.Batch:
    """A frame for each run of rows that measured the same sensors: a time for each row, and a column for each sensor."""
    batch = batch_pb2.Batch()
    for measured, run in groupby(rows, key=lambda row: [value is not None for value in row.values]):
        frame_rows = list(run)
        if not any(measured):
            continue
        times = [to_micros(row.time) for row in frame_rows]
        frame = batch.frames.add(base_time_us=times[0], time_deltas_us=[b - a for a, b in pairwise(times)])
        for index in compress(range(len(sensors)), measured):
            values = batch_pb2.DoubleValues(values=[row.values[index] for row in frame_rows])
            frame.columns.add(sensor=sensors[index], unit=units[index], double_values=values)
    return batch


class Queue:
    """Batches in a file until the gateway has them, numbered 1, 2, 3 … without a hole.

    The stream id names this queue and is made with it. A file that is lost takes its stream id along, so that the numbers of
    the next one are not mistaken for its.
    """

    def __init__(self, path: str) -> None:
        # gRPC iterates over requests in a thread of its own, while ours waits for the response.
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        # AUTOINCREMENT: a number is never given again, also when all batches are gone.
        self._db.executescript(
            """
            CREATE TABLE IF NOT EXISTS batch (sequence INTEGER PRIMARY KEY AUTOINCREMENT, bytes BLOB NOT NULL);
            CREATE TABLE IF NOT EXISTS queue (one INTEGER PRIMARY KEY CHECK (one = 1), stream_id BLOB NOT NULL);
            """
        )
        self._db.execute("INSERT OR IGNORE INTO queue VALUES (1, ?)", (uuid.uuid4().bytes,))
        (self.stream_id,) = self._db.execute("SELECT stream_id FROM queue").fetchone()

    def append(self, batch: batch_pb2.Batch) -> None:
        """Adds a batch; when this returns, it is on disk."""
        self._db.execute("INSERT INTO batch (bytes) VALUES (?)", (batch.SerializeToString(),))

    def after(self, sequence: int, limit: int = -1) -> Iterator[tuple[int, batch_pb2.Batch]]:
        """The batches behind `sequence`, in order; at most `limit`."""
        query = "SELECT sequence, bytes FROM batch WHERE sequence > ? ORDER BY sequence LIMIT ?"
        for number, encoded in self._db.execute(query, (sequence, limit)):
            yield number, batch_pb2.Batch.FromString(encoded)

    def forget(self, up_to: int) -> None:
        """Deletes what is durable at the gateway."""
        (last,) = self._db.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence").fetchone()
        if up_to > last:
            # An old copy of the file, say from a backup: what it would number now are other batches than those of then.
            raise SystemExit("the queue is older than what the gateway has of it: move its file away to begin a new one")
        self._db.execute("DELETE FROM batch WHERE sequence <= ?", (up_to,))

    def __len__(self) -> int:
        (count,) = self._db.execute("SELECT count(*) FROM batch").fetchone()
        return int(count)


def retry_delay(error: grpc.RpcError, attempt: int) -> float:
    """Seconds to wait before the next try: doubling, with jitter, and at least what the gateway asks for."""
    backoff = min(60.0, 0.5 * 2.0**attempt) * random.uniform(0.5, 1.0)
    return asked_delay(error) + backoff


def asked_delay(error: grpc.RpcError) -> float:
    """RetryInfo.retry_delay in seconds; 0 when there is none."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.ToTimedelta().total_seconds())
    return 0.0


def log_rejected(rejected: Sequence[batch_pb2.RejectedBatch]) -> None:
    """Rejected batches are not stored and never will be: somebody should know."""
    for batch in rejected:
        reason = batch_pb2.RejectReason.Name(batch.reason)
        print(f"batch {batch.sequence} was rejected: {reason} {batch.field}: {batch.message}")
