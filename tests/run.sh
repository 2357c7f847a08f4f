#!/bin/sh
# sh tests/run.sh [ARGUMENTS]: set up once, then run all tests; ARGUMENTS go to pytest.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(sh "$root/tools/env.sh" example,testing,tracking,migrate,dev)
cd "$root"
# One process per core, and one thread in each: more would wait for each other. In the order of the
# folders: the longest files have few tests, and by their number they would come last, beside idle
# cores.
OMP_NUM_THREADS=1 exec "$python" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
