# The two commands of the README. Each needs only Python (>= 3.10), g++ and this checkout, and makes its own virtual environment.
# PYTHON: the interpreter to start from.
PYTHON ?= python3
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: demo test clean kernels packages FORCE

# Of all that pip says, what it is at.
SHOW = awk '/^(Collecting|Installing)/ { print "  packages: " $$0; fflush() }'

# Trains a small model by DPO on a text task with a known reward and shows what changed. The environment is made at the first call, and again when what
# it is made from changes; a changed kernel is compiled at any call.
demo: .venv-demo/ready
	@.venv-demo/bin/python setup.py --quiet build_ext --inplace
	.venv-demo/bin/fastalign demo

# Every check that needs no GPU: lint, all backends (C++, interpreted Triton, emulated CUDA C++), ahead-of-time compilation, a training run. Always in a
# fresh environment, and with the CUDA kernels, which its checks read.
test: .venv-test/ready
	.venv-test/bin/python tests/run_all.py

.venv-demo/ready: EXTRAS = train
.venv-test/ready: EXTRAS = dev,tensorboard
.venv-test/ready: export FASTALIGN_CUDA = 1
.venv-test/ready: FORCE
# For the ahead-of-time stage, beside the pinned one; tests/run_all.py says what each is for. 3.3.1 has no wheels for Python 3.14.
.venv-test/ready: TRITONS = 3.6.0 3.3.1
# Trainers whose functions the adapters are compared with, without what they depend on; all of them are plain Python, whatever their wheels are named after.
# tests/run_all.py puts them in front of the path.
.venv-test/ready: TRAINERS = verl==0.9.1 openrlhf==0.11.2 llamafactory==0.9.5 trl==0.18.0

# No isolation and no torch in the build: one torch, the one that constraints.txt names, and packages are installed while the compilers work.
.venv-demo/ready .venv-test/ready: .venv-%/ready: Makefile constraints.txt pyproject.toml setup.py
	@echo "[1/2] a virtual environment in .venv-$*"
	@$(PYTHON) -m venv --clear .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --constraint constraints.txt setuptools wheel pybind11 ninja
	@echo "[2/2] kernels and packages, side by side"
	@$(MAKE) --no-print-directory -j2 kernels packages VENV=.venv-$* EXTRAS=$(EXTRAS) TRITONS="$(TRITONS)" TRAINERS="$(TRAINERS)"
	@touch $@

kernels:
	@env -u MAKEFLAGS NINJA_STATUS="  kernels %f/%t: " $(VENV)/bin/python setup.py --quiet build_ext --inplace

# fastalign itself without its kernels, which the other target puts in their place.
packages:
	@FASTALIGN_EXTENSION=0 $(VENV)/bin/python -m pip install --no-compile --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]' | $(SHOW)
	@for version in $(TRITONS); do \
	  $(VENV)/bin/python -m pip install --quiet --no-compile --no-deps --target $(VENV)/triton-$$version triton==$$version || exit 1; \
	done
	@if [ -n "$(TRAINERS)" ]; then \
	  $(VENV)/bin/python -m pip install --quiet --no-compile --no-deps --only-binary :all: --ignore-requires-python --python-version 3.11 \
	    --platform manylinux1_x86_64 --target $(VENV)/trainers $(TRAINERS); \
	fi

clean:
	rm -rf build dist *.egg-info .venv-demo .venv-test fastalign/*.so
