# The two commands of the README. Each needs only Python (>= 3.10), g++ and this checkout; each makes its own fresh virtual environment.
# PYTHON: the interpreter to start from.
PYTHON ?= python3

.PHONY: demo test clean

# Trains a small model by DPO on a text task with a known reward and shows what changed, in about three minutes on two cores.
demo: .venv-demo/ready
	.venv-demo/bin/fastalign demo

# Every check that needs no GPU: lint, all backends (C++, interpreted Triton, emulated CUDA C++), ahead-of-time compilation, a training run.
test: .venv-test/ready
	.venv-test/bin/python tests/run_all.py

# The build runs inside the environment (no isolation), so torch is the one that constraints.txt names and no second copy is fetched.
.venv-demo/ready .venv-test/ready: .venv-%/ready: FORCE
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel pybind11 ninja numpy
	.venv-$*/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	for version in $(TRITONS); do \
	  .venv-$*/bin/python -m pip install --quiet --no-deps --target .venv-$*/triton-$$version triton==$$version || exit 1; \
	done
	touch $@
.venv-demo/ready: EXTRAS = train
.venv-test/ready: EXTRAS = dev,tensorboard
# For the ahead-of-time stage, beside the pinned one; tests/run_all.py says what each is for. 3.3.1 has no wheels for Python 3.14.
.venv-test/ready: TRITONS = 3.6.0 3.3.1
FORCE:

clean:
	rm -rf build dist *.egg-info .venv-demo .venv-test fastalign/*.so
