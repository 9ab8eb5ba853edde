#!/bin/sh
# Makes the stubs in ./tidegate from the .proto files. Run it again when they change.
set -eu
cd "$(dirname "$0")"
proto=../../../proto
python3 -m grpc_tools.protoc -I "$proto" --python_out=. --pyi_out=. --grpc_python_out=. "$proto"/tidegate/v1/*.proto
