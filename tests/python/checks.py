"""What the scripts in this folder share: one line a check, and an end at the first that fails."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


class Failed(Exception):
    """A check that did not hold, in words."""


def equal(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise Failed(f"{what}: expected {expected!r}, found {found!r}")


def true(what: str, holds: object) -> None:
    if not holds:
        raise Failed(what)


def eventually(what: str, probe: Callable[[], T], expected: T, timeout: float = 20.0) -> None:
    """Waits until `probe` gives what is expected."""
    deadline = time.monotonic() + timeout
    while (found := probe()) != expected:
        if time.monotonic() > deadline:
            raise Failed(f"{what}: expected {expected!r} within {timeout} s, last found {found!r}")
        time.sleep(0.02)


def run(checks: Iterable[tuple[str, Callable[[], Any]]]) -> int:
    """The exit code: 0 when all hold."""
    passed = 0
    for name, check in checks:
        try:
            note = check()
        except Failed as failed:
            print(f"FAIL {name}: {failed}", flush=True)
            return 1
        except Exception:
            print(f"FAIL {name}:\n{traceback.format_exc()}", flush=True)
            return 1
        print(f"ok   {name}{f' ({note})' if note else ''}", flush=True)
        passed += 1
    print(f"{passed} checks passed", flush=True)
    sys.stdout.flush()
    return 0
