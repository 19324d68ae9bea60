"""The process of a command: signals at any moment, standard streams that are closed or full, and users without a home."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import pytest

from fastvlm_edge import cli
from fastvlm_edge.machine.cache_dir import cache_dir, home_dir

ENDINGS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture(autouse=True)
def hangup_ends() -> Iterator[None]:
    """Also where the tests run under nohup, whose children ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def command_that(monkeypatch: pytest.MonkeyPatch, main: Any) -> list[str]:
    """Arguments that run `main` as the command `doctor`."""
    module = ModuleType("fastvlm_edge.commands.doctor")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return ["doctor"]


def start(program: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def start_command(program: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Run the function `main` of a program as the command `doctor`."""
    return start(textwrap.dedent(program) + RUN_MAIN, *arguments, **options)


RUN_MAIN = """
import sys, types
from fastvlm_edge import cli
module = types.ModuleType("fastvlm_edge.commands.doctor")
module.main = main
sys.modules[module.__name__] = module
sys.exit(cli.main(["doctor"]))
"""


def line_of(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()


# Signals ------------------------------------------------------------------------------------------------------------------------

LOADS = """
    import sys
    sys.path.insert(0, sys.argv[1])
    def main(_):
        import slow
        print("still here", flush=True)
        import time
        time.sleep(10)
        return 0
"""
MODULES = {
    "turned into an ImportError": """
        import time
        print("loading", flush=True)
        try:
            time.sleep(0.5)
        except BaseException as error:
            raise ImportError("initialization failed") from error
    """,
    "lost": """
        import time
        print("loading", flush=True)
        try:
            time.sleep(0.5)
        except BaseException:
            pass
    """,
}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("number", "status"), ENDINGS)
def test_a_signal_while_a_module_loads_ends_the_command(tmp_path: Path, module: str, number: int, status: int) -> None:
    (tmp_path / "slow.py").write_text(textwrap.dedent(MODULES[module]))
    process = start_command(LOADS, tmp_path)
    assert line_of(process.stdout) == "loading"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (status, "")
    assert out in ("", "still here\n")  # the module was loaded to its end


WRITES = """
    import sys, time
    from pathlib import Path
    from fastvlm_edge.model_dir import atomic
    remove = atomic.shutil.rmtree
    def slowly(*arguments, **options):
        print("removing", flush=True)
        time.sleep(0.5)
        remove(*arguments, **options)
    def main(_):
        with atomic.written_beside(Path(sys.argv[1]), replace=False, elsewhere="") as partial:
            (partial / "half").write_text("half")
            atomic.shutil.rmtree = slowly
            print("writing", flush=True)
            time.sleep(20)
        return 0
"""


@pytest.mark.parametrize(("number", "status"), ENDINGS)
def test_a_signal_leaves_nothing_half_written(tmp_path: Path, number: int, status: int) -> None:
    process = start_command(WRITES, tmp_path / "new" / "model")
    assert line_of(process.stdout) == "writing"
    process.send_signal(number)
    assert line_of(process.stdout) == "removing"
    process.send_signal(signal.SIGHUP)  # a lost connection sends several
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err, list(tmp_path.iterdir())) == (status, "", [])


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    process = start_command(WRITES.replace("time.sleep(20)", "time.sleep(1)"), tmp_path / "model", preexec_fn=ignore_hangup)
    assert line_of(process.stdout) == "writing"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 0
    assert (tmp_path / "model" / "half").is_file()


def ignore_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_command_leaves_the_handlers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    during: list[object] = []

    def main(_: object) -> int:
        during.extend(signal.getsignal(number) for number in numbers[:3])
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    assert cli.main(command_that(monkeypatch, main)) == 143
    assert [signal.getsignal(number) for number in numbers] == before and not set(during) & set(before)


def test_an_interruption_before_the_command_line_is_loaded_is_quiet(tmp_path: Path) -> None:
    program = """
        import os, signal, sys
        from fastvlm_edge.__main__ import main
        class Interrupting:
            def find_spec(self, name, path=None, target=None):
                if name == "fastvlm_edge.cli":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupting())
        main()
    """
    process = start(program)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == -signal.SIGINT


# Standard streams ---------------------------------------------------------------------------------------------------------------


def shell(words: str, model: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh, where FASTVLM is the command and MODEL a model directory."""
    line = words.replace("FASTVLM", f"{sys.executable} -m fastvlm_edge").replace("MODEL", str(model))
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=100, env={**os.environ, **environment})


ASK = "FASTVLM run MODEL --prompt Hello. --threads 1 --max-new-tokens 3"


def test_a_closed_stderr_is_no_reason_to_fail(model_dir: Path, tmp_path: Path) -> None:
    expected = shell(ASK, model_dir)
    closed = shell(f"{ASK} 2>&-", model_dir)
    full = shell(f"ulimit -f 0; {ASK} 2>{tmp_path}/log", model_dir)
    gone = shell(f"{{ {{ {ASK}; echo status $?; }} 2>&1 >&3 | true; }} 3>&1", model_dir)
    assert expected.returncode == 0 and len(expected.stdout) > 1
    assert (closed.returncode, closed.stdout) == (full.returncode, full.stdout) == (0, expected.stdout)
    assert gone.stdout == f"{expected.stdout}status 0\n"


@pytest.mark.parametrize("command", [ASK, f"{ASK} --json", "FASTVLM plan 0.5b --target orin-nano", "FASTVLM doctor"])
def test_closed_streams_lead_nowhere(model_dir: Path, command: str) -> None:
    status = shell(command, model_dir).returncode
    all_streams = ["<&- >&- 2>&-"] if "doctor" in command else [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"]  # it takes seconds
    for streams in all_streams:
        closed = shell(f"{command} {streams}", model_dir)
        assert closed.returncode == status and "a bug" not in closed.stdout + closed.stderr, streams
        assert "error" not in closed.stderr, streams


def test_errors_do_not_go_to_stdout_when_stderr_is_closed(model_dir: Path) -> None:
    done = shell("FASTVLM run gone --prompt x 2>&-", model_dir)
    assert (done.returncode, done.stdout) == (1, "")


class FullDisk(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, _data: object) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "0.5b", "--target", "orin-nano"], ["plan", "0.5b", "--target", "none", "--json"]]
)
def test_a_full_stdout_is_one_line(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(FullDisk())))
    status = cli.main(arguments)
    monkeypatch.undo()
    err = capsys.readouterr().err
    assert status == 1 and err.count("\n") == 1 and "a bug" not in err
    assert ("input or output: No space left on device" in err) == ("--json" not in arguments)


def test_nothing_is_printed_into_a_file_that_took_the_place_of_stdout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = """
        import os, sys
        os.close(1)
        sys.stdout = None
        def main(_):
            with open(sys.argv[1], "wb") as file:
                os.write(1, b"from a library")
                file.write(b"content")
            return 0
    """
    process = start_command(program, tmp_path / "file")
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 0
    assert (tmp_path / "file").read_bytes() == b"content"


# A user without a home ----------------------------------------------------------------------------------------------------------


def test_a_user_without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FASTVLM_EDGE_CACHE", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it returns then
    assert home_dir().is_absolute() and not home_dir().exists()
    assert cache_dir() == home_dir() / ".cache" / "fastvlm-edge"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that is not in /etc/passwd")
@pytest.mark.parametrize("command", ["run MODEL --prompt Hello. --max-new-tokens 3 --json", "build MODEL --target sm86"])
def test_commands_of_a_user_that_is_not_in_passwd(model_dir: Path, tmp_path: Path, command: str) -> None:
    program = """
        import os, sys
        os.environ.pop("HOME", None)
        import fastvlm_edge.cli, fastvlm_edge.commands.run, fastvlm_edge.backends.ort, fastvlm_edge.commands.build  # root may read them
        os.chdir(sys.argv[1])
        os.setgid(54321)
        os.setuid(54321)
        sys.exit(fastvlm_edge.cli.main(sys.argv[2:]))
    """
    tmp_path.chmod(0o777)
    process = start(program, tmp_path, *command.replace("MODEL", str(model_dir)).split())
    out, err = process.communicate(timeout=100)
    assert "a bug" not in err and "home" not in err and list(tmp_path.iterdir()) == []
    if "--json" in command and process.returncode == 0:
        assert json.loads(out)
