#!/usr/bin/env bash
# Builds, on a machine without a GPU, what a GPU machine needs to skip its build: the extension for its Python and its GPU, and the variants that
# stage 2 of the gate measures. Then says what to carry and how large it is.
#   benchmarks/gpu_prepare.sh [--python 3.12] [--archs 90] [--no-variants]
# PYTHON: the interpreter that builds (default: python3; needs setuptools, pybind11, ninja). PYTHON_INCLUDE: the folder with Python.h of the GPU
# machine's Python; without it, python3.12 (or what --python says) is asked. nvcc is needed, a GPU or torch is not.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu_prepare.py "$@"
