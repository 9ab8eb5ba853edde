"""Makes the stubs of proto/ when they are not there yet, and puts them on the path. Import it before `tidegate.v1`."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"


def ensure() -> Path:
    """The folder of the stubs: one for each state of the .proto files, so that none is ever stale."""
    files = sorted(PROTO.glob("tidegate/v1/*.proto"))
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    target = ROOT / "target" / "python-stubs" / state
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent))
        include = str(Path(protoc.__file__).parent / "_proto")
        arguments = ["protoc", f"-I{PROTO}", f"-I{include}", f"--python_out={made}", f"--grpc_python_out={made}"]
        if protoc.main(arguments + [str(file) for file in files]) != 0:
            raise SystemExit("the stubs cannot be made from proto/")
        try:
            os.rename(made, target)
        except OSError:  # Another process was faster.
            shutil.rmtree(made)
    return target


sys.path.insert(0, str(ensure()))
