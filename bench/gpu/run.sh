#!/usr/bin/env bash
# Builds what there is to build, checks the kernels on a machine with a CUDA device, times them and
# the engine, and writes one JSON file:
#   bench/gpu/run.sh [FILE] [--parts checks peers tests timings engine tune] [--only REGEX]
# FILE is build/gpu.json if not given; without --parts all run but tune. Needs python3 with torch,
# triton and numpy, and no network. Used if there: pytest and pytest-xdist; a C++ compiler, cmake,
# ninja, pybind11 and transformers, which the engine needs; flashinfer, to be timed beside.
# Ends within 9 minutes: status 0 if all that ran was right, 2 without a device.
set -euo pipefail
file=build/gpu.json
if [[ $# -gt 0 && $1 != --* ]]; then
  file=$1
  shift
fi
file=$(realpath -m "$file")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=.:python:tests${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TRITON_INTERPRET=0
exec timeout --kill-after=10 525 "${PYTHON:-python3}" -m bench.gpu "$file" "$@"
