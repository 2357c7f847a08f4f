#!/bin/sh
# sh tools/mutation.sh [--jobs N] [--table] [MODULE ...]: put deliberate faults into the library, and
# list those that no test notices. Hours for all of it; `sh tools/mutation.sh scaler` takes minutes.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(sh "$root/tools/env.sh" example,testing,migrate,dev,mutation)
cd "$root"
exec "$python" tools/mutation "$@"
