# Everything that development needs. `make setup` creates .venv; every target but `demo` runs in it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LEAN := build/lean
CLIENTS := build/clients
RAY := build/ray
KUBERAY := build/kuberay/rayjob.yaml
KSERVE := https://raw.githubusercontent.com/kserve/kserve/v0.20.0/config/crd/full/serving.kserve.io_inferenceservices.yaml
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
READY := $(VENV)/.ready
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)

.PHONY: setup demo test test-slow test-gpu test-arm64 test-pythons test-onnxruntimes test-quiet test-camera test-browser test-clients test-ray lint types docs dist bench bench-peers bench-gpu clean

setup: $(READY)

# timm is only a reference to compare with; it names torchvision as a need, which it does not have for this model.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable ".[convert,rtx,test,bench,docs]"
	$(PIP) --no-deps timm
	touch $(READY)

# In an environment of its own, with the runtime only: what a device installs.
demo: $(LEAN)/.ready
	$(LEAN)/bin/fastvlm-edge demo

$(LEAN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LEAN)
	$(LEAN)/bin/pip install --quiet --constraint constraints.txt --editable .
	touch $(LEAN)/.ready

# Two processes, each of which takes whole files. Ends with the slowest twenty; a test that hangs is cut off after ten minutes.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=20 --durations-min=1 --timeout=600

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu tests/gpu

# An arm64 Debian under qemu-user answers the demo questions from a bundle; needs root, debootstrap and qemu-user-static.
test-arm64: $(READY)
	$(BIN)/python -m pytest -m arm64 tests/arm64

# The runtime's tests on every Python of this machine, without PyTorch.
test-pythons:
	tests/pythons.sh

# The same and the decoder's graphs with the oldest supported onnxruntime, the one of JetPack 6, and the newest.
test-onnxruntimes: $(READY)
	tests/onnxruntimes.sh

# The commands under strace: no network, and no file that nobody asked for. Installs strace on Debian and Ubuntu.
test-quiet: $(READY)
	command -v strace || ($(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq strace)
	strace -qq -o /dev/null true
	$(BIN)/python -m pytest -n 2 -m quiet tests/test_quiet.py

# Cameras' readers on real GStreamer elements and a real RTSP server. Installs them on Debian and Ubuntu.
GSTREAMER := python3-gi gir1.2-gst-plugins-base-1.0 gir1.2-gst-rtsp-server-1.0 gstreamer1.0-tools gstreamer1.0-plugins-base \
	gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly gstreamer1.0-libav
test-camera: $(READY)
	dpkg -s $(GSTREAMER) >/dev/null 2>&1 || ($(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq $(GSTREAMER))
	$(BIN)/python -m pytest -m camera tests/fastvlm_edge/camera

# The page of `serve` in headless Chromium with its fake camera. Installs Chromium and its driver on Debian and Ubuntu.
test-browser: $(READY)
	command -v chromedriver || ($(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium chromium-driver)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m browser tests/browser

# The server with programs of others, in an environment of their own, and the examples for Triton, KServe and Ray Serve. That with a page
# needs Chromium, which test-browser installs. The one with KServe's definitions needs the network; without it that test is skipped. So is that of
# the Grafana board without Prometheus: `apt-get install prometheus` on Debian and Ubuntu, which also starts it at port 9090 as a service.
test-clients: $(READY) $(CLIENTS)/.ready
	$(BIN)/python -m pytest -m clients tests/clients

$(CLIENTS)/.ready: Makefile
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet langchain-openai live-vlm-webui==0.4.0 "tritonclient[grpc]" "ray[serve]" --editable ".[serve]"
	curl -fsSL -o $(CLIENTS)/kserve.yaml $(KSERVE) || true
	touch $(CLIENTS)/.ready

# Batches on a Ray cluster of several processes. Ray has an environment of its own, because with pandas and pyarrow it has 0.5 GB. The manifest
# for Kubernetes is checked against KubeRay's definition of a RayJob, which needs the network; without it that test is skipped.
test-ray: $(READY) $(RAY)/.ready
	test -f $(KUBERAY) || curl -fsSL --create-dirs -o $(KUBERAY) \
		https://raw.githubusercontent.com/ray-project/kuberay/v1.7.0/ray-operator/config/crd/bases/ray.io_rayjobs.yaml || true
	$(BIN)/python -m pytest -m ray tests/ray_cluster

$(RAY)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip install --quiet --constraint constraints.txt --editable ".[ray]" "ray[data]"
	touch $(RAY)/.ready

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types

types: $(READY)
	$(BIN)/mypy -p fastvlm_edge -p tests -p benchmarks -p examples -p optimum

# The site, in build/site.
docs: $(READY)
	$(BIN)/zensical build --strict

# What a release uploads; CONTRIBUTING.md has the steps.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

bench: $(READY)
	$(BIN)/python -m benchmarks.cpu

bench-peers: $(READY)
	$(BIN)/python -m benchmarks.peers.run

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.peers.run --device gpu

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
