#!/usr/bin/env sh
# All tables, with machine, versions and date: benchmarks/run.sh [FOLDER] (docs/explanation/evidence).
# Under 20 minutes on 2 cores. Needs the extra `example`, accelerate, lightning-fabric, ttach and matplotlib; PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-docs/explanation/evidence}
"$python" benchmarks/dropins.py --out "$out"
"$python" benchmarks/tuned.py --out "$out"
PYTHONPATH=src:examples
export PYTHONPATH
"$python" benchmarks/tta.py --out "$out"
"$python" benchmarks/training.py --out "$out"
"$python" benchmarks/scale.py --out "$out"
"$python" benchmarks/gpu.py --out "$out"
"$python" benchmarks/planted.py --out "$out"
"$python" benchmarks/verify.py --out "$out"
# By itself, for it takes half an hour: benchmarks/replay.py
"$python" benchmarks/plots.py "$out"
"$python" benchmarks/scan.py --json "$out/scan.json"
