#!/bin/sh
# Runs the tests of the runtime and those of the decoder's graphs with other versions of onnxruntime: the oldest that pyproject.toml allows,
# 1.23.2, the last one for Python 3.10 (which JetPack 6 has), and the newest. Each is put before the one in .venv; nothing is installed there.
# VERSIONS="1.24.4 newest" names the versions to try; arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
oldest=$(sed -n 's/.*"onnxruntime>=\([0-9.]*\)".*/\1/p' pyproject.toml)
failed=
for version in ${VERSIONS:-"$oldest.0" 1.23.2 newest}; do
  folder=$PWD/build/onnxruntimes/$version
  wanted=onnxruntime
  [ "$version" = newest ] || wanted="onnxruntime==$version"
  [ -d "$folder" ] && [ "$version" != newest ] ||
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$folder" "$wanted"
  echo "== $(cd "$folder" && ls -d onnxruntime-*.dist-info)"
  PYTHONPATH=$folder .venv/bin/python -m pytest -p no:cacheprovider tests/fastvlm_edge tests/convert/graphs "$@" || failed="$failed $version"
done
[ -z "$failed" ] || { echo "$0: failed on$failed" >&2; exit 1; }
