"""Bundles: one with the packages that are installed here, started by a Python that has none of them, and corner cases with tiny wheels."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastvlm_edge import FastVLM, FastVLMError, bundle_entry, cli
from fastvlm_edge.bundling import start, unit
from fastvlm_edge.bundling.archive import HEADER_BYTES, source_files, write_bundle
from fastvlm_edge.bundling.start import Bundle, BundleError, ensure
from fastvlm_edge.bundling.wheels import RUNTIME, SERVE, STRUCTURED, Wheel, collect_wheels, requirements
from fastvlm_edge.machine.boards.systems import SYSTEMS, BundleTarget
from fastvlm_edge.machine.boards.targets import bundle_target
from fastvlm_edge.server.settings import Settings
from tests.support.fake_model import build_model
from tests.support.wheels import BUNDLED, tiny_wheel, wheel_of_installed

ROOT = Path(__file__).resolve().parents[3]
HERE = dataclasses.replace(bundle_target("x86_64"), machine=platform.machine(), glibc=(2, 17))
QUESTION = ("--prompt", "What is it?", "--max-new-tokens", "6")


# A bundle that runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "wheels").mkdir()
    for name in BUNDLED:
        wheel_of_installed(name, folder / "wheels")
    command = ["bundle", str(model_dir), "--target", "x86_64", "--wheels", str(folder / "wheels"), "-o", str(folder / "app")]
    if platform.machine() != "x86_64":
        pytest.skip("the bundle of this test is for x86_64; make test-arm64 starts one for Arm")
    assert cli.main(command) == 0
    return folder / "app"


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with a Python that has no packages, a `uname`, and a state folder that all tests share."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "bin").mkdir()
    version = "{}.{}".format(*sys.version_info)
    (folder / "bin" / f"python{version}").symlink_to(os.path.realpath(f"{sys.base_prefix}/bin/python{version}"))
    for tool in ("uname", "env"):
        (folder / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    return {"PATH": str(folder / "bin"), "HOME": str(folder), "FASTVLM_EDGE_STATE": str(folder / "state")}


@pytest.fixture(scope="session")
def run(made: Path, bare: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(made), *arguments], env={**bare, **environment}, cwd=elsewhere, capture_output=True, text=True)

    return call


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_a_bundle_answers_with_the_tokens_of_the_installed_toolkit_in_a_python_without_packages(run: Run, model_dir: Path) -> None:
    with FastVLM.load(model_dir, "ort") as vlm:
        expected = list(vlm.generate("What is it?", max_new_tokens=6).token_ids)
    for words in ((), ("model",)):
        done = run("run", *words, *QUESTION, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["token_ids"] == expected


def test_only_the_first_start_unpacks(run: Run, bare: dict[str, str]) -> None:
    run("prepare")
    state = Path(bare["FASTVLM_EDGE_STATE"])
    before = {path: path.stat().st_ino for part in ("runtime-*", "model-*") for path in state.glob(f"{part}/*")}
    done = run("run", *QUESTION)
    assert before and "unpacking" not in done.stderr
    assert before == {path: path.stat().st_ino for part in ("runtime-*", "model-*") for path in state.glob(f"{part}/*")}


def test_every_command_of_a_board_imports_from_a_bundle_alone(run: Run, bare: dict[str, str]) -> None:
    run("prepare")
    runtime = next(Path(bare["FASTVLM_EDGE_STATE"]).glob("runtime-*/fastvlm_edge")).parent
    commands = sorted(set(cli.COMMANDS) - set(bundle_entry.NOT_HERE))
    python = next(Path(bare["PATH"]).glob("python3*"))
    code = f"""
import sys
from importlib import import_module
sys.path.insert(0, {str(runtime)!r})
for command in {commands!r}:
    import_module(f"fastvlm_edge.commands.{{command}}")
import fastvlm_edge.engines.build
assert not {{"torch", "onnx", "huggingface_hub"}} & set(sys.modules)
"""
    done = subprocess.run([str(python), "-I", "-c", code], env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(run("doctor", "--json").stdout)
    assert run("--version").stdout.startswith("fastvlm-edge ")


def test_structured_answers_are_in_a_bundle(run: Run, bare: dict[str, str]) -> None:
    run("prepare")
    runtime = next(Path(bare["FASTVLM_EDGE_STATE"]).glob("runtime-*/fastvlm_edge")).parent
    model = next(Path(bare["FASTVLM_EDGE_STATE"]).glob("model-*/fastvlm.json")).parent
    python = next(Path(bare["PATH"]).glob("python3*"))
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(runtime)!r})
from fastvlm_edge.generation.answer_format import answer_format
from fastvlm_edge.generation.grammar import compile_grammar
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import read_manifest
model = Path({str(model)!r})
state = compile_grammar(TextTokenizer(model / "tokenizer.json"), read_manifest(model), answer_format(choices=["yes"])).begin()
assert state.forced(9)
"""
    done = subprocess.run([str(python), "-I", "-c", code], env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@contextmanager
def _serving(command: list[str], environment: dict[str, str]) -> Iterator[str]:
    """The address of a server, once it is ready."""
    with subprocess.Popen(command, env=environment, cwd="/", stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            lines: list[str] = []
            while not (found := re.search(r" at (https?://\S+)/v1;", lines[-1] if lines else "")):
                lines.append(server.stderr.readline())
                assert lines[-1], "".join(lines)
            yield found.group(1)
        finally:
            server.terminate()


def test_a_bundle_serves_its_model_and_the_page(made: Path, run: Run, bare: dict[str, str]) -> None:
    run("prepare")
    with _serving([str(made), "serve"], {**bare, "FASTVLM_EDGE_PORT": "0"}) as address:
        assert urllib.request.urlopen(f"{address}/page.js").read() == (ROOT / "fastvlm_edge/server/page/page.js").read_bytes()
        body = json.dumps({"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 6}).encode()
        asked = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(asked))
    assert answer["usage"]["completion_tokens"] > 0


def test_a_user_without_rights_serves_what_root_has_prepared(made: Path, bare: dict[str, str]) -> None:
    """As the unit of `install --serve` does: nothing but the cache may be written."""
    python = f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    if os.geteuid() != 0 or not os.access(python, os.X_OK) or not shutil.which("setpriv"):
        pytest.skip("needs root, setpriv, and a Python that every user may run")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "cache").mkdir()
        shutil.chown(folder / "cache", 65534, 65534)
        app = Path(shutil.copy(made, folder / "app"))
        environment = {**bare, "PATH": "/usr/bin:/bin", "FASTVLM_EDGE_STATE": f"{folder}/state", "FASTVLM_EDGE_CACHE": f"{folder}/cache"}
        subprocess.run([app, "prepare"], env=environment, check=True, capture_output=True)
        rights = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
        options = {"FASTVLM_EDGE_PORT": "0", "FASTVLM_EDGE_TLS": "self-signed"}
        with _serving([*rights, str(app), "serve"], environment | options) as address:
            trusting = ssl.create_default_context(cafile=f"{folder}/cache/tls/self-signed.pem")
            assert urllib.request.urlopen(f"{address}/health", context=trusting).status == 200


def test_the_engine_builder_imports_without_onnx_and_torch(run: Run) -> None:
    done = run("build")
    assert done.returncode == 1
    assert "GPU" in done.stderr and "bug" not in done.stderr and "No module" not in done.stderr


def test_the_question_may_be_an_argument_and_a_directory_that_is_missing_is_no_question(run: Run) -> None:
    expected = run("run", *QUESTION).stdout
    for words in (["What is it?"], ["model", "What is it?"]):
        done = run("run", *words, *QUESTION[2:])
        assert (done.returncode, done.stdout) == (0, expected), done.stderr
    for words in (["gone", "What is it?"], ["gone", "--prompt", "What is it?"]):
        done = run("run", *words)
        assert done.returncode == 1 and "gone is not a model directory: it does not exist" in done.stderr


@pytest.mark.parametrize("command", sorted(bundle_entry.NOT_HERE))
def test_what_is_no_part_of_a_bundle_says_so_in_one_line(run: Run, command: str) -> None:
    done = run(command, "x", "-o", "y")
    assert done.returncode == 1
    assert done.stderr.startswith("app: error: ") and "not part of a bundle" in done.stderr and done.stderr.count("\n") == 1
    assert command not in run("--help").stdout.split("usage")[1].replace("bundled", "").replace("fastvlm", "").split()


def test_a_damaged_unpacked_file_is_found_at_the_next_start_and_unpacked_again(run: Run, bare: dict[str, str]) -> None:
    run("prepare")
    state = Path(bare["FASTVLM_EDGE_STATE"])
    for pattern in ("runtime-*/numpy/version.py", "model-*/decoder.onnx"):
        path = next(state.glob(pattern))
        good = path.read_bytes()
        path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        done = run("run", *QUESTION)
        assert done.returncode == 0, done.stderr
        assert "damaged" in done.stderr and path.name in done.stderr
        assert path.read_bytes() == good


def test_licences_of_everything_can_be_read(run: Run, made: Path) -> None:
    listed = run("licenses").stdout
    for name in ("fastvlm-edge", *BUNDLED, "model"):
        assert re.search(rf"^{name}\s", listed, re.MULTILINE)
    assert "NumPy Developers" in run("licenses", "numpy").stdout
    assert all(row["files"] for row in _open(made).index["licences"])
    assert "no licence text of 'torch'" in run("licenses", "torch").stderr


def test_about_names_every_wheel_with_its_hash_and_none_of_them_is_a_framework(run: Run, made: Path) -> None:
    about = json.loads(run("about").stdout)
    wheels = {wheel["file"]: wheel["sha256"] for wheel in about["wheels"]}
    with zipfile.ZipFile(made) as archive:
        assert archive.testzip() is None
        inside = {name.removeprefix("wheels/") for name in archive.namelist() if name.startswith("wheels/")}
        assert inside == set(wheels)
        assert all(hashlib.sha256(archive.read(f"wheels/{name}")).hexdigest() == digest for name, digest in wheels.items())
    assert {wheel["name"] for wheel in about["wheels"]} == set(BUNDLED)
    assert not [
        name for name in Bundle(made, about["index_sha256"]).files("runtime") if name.startswith(("torch", "onnx/", "transformers"))
    ]


# The format, with tiny wheels ---------------------------------------------------------------------------------------------------


def _tiny(folder: Path, model: Path, target: BundleTarget = HERE, name: str = "app") -> Path:
    wheel = tiny_wheel(folder / "wheels", "little")
    wheels = [Wheel(wheel, "little", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "MIT")]
    return write_bundle(model, target, wheels, folder / name).path


def _open(path: Path) -> Bundle:
    found = re.search(rb'module\.start\(sys\.argv\[1\], "([0-9a-f]{64})"', path.read_bytes()[:HEADER_BYTES])
    assert found
    return Bundle(path, found.group(1).decode())


@pytest.fixture
def tiny(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTVLM_EDGE_STATE", str(tmp_path / "state"))
    return _tiny(tmp_path, model_dir)


def test_the_same_inputs_give_the_same_bytes_whatever_the_name_place_and_time(tmp_path: Path, model_dir: Path) -> None:
    one = _tiny(tmp_path / "a", model_dir)
    copied = shutil.copytree(model_dir, tmp_path / "copy")
    for path in copied.iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    wheel = one.parent / "wheels" / "little-1.0-py3-none-any.whl"
    wheels = [Wheel(Path(shutil.copy(wheel, tmp_path)), "little", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "MIT")]
    wheels = [dataclasses.replace(wheels[0], path=tmp_path / wheel.name)]
    other = write_bundle(copied, HERE, wheels, tmp_path / "b" / "another-name").path
    assert one.read_bytes() == other.read_bytes()
    assert os.access(other, os.X_OK)


def test_unpacking_gives_the_files_of_the_wheel_and_of_the_model(tiny: Path, model_dir: Path) -> None:
    bundle = _open(tiny)
    runtime, model = ensure(bundle, "runtime", hashes=True), ensure(bundle, "model", hashes=True)
    assert (runtime / "little" / "__init__.py").read_text() == "version = '1.0'\n"
    assert (runtime / "little_extra.py").is_file()
    assert not list(runtime.rglob("tool"))
    assert (runtime / "fastvlm_edge" / "engines" / "build.py").is_file()
    assert not (runtime / "fastvlm_edge" / "convert").exists()
    for path in {*model_dir.iterdir()} - {model_dir / "verified.json"}:
        assert (model / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("where", ["model/decoder.onnx", "wheels/little-1.0-py3-none-any.whl"])
def test_a_flipped_bit_in_the_file_is_found_and_nothing_is_left_unpacked(tiny: Path, where: str) -> None:
    with zipfile.ZipFile(tiny) as archive:
        info = archive.getinfo(where)
    data = bytearray(tiny.read_bytes())
    data[info.header_offset + 30 + len(where) + 60] ^= 1
    tiny.write_bytes(data)
    bundle = _open(tiny)
    with pytest.raises(BundleError, match="damaged"):
        ensure(bundle, where.split("/")[0].replace("wheels", "runtime"), hashes=False)
    assert not [path for path in start.state_folder().iterdir() if path.is_dir()]


def test_a_file_that_is_cut_off_or_whose_start_was_changed_says_so(tiny: Path, tmp_path: Path, bare: dict[str, str]) -> None:
    data = tiny.read_bytes()
    for damaged in (data[: len(data) // 2], data[: HEADER_BYTES + 9] + b"#" + data[HEADER_BYTES + 10 :]):
        path = tmp_path / "damaged"
        path.write_bytes(damaged)
        path.chmod(0o755)
        done = subprocess.run([str(path), "doctor"], env=bare, capture_output=True, text=True)
        assert done.returncode == 1
        assert "damaged or cut off; copy it again" in done.stderr and "Traceback" not in done.stderr


def test_the_wrong_python_or_machine_is_told_in_one_sentence(tmp_path: Path, model_dir: Path, bare: dict[str, str]) -> None:
    python = _tiny(tmp_path / "a", model_dir, dataclasses.replace(HERE, python=(3, 99)))
    done = subprocess.run([str(python), "doctor"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is for Python 3.99" in done.stderr and "this machine has Python 3." in done.stderr
    machine = _tiny(tmp_path / "b", model_dir, dataclasses.replace(HERE, machine="riscv64"))
    done = subprocess.run([str(machine), "doctor"], env=bare, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"is for riscv64 (x86-64, glibc 2.28 or newer, CPU), and this machine is {platform.machine()}" in done.stderr
    glibc = _tiny(tmp_path / "c", model_dir, dataclasses.replace(HERE, glibc=(2, 99)))
    done = subprocess.run([str(glibc), "doctor"], env=bare, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs glibc 2.99" in done.stderr


def test_two_first_starts_at_once_unpack_once(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begun, written = threading.Event(), 0

    def slowly(count: int) -> None:
        nonlocal written
        written += count
        begun.set()
        waiting.wait(5)

    waiting = threading.Event()
    first = threading.Thread(target=lambda: ensure(_open(tiny), "model", hashes=False, advance=slowly))
    first.start()
    assert begun.wait(10)
    threading.Timer(0.3, waiting.set).start()
    second = 0

    def count(bytes_: int) -> None:
        nonlocal second
        second += bytes_

    folder = ensure(_open(tiny), "model", hashes=True, advance=count)
    first.join()
    assert written == sum(path.stat().st_size for path in folder.iterdir())
    assert second == 0
    assert "waiting for another process" in capfd.readouterr().err


@pytest.mark.parametrize("what", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_or_failed_unpacking_leaves_nothing_and_the_next_one_works(tiny: Path, what: BaseException) -> None:
    def stop(_count: int) -> None:
        raise what

    expected, said = (KeyboardInterrupt, None) if isinstance(what, KeyboardInterrupt) else (BundleError, "is full")
    with pytest.raises(expected, match=said):
        ensure(_open(tiny), "model", hashes=False, advance=stop)
    assert not [path for path in start.state_folder().iterdir() if path.is_dir()]
    assert ensure(_open(tiny), "model", hashes=False).is_dir()


def test_too_little_disk_is_told_before_anything_is_written(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=10))
    with pytest.raises(BundleError, match=r"is full .* MB free.*FASTVLM_EDGE_STATE=DIRECTORY"):
        ensure(_open(tiny), "model", hashes=False)


def test_a_model_that_is_unpacked_is_shared_by_bundles_of_another_runtime(tiny: Path, tmp_path: Path, model_dir: Path) -> None:
    wheel = tiny_wheel(tmp_path / "other", "little", "2.0")
    newer = write_bundle(model_dir, HERE, [Wheel(wheel, "little", "2.0", "0" * 64, "MIT")], tmp_path / "newer").path
    assert ensure(_open(tiny), "model", hashes=False) == ensure(_open(newer), "model", hashes=False)
    assert ensure(_open(tiny), "runtime", hashes=False) != ensure(_open(newer), "runtime", hashes=False)


def test_a_full_disk_while_bundling_leaves_no_file(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FastVLMError, match="is full; no partial file was left there"):
        _tiny(tmp_path, model_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_a_name_that_is_taken_is_kept(tiny: Path, tmp_path: Path, model_dir: Path) -> None:
    before = tiny.read_bytes()
    with pytest.raises(FastVLMError, match="exists; use --force to replace it"):
        _tiny(tmp_path, model_dir)
    assert tiny.read_bytes() == before


def test_a_damaged_model_is_not_bundled(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    data = bytearray((model / "decoder.onnx").read_bytes())
    data[5] ^= 1
    (model / "decoder.onnx").write_bytes(data)
    with pytest.raises(FastVLMError, match="sha256 differs"):
        _tiny(tmp_path, model)


def test_the_licence_of_a_model_travels_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTVLM_EDGE_STATE", str(tmp_path / "state"))
    model = build_model(tmp_path / "model")
    (model / "LICENSE").write_text("For research only.\n")
    bundle = _open(_tiny(tmp_path, model))
    ensure(bundle, "runtime", hashes=False)
    assert bundle_entry.main(bundle, ["licenses", "model"]) == 0
    assert capsys.readouterr().out == "For research only.\n\n"


@pytest.mark.slow
def test_a_model_of_more_than_four_gigabytes_is_bundled_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_EDGE_STATE", str(tmp_path / "state"))
    model = build_model(tmp_path / "model")
    with (model / "LICENSE.large").open("wb") as file:
        file.truncate((1 << 32) + 10)
    bundle = _open(_tiny(tmp_path, model))
    assert (ensure(bundle, "model", hashes=False) / "LICENSE.large").stat().st_size == (1 << 32) + 10


# Targets and wheels -------------------------------------------------------------------------------------------------------------


def test_wheels_fit_the_python_and_cuda_of_each_system() -> None:
    assert "cuda-bindings>=12.6,<13" in requirements(SYSTEMS["orin-jp6"])
    assert "cuda-bindings>=13.0,<14" in requirements(SYSTEMS["thor"])
    assert not [name for name in requirements(SYSTEMS["x86_64"]) if "cuda" in name or "nvidia" in name]
    assert "exceptiongroup>=1.1" in requirements(bundle_target("x86_64", (3, 10)))


def test_a_bundle_has_the_packages_that_the_project_needs() -> None:
    for name, expected in (("dependencies", RUNTIME), ("structured", STRUCTURED), ("serve", SERVE)):
        needs = re.search(rf"^{name} = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert needs
        assert tuple(json.loads(needs.group(1))) == expected


def test_a_folder_of_wheels_is_enough_and_of_several_the_fitting_newest_is_taken(tmp_path: Path) -> None:
    names = [re.split("[<>=]", each)[0].replace("_", "-") for each in requirements(bundle_target("aarch64", (3, 12)))]
    versions = dict.fromkeys(names, "20.0") | {"numpy": "2.0", "llguidance": "1.6.1", "starlette": "1.7"}
    for name, version in versions.items():
        tiny_wheel(tmp_path, name, version)
    tiny_wheel(tmp_path, "numpy", "2.1")
    tiny_wheel(tmp_path, "numpy", "2.2", tag="cp36-cp36m-win32")
    wheels = collect_wheels(bundle_target("aarch64", (3, 12)), tmp_path)
    assert {wheel.name: wheel.version for wheel in wheels} == {**versions, "numpy": "2.1"}


def test_a_wheel_that_is_missing_from_the_folder_is_named(tmp_path: Path) -> None:
    tiny_wheel(tmp_path, "numpy", "2.0")
    with pytest.raises(FastVLMError, match=r"could not get the wheels for aarch64 with Python 3\.12: .*pillow"):
        collect_wheels(bundle_target("aarch64", (3, 12)), tmp_path)


# On the board -------------------------------------------------------------------------------------------------------------------


class _FakeBuild:
    """TensorRT and a GPU for bundle_entry.build_missing_engines, and a `build` that counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: str = "") -> None:
        self.calls = 0
        self.arenas = 0
        self.records: list[Any] = []
        self.error = error
        device = SimpleNamespace(name="Orin", compute_capability=(8, 7), multiprocessors=8, total_bytes=8 << 30)
        monkeypatch.setattr(bundle_entry, "find_library", lambda: SimpleNamespace(name="tensorrt", version="10.3.0"))
        monkeypatch.setattr(bundle_entry, "open_cuda", lambda: SimpleNamespace(device=device, close=lambda: None))
        monkeypatch.setattr(bundle_entry, "find_records", lambda _model: self.records)
        monkeypatch.setattr(bundle_entry, "mismatch", lambda *_: None)
        monkeypatch.setattr("fastvlm_edge.engines.build.build", self)
        monkeypatch.setattr("fastvlm_edge.backends.ort_session.share_arena", self._share_arena)

    def _share_arena(self) -> None:
        self.arenas += 1

    def __call__(self, model: Path, **_: Any) -> None:
        self.calls += 1
        assert self.arenas == self.calls, "the comparison would not share the arena"
        if self.error:
            raise FastVLMError(self.error)
        self.records.append(object())


def test_the_bundles_packages_come_first_and_those_of_jetpack_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/somewhere/site-packages"])
    monkeypatch.setattr(os.path, "isdir", lambda _path: True)
    monkeypatch.setenv("PYTHONPATH", "")
    start._set_path("/bundle")
    jetpack = ["/usr/lib/python{}.{}/dist-packages".format(*sys.version_info), "/usr/lib/python3/dist-packages"]
    assert sys.path == ["/bundle", "/somewhere/site-packages", *jetpack]
    assert os.environ["PYTHONPATH"].split(os.pathsep) == ["/bundle", *jetpack]


def test_engines_are_built_at_the_first_use_and_kept(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, ran = _FakeBuild(monkeypatch), []
    monkeypatch.setattr(cli, "main", lambda words: ran.append(words) or 0)
    for _ in range(2):
        assert bundle_entry.main(_open(tiny), ["run", *QUESTION]) == 0
    assert fake.calls == 1
    model = str(ensure(_open(tiny), "model", hashes=False))
    assert ran == [["run", model, *QUESTION]] * 2


def test_no_cascade_is_written_into_the_bundled_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next start it would be unpacked again, without the cascade."""
    ran: list[list[str]] = []
    monkeypatch.setattr(cli, "main", lambda words: ran.append(words) or 0)
    words = ["--data", "questions.jsonl", "--image-size", "auto", "--backend", "ort"]
    for name in ([], ["model"]):
        with pytest.raises(BundleError, match="the bundled model is not changed"):
            bundle_entry.main(_open(tiny), ["eval", *name, *words, "--accuracy-drop", "1"])
    assert bundle_entry.main(_open(tiny), ["eval", *words]) == 0 and len(ran) == 1


@pytest.mark.parametrize("words", [["run", "--backend", "ort"], ["run", "--backend=ort-cuda"], ["doctor", "model"], ["build"]])
def test_no_engines_are_built_where_none_are_asked(tiny: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    fake = _FakeBuild(monkeypatch)
    monkeypatch.setattr(cli, "main", lambda _words: 0)
    assert bundle_entry.main(_open(tiny), words) == 0
    assert fake.calls == 0


def test_engines_that_cannot_be_built_are_told_and_not_tried_at_every_question(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = _FakeBuild(monkeypatch, error="not enough memory")
    monkeypatch.setattr(cli, "main", lambda _words: 0)
    for _ in range(2):
        assert bundle_entry.main(_open(tiny), ["run", *QUESTION]) == 0
        assert "not enough memory" in capfd.readouterr().err
    assert fake.calls == 1


def test_the_systemd_unit_prepares_and_systemd_accepts_it(tmp_path: Path, tiny: Path) -> None:
    odd = tmp_path / 'a "b" 100% $HOME'
    odd.mkdir()
    bundle = odd / "app"
    shutil.copy(tiny, bundle)
    text = unit.install(bundle, tmp_path / "root")
    path = tmp_path / "root/etc/systemd/system/fastvlm-edge-app.service"
    assert str(path) in text
    assert (path.parent / "multi-user.target.wants" / path.name).is_symlink()
    said = path.read_text()
    assert "Type=oneshot" in said and said.count(" prepare\n") == 1
    assert "ExecStart=/bin/sh " + '"' + str(tmp_path) + '/a \\"b\\" 100%% $$HOME/app" prepare' in said
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
        assert path.name not in done.stderr, done.stderr
    unit.uninstall(bundle, tmp_path / "root")
    assert not path.exists() and not list(path.parent.rglob("*app*"))
    with pytest.raises(FastVLMError, match="not installed under this name"):
        unit.uninstall(bundle, tmp_path / "root")


def test_the_unit_that_serves_waits_for_the_one_that_prepares_and_systemd_accepts_both(tmp_path: Path, tiny: Path) -> None:
    root, bundle = tmp_path / "root", Path("/usr/bin/true")  # systemd-analyze looks for the program
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "group").write_text("root:x:0:\nvideo:x:44:\n")
    said = unit.install(bundle, root, serve=True)
    folder = root / "etc/systemd/system"
    prepare, serve = folder / "fastvlm-edge-true.service", folder / "fastvlm-serve-true.service"
    assert str(prepare) in said and str(serve) in said
    assert {link.name for link in (folder / "multi-user.target.wants").iterdir()} == {prepare.name, serve.name}
    text = serve.read_text()
    assert f"Requires={prepare.name}\nAfter={prepare.name} " in text
    assert 'ExecStart=/bin/sh "/usr/bin/true" serve\n' in text and "\nSupplementaryGroups=video\n" in text
    assert "\nTimeoutStopSec=60\n" in text
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "verify", str(serve), str(prepare)], capture_output=True, text=True)
        assert "fastvlm" not in done.stderr, done.stderr
        command = ["systemd-analyze", "security", "--offline=true", "--threshold=40", str(serve)]  # tenths; 96 without any protection
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert prepare.name in unit.uninstall(bundle, root) and not list(folder.rglob("*fastvlm*"))


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        ("FASTVLM_EDGE_DRAIN=300\n", 330),
        ('# FASTVLM_EDGE_DRAIN=9\nFASTVLM_EDGE_DRAIN=5\n  FASTVLM_EDGE_DRAIN="120"\nFASTVLM_EDGE_PORT=1\n', 150),
        ("FASTVLM_EDGE_DRAIN=soon\n", 60),
    ],
)
def test_systemd_waits_for_the_drain(tmp_path: Path, settings: str, seconds: int) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/fastvlm-edge.env").write_text(settings)
    unit.install(Path("/usr/bin/true"), tmp_path, serve=True)
    assert f"\nTimeoutStopSec={seconds}\n" in (tmp_path / "etc/systemd/system/fastvlm-serve-true.service").read_text()
    assert Settings().drain_seconds == unit.DRAIN


def test_an_installation_without_a_server_has_no_unit_for_one_and_keeps_what_is_there(tmp_path: Path, tiny: Path) -> None:
    folder = tmp_path / "etc/systemd/system"
    bundle_entry.main(_open(tiny), ["install", "--root", str(tmp_path)])
    assert [path.name for path in folder.glob("*.service")] == [unit.unit_name(tiny)]


def test_a_server_is_not_installed_from_a_folder_that_its_user_cannot_enter(tmp_path: Path, tiny: Path) -> None:
    closed = tmp_path / "home"
    closed.mkdir(mode=0o750)
    bundle = Path(shutil.copy(tiny, closed / "app"))
    with pytest.raises(FastVLMError, match=rf"run: sudo install {bundle} /usr/local/bin/app && sudo /usr/local/bin/app install --serve"):
        unit.install(bundle, tmp_path / "root", serve=True)
    assert not (tmp_path / "root").exists()


def test_wrong_usage_of_the_own_commands_is_status_2(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = _open(tiny)
    for words in (["prepare", "x"], ["install", "--rot", "x"], ["install", "--root"], ["uninstall", "--serve"], ["licenses", "a", "b"]):
        assert bundle_entry.main(bundle, words) == 2
        assert "does not take" in capsys.readouterr().err


# What goes in -------------------------------------------------------------------------------------------------------------------


def test_a_bundle_from_a_clone_and_one_from_a_wheel_hold_the_same_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    source = tmp_path / "clone"
    kept = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    for name in ("fastvlm_edge", "convert", "engines", "calib"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=kept)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")

    clone, installed = (dict(source_files(root / "fastvlm_edge")) for root in (source, tmp_path / "installed"))
    assert set(clone) == set(installed)
    assert all(path.read_bytes() == installed[name].read_bytes() for name, path in clone.items())


def test_a_bundle_holds_what_a_board_needs_and_nothing_else() -> None:
    names = {name for name, _ in source_files(ROOT / "fastvlm_edge")}
    assert {"fastvlm_edge/bundle_entry.py", "fastvlm_edge/engines/build.py", "fastvlm_edge/pictures/coffee.jpg"} <= names
    folders = {name.split("/")[1] for name in names if name.count("/") > 1}
    assert not folders & {"convert", "calib", "tests", "benchmarks", "examples", "demo"}
    modules = {name: (ROOT / name).read_text(encoding="utf-8") for name in names if name.endswith(".py")}
    foreign = re.compile(r"^\s*(?:from|import) (?:torch|onnx|pytest|tests|benchmarks|examples)\b", re.MULTILINE)
    assert [name for name, text in modules.items() if foreign.search(text)] == []
