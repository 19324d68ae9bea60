#!/bin/sh
# Runs the tests of the runtime with every Python from 3.10 on that this machine has, on PATH or in pyenv. Each gets a virtual environment
# with the runtime and the server, pytest, hypothesis, onnx (for the tiny models of the tests), the packages that draw pictures and setuptools (to build a
# wheel), but without PyTorch.
# PYTHONS="3.10 3.12" names the versions to try; arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
found=0 failed=
for version in ${PYTHONS:-3.10 3.11 3.12 3.13 3.14}; do
  for python in "python$version" "$HOME"/.pyenv/versions/"$version".*/bin/python; do
    "$python" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null || continue
    venv=build/pythons/$version
    echo "== $("$python" --version)"
    [ -x "$venv/bin/pytest" ] || "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --editable ".[serve]" pytest hypothesis onnx ml_dtypes matplotlib scikit-image "setuptools>=77" \
      "llguidance>=1.6,<2" jsonschema openai "av>=15"
    "$venv/bin/python" -m pytest -p no:cacheprovider tests/fastvlm_edge "$@" || failed="$failed $version"
    found=$((found + 1))
    break
  done
done
[ "$found" -gt 0 ] || { echo "$0: found no Python among ${PYTHONS:-3.10 to 3.14}" >&2; exit 1; }
[ -z "$failed" ] || { echo "$0: failed on$failed" >&2; exit 1; }
echo "== passed on $found versions of Python"
