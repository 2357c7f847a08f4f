#!/bin/sh
# sh examples/cv_classification/run.sh [ARGUMENTS]: set up once, then run the demo with ARGUMENTS;
# or any other command of the example: run.sh train --config my.yaml
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(sh "$root/tools/env.sh" example,testing)
case "${1:-}" in
    train | evaluate | predict | report | demo) ;;
    *) set -- demo "$@" ;;
esac
PYTHONPATH="$root/examples${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m cv_classification "$@"
