#!/bin/sh
# The runtime's tests on every Python from 3.10 on that is here, on PATH or in pyenv: a venv each, the lean runtime, pytest, onnx (for
# the tiny models of the tests) and what draws pictures, no PyTorch.
set -eu
cd "$(dirname "$0")/.."
found=0 failed=
for minor in 10 11 12 13 14; do
  for python in "python3.$minor" "$HOME"/.pyenv/versions/3."$minor".*/bin/python; do
    "$python" -c "import sys, venv; sys.exit(sys.version_info[:2] != (3, $minor))" 2>/dev/null || continue
    venv=build/pythons/3.$minor
    echo "== $("$python" --version)"
    [ -x "$venv/bin/pytest" ] || {
      "$python" -m venv --clear "$venv"
      "$venv/bin/pip" install --quiet --disable-pip-version-check pytest onnx ml_dtypes matplotlib scikit-image
    }
    "$venv/bin/pip" install --quiet --disable-pip-version-check --editable .
    "$venv/bin/python" -m pytest -p no:cacheprovider tests/fastvlm_edge "$@" || failed="$failed 3.$minor"
    found=$((found + 1))
    break
  done
done
[ "$found" -gt 0 ] || { echo "$0: no Python from 3.10 on is here" >&2; exit 1; }
[ -z "$failed" ] || { echo "$0: failed on$failed" >&2; exit 1; }
echo "== passed on $found versions of Python"
