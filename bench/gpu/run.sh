#!/usr/bin/env bash
# Checks the Triton kernels on a machine with a CUDA device, times them, and writes one JSON file:
#   bench/gpu/run.sh [file]        (default: build/gpu.json)
# Needs python3 with torch, triton and numpy; pytest is used if it is there. Neither network nor the
# C++ extension. Ends within 9 minutes: status 0 if all that ran was right, 2 without a device.
set -euo pipefail
file=$(realpath -m "${1:-build/gpu.json}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=.:python:tests PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TRITON_INTERPRET=0
exec timeout --kill-after=10 525 "${PYTHON:-python3}" -m bench.gpu "$file"
