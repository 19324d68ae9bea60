"""Nothing is sent and nothing is left behind: the commands run under strace, with a home folder and with one that cannot exist.

`make test-quiet` installs strace and runs this file. Downloads from the Hub are what a command was asked for, so none is tested here.
"""

from __future__ import annotations

import json
import os.path
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.checkpoints import write_checkpoint
from tests.support.watcher import Seen, watch
from tests.support.wheels import BUNDLED, wheel_of_installed

pytestmark = pytest.mark.quiet
ROOT = Path(__file__).resolve().parents[1]
ASK = ("--prompt", "What is this?", "--max-new-tokens", "4")
SENDS = tuple(map(int, version("onnxruntime").split(".")[:2])) >= (1, 29)


@dataclass(frozen=True)
class User:
    """A user with a folder for work and an environment without anything else: onnxruntime is silent where a variable like CI is set."""

    folder: Path
    cache: Path
    """The only place for files that nobody named."""
    environment: dict[str, str]

    @property
    def scratch(self) -> Path:
        return Path(self.environment["TMPDIR"])

    def watch(self, *command: str | Path, **environment: str) -> Seen:
        return watch(command, folder=self.folder, environment={**self.environment, **environment})

    def quiet(self, *command: str | Path, outputs: tuple[Path, ...] = (), allowed: str = "nothing") -> None:
        """Check that a command succeeds, calls nobody, warns of nothing, and writes only the cache, `outputs` and what it removes again."""
        seen = self.watch(*command)
        assert seen.status == 0, seen.stderr
        assert [call for call in seen.calls if not call.startswith(allowed)] == []
        assert seen.outside(self.cache, self.scratch, Path("/dev/null"), *outputs) == []
        assert list(self.scratch.iterdir()) == []
        assert "\x1b" not in seen.stderr, "a warning of onnxruntime"


def toolkit(*arguments: str | Path) -> tuple[str | Path, ...]:
    return sys.executable, "-m", "fastvlm_edge", *arguments


@pytest.fixture(params=["home", "no home"])
def user(request: pytest.FixtureRequest, tmp_path: Path) -> User:
    """Nobody, root included, can write below the second one's HOME, which is below a file."""
    for name in ("work", "home/.cache", "scratch"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tmp_path / "scratch")}
    if request.param == "home":
        return User(tmp_path / "work", tmp_path / "home" / ".cache" / "fastvlm-edge", environment | {"HOME": str(tmp_path / "home")})
    cache = tmp_path / "cache"
    return User(tmp_path / "work", cache, environment | {"HOME": str(tmp_path / "file" / "home"), "FASTVLM_EDGE_CACHE": str(cache)})


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Eight, each about a picture of its own."""
    generator = np.random.default_rng(0)
    rows = [{"image": f"{index}.png", "prompt": "What is this?", "answer": "noise"} for index in range(8)]
    for row in rows:
        Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / row["image"])
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_convert(user: User, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    user.quiet(*toolkit("convert", checkpoint, "-o", "model", "--precision", "int4", "--context", "512"), outputs=(user.folder,))


def test_calibrate(user: User, tmp_path: Path, questions: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    options = ("--precision", "int8", "--context", "512", "--calib", questions)
    user.quiet(*toolkit("convert", checkpoint, "-o", "model", *options), outputs=(user.folder,))
    assert user.cache.is_dir()


def test_run_and_python(user: User, model_dir: Path, questions: Path) -> None:
    model, picture = shutil.copytree(model_dir, user.folder / "model"), questions.with_name("0.png")
    user.quiet(*toolkit("run", model, "--image", picture, *ASK), outputs=(model,))
    assert {path.name for path in model.iterdir()} == {path.name for path in model_dir.iterdir()}
    user.quiet(sys.executable, ROOT / "examples" / "ask.py", model, picture, "What is this?")


def test_chat(user: User, model_dir: Path, questions: Path) -> None:
    line = 'printf "%s\\n" "What is this?" "/save chat.json" "/load chat.json" "Why?" | exec "$0" -m fastvlm_edge chat "$1" --image "$2"'
    user.quiet("sh", "-c", line, sys.executable, model_dir, questions.with_name("0.png"), outputs=(user.folder,))
    assert (user.folder / "chat.json").is_file()


def test_eval(user: User, model_dir: Path, questions: Path) -> None:
    user.quiet(*toolkit("eval", model_dir, "--data", questions, "--save", "answers.jsonl"), outputs=(user.folder,))


def test_bench(user: User, model_dir: Path) -> None:
    few = ("--processes", "1", "--runs", "1", "--new-tokens", "4", "--depths", "64")
    user.quiet(*toolkit("bench", model_dir, *few, "-o", "bench.json"), outputs=(user.folder,))


def test_plan_and_doctor(user: User, model_dir: Path) -> None:
    user.quiet(*toolkit("plan", "0.5b", "--target", "orin-nano"))
    user.quiet(*toolkit("doctor", model_dir))


def test_bundle(user: User, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    for name in BUNDLED:
        wheel_of_installed(name, tmp_path / "wheels")
    app, state = user.folder / "app", user.folder / "state"
    command = toolkit("bundle", model_dir, "--target", "x86_64", "--wheels", tmp_path / "wheels", "-o", app)
    user.quiet(*command, outputs=(user.folder,), allowed="socket(AF_INET6,")  # pip asks the system whether it has IPv6
    user.environment["FASTVLM_EDGE_STATE"] = str(state)
    user.quiet(app, "run", *ASK, outputs=(state,))


# The watcher itself -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SENDS, reason="onnxruntime before 1.29 sends nothing")
def test_telemetry_that_the_user_allows_is_seen(user: User, model_dir: Path) -> None:
    seen = user.watch(*toolkit("run", model_dir, *ASK), ORT_DISABLE_TELEMETRY="0")
    assert seen.status == 0
    assert any("Microsoft" in path.parts for path in seen.outside()) or "\x1b" in seen.stderr


@pytest.mark.parametrize(
    ("does", "call"),
    [
        ("socket.create_connection(('127.0.0.1', 9))", "connect("),
        ("socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)", "socket(AF_INET6,"),
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))", "sendto("),
        ("socket.getaddrinfo('example.invalid', 443)", "/etc/hosts"),
        ("socket.socket(socket.AF_UNIX).connect('/run/systemd/resolve/io.systemd.Resolve')", "io.systemd.Resolve"),
        ("threading.Thread(target=socket.socket).start()", "socket(AF_INET,"),
        ("subprocess.run([sys.executable, '-c', 'import socket; socket.socket()'])", "socket(AF_INET,"),
    ],
)
def test_a_call_is_seen(tmp_path: Path, does: str, call: str) -> None:
    seen = watch([sys.executable, "-c", f"import socket, subprocess, sys, threading; {does}"], folder=tmp_path, environment={})
    assert any(call in line for line in seen.calls), seen.calls


def test_what_stays_on_the_machine_is_no_call(tmp_path: Path) -> None:
    code = "import os, pwd, socket; socket.socketpair(); pwd.getpwuid(os.getuid()); open('/etc/passwd')"
    seen = watch([sys.executable, "-c", code], folder=tmp_path, environment={})
    assert (seen.status, seen.calls, seen.written) == (0, (), frozenset())


@pytest.mark.parametrize(
    ("does", "path"),
    [
        ("open('a', 'w')", "a"),
        ("os.mkdir('b', dir_fd=os.open('..', os.O_RDONLY))", "../b"),
        ("os.replace('there', 'c')", "c"),
        ("os.remove('there')", "there"),
        ("os.open('d', os.O_RDONLY | os.O_CREAT)", "d"),
        ("open('/nowhere/e', 'w')", "/nowhere/e"),
    ],
)
def test_a_file_is_seen(tmp_path: Path, does: str, path: str) -> None:
    (tmp_path / "there").touch()
    seen = watch([sys.executable, "-c", f"import os; {does}"], folder=tmp_path, environment={})
    assert Path(os.path.normpath(tmp_path / path)) in seen.outside()
