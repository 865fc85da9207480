#!/usr/bin/env bash
# One command on a CUDA machine, under ten minutes: build, contract tests, sanitizer, GPU tests, benchmarks, one JSON in benchmarks/results/.
#   benchmarks/gpu_gate.sh [--dry-run] [--minutes N] [--results DIR]      PYTHON: the interpreter to use (default: python3)
# The exit code is non-zero if a test failed or fastalign gave a wrong result. Needs torch with CUDA, triton and pytest; no network.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu_gate.py "$@"
