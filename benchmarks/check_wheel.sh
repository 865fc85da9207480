#!/usr/bin/env bash
# Builds the sdist and, from it, the wheel; installs the wheel beside one torch after another into fresh environments that see no compiler, and runs a few
# ops there. By hand: it compiles everything once, and downloads torch.
#
#   benchmarks/check_wheel.sh [DIR]       DIR: made, and keeps sdist and wheel; default: a temporary directory, removed at the end
#
# PYTHON: the interpreter, with the packages build, setuptools, pybind11 and ninja. TORCH: versions of torch; default: the one of constraints.txt.
# FASTALIGN_CUDA, FASTALIGN_ARCHS: as for any build. WHEEL: a wheel that is there already; nothing is built then.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=${1:-$work/dist}
if [ -n "${1:-}" ]; then
  [ ! -e "$out" ] || { echo "check_wheel.sh: error: $out exists; name a directory that does not" >&2; exit 2; }
fi

build() {
  echo "-- building sdist and wheel"
  mkdir "$work/source"
  for name in setup.py pyproject.toml MANIFEST.in README.md LICENSE csrc fastalign; do cp -r "$root/$name" "$work/source"; done
  find "$work/source" \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -rf {} +
  "$python" -m build --no-isolation --outdir "$out" "$work/source" > "$work/log" 2>&1 || { tail -40 "$work/log" >&2; exit 1; }
  ls -l "$out"
}

[ -n "${WHEEL:-}" ] || build
wheel=${WHEEL:-$(ls "$out"/*.whl)}

for version in ${TORCH:-$(sed -n 's/^torch==//p' "$root/constraints.txt")}; do
  echo "-- beside torch $version, without a compiler"
  "$python" -m venv --clear "$work/bare"
  grep -v '^torch==' "$root/constraints.txt" > "$work/constraints.txt"
  "$work/bare/bin/python" -m pip install --quiet --only-binary :all: --constraint "$work/constraints.txt" "torch==$version" "$wheel"
  mkdir -p "$work/elsewhere"
  (cd "$work/elsewhere" && env -i PATH="$work/bare/bin" HOME="$work" python "$root/benchmarks/check_wheel.py")
done
echo "the wheel is right"
