#!/bin/sh
# sh tests/run.sh [ARGUMENTS]: set up once, then run all tests; ARGUMENTS go to pytest.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(sh "$root/tools/env.sh" example,testing,tracking)
cd "$root"
exec "$python" -m pytest "$@"
