#!/usr/bin/env bash
# What a GPU has to say, as two commands, each with its time: stage 1 (540 s) for correctness and the bandwidth table, stage 2 (180 s) for tuning.
#   benchmarks/gpu_gate.sh [--dry-run] [--stage 1|2] [--results DIR] [--revision REV]        without --stage: one after the other
# PYTHON: the interpreter to use (default: python3). Results go to a folder of their own in DIR (default: $OUT if set, else benchmarks/results), and
# are there after every step and every case. Needs torch with CUDA, triton, pytest, pytest-xdist and pytest-timeout; no network. Built before by
# benchmarks/gpu_prepare.sh and carried along, the extension is not built again. The exit code is non-zero if anything failed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" benchmarks/gpu_gate.py "$@"
