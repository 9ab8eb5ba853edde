#!/usr/bin/env python3
"""Reads what `tidegate export` wrote as Parquet with pyarrow, which shares no code with the gateway.

    parquet_check.py csv FILE.parquet FILE.csv --none EMPTY.parquet
    parquet_check.py equal FILE.parquet FILE.parquet --rows N
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from checks import equal, run, true

SCHEMA = {
    "time": pa.timestamp("us", tz="UTC"),
    "device": pa.string(),
    "sensor": pa.string(),
    "unit": pa.string(),
    "value": pa.float64(),
    "int64_value": pa.int64(),
    "text_value": pa.string(),
}
# What the test's sensors hold.
KINDS = {"count": "int64", "flow": "double", "on": "bool", "state": "text"}


def as_in_csv(table: pa.Table) -> Iterator[list[object]]:
    for row in table.to_pylist():
        kind = KINDS[row["sensor"]]
        if kind == "int64":
            equal("value of an integer", row["value"], float(row["int64_value"]))
            value: object = row["int64_value"]
        elif kind == "text":
            equal("value of a text", (row["value"], row["int64_value"]), (None, None))
            value = row["text_value"]
        else:
            equal("what else a number has", (row["int64_value"], row["text_value"]), (None, None))
            value = row["value"]
        yield [row["time"].strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z", row["device"], row["sensor"], row["unit"], value]


def parsed(line: list[str]) -> list[object]:
    read = {"int64": int, "double": float, "bool": lambda text: float(text == "true"), "text": str}
    return [*line[:4], read[KINDS[line[2]]](line[4])]


def check_csv(parquet: str, expected: str, none: str) -> str:
    table = pq.read_table(parquet)
    equal("the schema", {field.name: field.type for field in table.schema}, SCHEMA)
    with open(expected, newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))[1:]
    true("there are readings", lines)
    equal("the rows", list(as_in_csv(table)), [parsed(line) for line in lines])
    empty = pq.read_table(none)
    equal("an export of nothing", (empty.num_rows, empty.schema.names), (0, list(SCHEMA)))
    return f"{len(lines)} readings"


def check_equal(one: str, other: str, rows: int) -> str:
    tables = [pq.read_table(one), pq.read_table(other)]
    equal("rows", [table.num_rows for table in tables], [rows, rows])
    true("the same readings", tables[0].equals(tables[1]))
    seconds = pc.count_distinct(tables[0]["time"]).as_py()
    equal("each time once", seconds, rows)
    groups = pq.ParquetFile(one).metadata
    statistics = [groups.row_group(index).column(0).statistics for index in range(groups.num_row_groups)]
    true("the groups have statistics, by which readers find times", all(found and found.has_min_max for found in statistics))
    return f"{rows} readings in {groups.num_row_groups} groups"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["csv", "equal"])
    parser.add_argument("files", nargs=2)
    parser.add_argument("--none")
    parser.add_argument("--rows", type=int)
    args = parser.parse_args()
    if args.mode == "csv":
        return run([("Parquet is as CSV", lambda: check_csv(*args.files, args.none))])
    return run([("a resumed file is as one that was not", lambda: check_equal(*args.files, args.rows))])


if __name__ == "__main__":
    sys.exit(main())
