"""The command line: what it prints where, its exit statuses, and that no traceback ever reaches a user."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from skimage import data

from fastvlm_edge import FastVLM, FastVLMError, __version__
from fastvlm_edge.cli import main
from fastvlm_edge.commands.convert import next_commands
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.progress import TextProgress

PROMPT = "What does the meter read?"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "coffee.png"
    Image.fromarray(data.coffee()).save(path)
    return str(path)


@pytest.fixture
def run(model_dir: Path, picture: str) -> list[str]:
    return ["run", str(model_dir), "--image", picture, "--prompt", PROMPT, "--threads", "1"]


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastvlm_edge", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, text=True, encoding="utf-8", **pipes)


def test_run_streams_the_reply_and_tells_the_time(run: list[str], vlm: FastVLM, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*run, "--max-new-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert out == vlm.generate(PROMPT, picture, max_new_tokens=12).text + "\n"
    assert err.splitlines()[0].startswith("loading fake (fp32)")
    summary = err.splitlines()[1]
    assert re.fullmatch(r"\[12 tokens, cut off by --max-new-tokens, first after \d+ ms, then [\d.]+ tokens/s; ort, fp32\]", summary)
    assert err.count("\n") == 2 and len(summary) < 100


def test_json_is_one_object_and_nothing_else(run: list[str], vlm: FastVLM, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*run, "--max-new-tokens", "12", "--json"]) == 0
    out, err = capsys.readouterr()
    document, reply = json.loads(out), vlm.generate(PROMPT, picture, max_new_tokens=12)
    assert err == "" and out.count("\n") == 1
    assert {key: document[key] for key in ("text", "token_ids", "stop_reason", "stop_string", "backend", "precision")} == {
        "text": reply.text,
        "token_ids": reply.token_ids,
        "stop_reason": "length",
        "stop_string": None,
        "backend": "ort",
        "precision": "fp32",
    }
    assert document["backend_description"].startswith("onnxruntime ")
    timings = document["timings"]
    assert set(timings) == {
        *("preprocess_ms", "vision_ms", "queue_ms", "prefill_ms", "ttft_ms", "decode_tokens_per_second"),
        *("prompt_tokens", "cached_tokens", "prefilled_tokens", "cached_images", "new_tokens"),
    }
    assert timings["ttft_ms"] >= timings["preprocess_ms"] + timings["vision_ms"] + timings["prefill_ms"] - 0.01
    assert timings["new_tokens"] == 12


def test_every_option_reaches_the_model(run: list[str], vlm: FastVLM, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--max-new-tokens 30 --temperature 1.2 --top-k 30 --top-p 0.95 --seed 5 --repetition-penalty 1.2"
    extra = [
        "--stop",
        "zzz",
        "--stop",
        "yyy",
        "--geometry",
        "crop",
        "--prefill-chunk",
        "9",
        "--backend",
        "ort",
        "--verify",
        "--image",
        picture,
    ]
    assert main([*run, *options.split(), *extra, "--json"]) == 0
    cropped = FastVLM(vlm.manifest, vlm._tokenizer, vlm._engine, geometry="crop")
    reply = cropped.generate(
        PROMPT,
        [picture, picture],
        max_new_tokens=30,
        temperature=1.2,
        top_k=30,
        top_p=0.95,
        seed=5,
        repetition_penalty=1.2,
        stop=["zzz", "yyy"],
    )
    assert json.loads(capsys.readouterr().out)["token_ids"] == reply.token_ids


def test_without_a_picture(model_dir: Path, vlm: FastVLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(model_dir), "--prompt", "Hello.", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == vlm.generate("Hello.", max_new_tokens=5).text + "\n"


@pytest.mark.parametrize(
    ("change", "message", "mend"),
    [
        (["--image", "gone.png"], "gone.png does not exist", "check the path of the image"),
        (["--top-k", "100"], "top_k is 100, but the model gives only 64 candidates", "give at most 64"),
        (["--temperature", "-1"], "temperature is -1.0", "give a number that is 0 (greedy) or larger"),
        (["--threads", "0"], "threads is 0", "give an integer of at least 1"),
        (["--backend", "tensorrt"], "MODEL has no engines", "run: fastvlm-edge build MODEL"),
        (
            ["--prompt", "word " * 3000],
            "no room for a reply in the context of 2048",
            "shorten the prompt, start a new conversation, or convert",
        ),
        (["--image", "http://example.org/a.png"], "is a URL, and images are not downloaded", "download it first"),
        (["--stop", ""], "the stop string '' is not a string of at least one character", None),
    ],
)
def test_failures_are_one_line_one_object_and_status_1(
    run: list[str], model_dir: Path, change: list[str], message: str, mend: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*run, *change, "--json"]) == 1
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert out.count("\n") == 1 and set(json.loads(out)) == {"error"} and set(error) == {"message", "mend"}
    assert message.replace("MODEL", str(model_dir)) in error["message"]
    assert error["mend"] is None if mend is None else error["mend"].startswith(mend.replace("MODEL", str(model_dir)))
    whole = error["message"] if mend is None else f"{error['message']}; {error['mend']}"
    assert err == f"fastvlm-edge: error: {whole}\n"
    assert main([*run, *change]) == 1
    out, without_json = capsys.readouterr()
    assert out == "" and without_json.endswith(err)  # after "loading ..."


@pytest.mark.parametrize("command", ["bench", "eval", "plan"])
def test_every_command_with_json_reports_its_errors_as_an_object(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"eval": ["--data", str(tmp_path)], "plan": ["--target", "orin-nano"]}.get(command, [])
    assert main([command, str(tmp_path / "gone"), *more, "--json"]) == 1
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert error["message"] and err.startswith(f"fastvlm-edge: error: {error['message']}")


def test_the_doctors_report_of_problems_is_not_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "gone"), "--json"]) == 1
    out, _ = capsys.readouterr()
    assert "error" not in json.loads(out)


@pytest.mark.parametrize(
    "arguments", [[], ["bake"], ["run"], ["run", "model"], ["run", "m", "--prompt", "x", "--top-k", "many"], ["convert", "x"]]
)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_wrong_usage_is_status_2_and_prints_nothing_on_stdout(
    arguments: list[str], more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: fastvlm-edge") and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--image-size 512,300", "300 is not a multiple of 64"),
        ("--context 0", "0 is not a positive"),
        ("--precision fp8", "invalid choice"),
    ],
)
def test_wrong_values_of_convert(options: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "checkpoint", "-o", "model", *options.split()]) == 2
    assert says in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastvlm-edge {__version__}\n"
    assert main(["--help"]) == 0
    assert "run       ask a question about an image" in capsys.readouterr().out
    for command in ("run", "convert"):
        assert main([command, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: fastvlm-edge {command}")


def test_an_unexpected_exception_says_that_it_is_a_bug(
    run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("fastvlm_edge.commands.run.load_parts", fail)
    assert main(run) == 1
    err = capsys.readouterr().err
    assert "a bug in fastvlm-edge" in err and "ZeroDivisionError: two lines" in err and err.count("\n") == 1
    monkeypatch.setenv("FASTVLM_EDGE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(run)


@pytest.mark.parametrize(
    ("error", "says"),
    [(MemoryError(), "not enough memory"), (OSError(28, "No space left on device", "model"), "model: No space left on device")],
)
def test_the_machines_limits_are_no_bugs(
    run: list[str], error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("fastvlm_edge.commands.run.load_parts", fail)
    assert main(run) == 1
    err = capsys.readouterr().err
    assert says in err and "bug" not in err


@pytest.mark.parametrize("gpu", [False, True])
def test_convert_passes_everything_on_and_prints_what_to_type_next(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu: bool
) -> None:
    import types

    seen: dict[str, Any] = {}

    def convert(checkpoint: str, output: Path, **options: Any) -> Any:
        seen.update(options, checkpoint=checkpoint, output=output)
        return read_manifest(model_dir)

    module = types.ModuleType("fastvlm_edge.convert.pipeline")
    module.convert = convert  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastvlm_edge.convert.pipeline", module)
    monkeypatch.setattr("fastvlm_edge.commands.convert.has_gpu", lambda _: gpu)
    options = "--precision int4 --image-size 512 --geometry crop --context 4096 --name mine --adapter tune --force"
    assert main(["convert", "org/name", "-o", "out", *options.split()]) == 0
    seen.pop("progress")
    assert seen == {
        "checkpoint": "org/name",
        "output": Path("out"),
        "precision": "int4",
        "image_size": [512],
        "geometry": "crop",
        "context": 4096,
        "name": "mine",
        "adapter": "tune",
        "calibrate": None,
        "force": True,
    }
    assert capsys.readouterr().out.splitlines() == [
        f"out: fake, fp32, 256 px (16 tokens, pad), context 2048, {_size(model_dir):.1f} MB",
        *(["next: fastvlm-edge build out"] if gpu else []),
        f'{"then" if gpu else "next"}: fastvlm-edge run out --image PICTURE "What is in this picture?"',
    ]


def test_the_next_command_is_one_that_a_shell_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toolkit is called as the user called it, and names with spaces are quoted."""
    script = tmp_path / "bin folder" / "fastvlm-edge"
    script.parent.mkdir()
    script.touch(mode=0o755)
    python = Path(sys.executable)
    for started, path, words in (
        (script, "", [str(script)]),
        (script, str(script.parent), ["fastvlm-edge"]),
        (ROOT / "fastvlm_edge" / "__main__.py", "", [str(python), "-m", "fastvlm_edge"]),
        (ROOT / "fastvlm_edge" / "__main__.py", str(python.parent), [python.name, "-m", "fastvlm_edge"]),
        ("a_script_that_imports_the_toolkit.py", "", ["fastvlm-edge"]),
    ):
        monkeypatch.setattr(sys, "argv", [str(started), "convert"])
        monkeypatch.setenv("PATH", path)
        (command,) = next_commands(Path("my model's"), gpu=False)
        asked = ["run", "my model's", "--image", "PICTURE", "What is in this picture?"]
        assert shlex.split(command) == [*words, *asked]
        build, same = next_commands(Path("my model's"), gpu=True)
        assert shlex.split(build) == [*words, "build", "my model's"] and same == command


def _size(directory: Path) -> float:
    return sum((directory / name).stat().st_size for name in read_manifest(directory).files) / 1e6


@pytest.mark.parametrize(
    ("arguments", "which"),
    [
        ("convert CHECKPOINT -o", "-o/--output"),
        ("convert -o MODEL", "CHECKPOINT"),
        ("convert CHECKPOINT -o MODEL --calib", "--calib"),
        ("convert CHECKPOINT -o MODEL --adapter", "--adapter"),
        ("bundle MODEL --target x86_64 -o", "-o/--output"),
        ("bench MODEL -o", "-o/--output"),
        ("bench MODEL --plot", "--plot"),
        ("eval MODEL --data FILE --save", "--save"),
        ("eval MODEL --data", "--data"),
        ("plan 0.5b --target orin --plot", "--plot"),
        *((command, "MODEL") for command in ("run", "bench", "build", "doctor", "eval --data FILE", "plan --target orin")),
    ],
)
def test_an_empty_argument_is_not_the_working_directory(arguments: str, which: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Which is what a shell makes of a variable that is not set."""
    assert main([*arguments.split(), ""]) == 2
    assert f"argument {which}: it is empty" in capsys.readouterr().err


def test_a_module_of_the_project_that_is_missing_is_a_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "fastvlm_edge.convert.pipeline", None)
    assert main(["convert", "x", "-o", "y"]) == 1
    assert "a bug" in capsys.readouterr().err


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m fastvlm_edge ARGUMENTS` in a process, and in those that it starts, where some packages are not installed."""
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
            import os, sys
            from importlib import metadata

            version = metadata.version

            def version_of_others(name):
                if name in os.environ["BLOCKED"].lower().replace("pil", "pillow").split(","):
                    raise metadata.PackageNotFoundError(name)
                return version(name)

            metadata.version = version_of_others

            class Blocker:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] in os.environ["BLOCKED"].split(","):
                        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

            sys.meta_path.insert(0, Blocker())
        """)
    )

    def run(packages: str, arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "BLOCKED": packages}
        command = [sys.executable, "-m", "fastvlm_edge", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)

    return run


@pytest.mark.parametrize(
    ("package", "wanted", "arguments"),
    [
        ("numpy", "CLONE", "run MODEL --prompt x --json"),
        ("PIL", "CLONE", "run MODEL --prompt x --json"),
        ("tokenizers", "CLONE", "run MODEL --prompt x --json"),
        ("onnxruntime", "CLONE", "run MODEL --prompt x --json"),
        ("numpy", "CLONE", "bench MODEL --json"),
        ("onnxruntime", "CLONE", "bench MODEL --processes 1 --runs 1 --json"),
        ("matplotlib", "matplotlib>=3.9", "bench MODEL --plot PREFIX --json"),
        ("matplotlib", "matplotlib>=3.9", "plan 0.5b --target orin-nano --plot PREFIX --json"),
        ("numpy", "CLONE", "eval MODEL --data MODEL --json"),
        ("numpy", "CLONE", "build MODEL"),
        ("numpy", "CLONE", "convert CHECKPOINT -o PREFIX"),
        ("torch", "CLONE[convert]", "convert CHECKPOINT -o PREFIX"),
        ("onnx", "CLONE[convert]", "convert CHECKPOINT -o PREFIX"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    model_dir: Path,
    tmp_path: Path,
    without: Callable[..., subprocess.CompletedProcess[str]],
    package: str,
    wanted: str,
    arguments: str,
) -> None:
    if package == "onnx":
        pytest.importorskip("torch")  # else torch is the one that is named
    places = {"MODEL": model_dir, "PREFIX": tmp_path / "output", "CHECKPOINT": ROOT / "examples" / "demo" / "fastvlm-demo"}
    done = without(package, [places.get(word, word) for word in arguments.split()])
    message, mend = f"{package}, which is not installed", f'run: pip install "{wanted.replace("CLONE", str(ROOT))}"'
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert f"{message}; " in said and said.endswith(mend) and "a bug" not in said
    assert ("PyTorch's CPU build" in said) == (package == "torch")
    if "--json" in arguments:
        error = json.loads(done.stdout)["error"]
        assert error["message"].endswith(message) and error["mend"] == mend


def test_the_doctor_needs_no_package(without: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = without("numpy,PIL,tokenizers,onnxruntime,torch,onnx,tensorrt,tensorrt_rtx,cuda,pynvml", ["doctor", "--json"])
    assert "error" not in json.loads(done.stdout) and "Traceback" not in done.stderr


def test_interrupt_keeps_what_was_said_and_is_quiet(run: list[str]) -> None:
    process = start([*run, "--max-new-tokens", "1900"], env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and (first + out).endswith("\n") and "Traceback" not in err


def test_a_closed_pipe_is_quiet(run: list[str]) -> None:
    process = start([*run, "--max-new-tokens", "1900"])
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    told = process.stderr.read()
    assert all(word not in told for word in ("Traceback", "BrokenPipe", "Exception"))


def test_an_error_to_a_closed_pipe_is_quiet() -> None:
    process = start(["run", "gone", "--prompt", "x", "--json"])
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == ""


def test_a_terminal_that_is_not_unicode(run: list[str], vlm: FastVLM, picture: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    out, err = start([*run, "--max-new-tokens", "60"], env=environment).communicate(timeout=60)
    text = vlm.generate(PROMPT, picture, max_new_tokens=60).text
    assert not text.isascii() and out == text.encode("ascii", "replace").decode() + "\n" and "Traceback" not in err


def test_neither_importing_nor_running_loads_heavy_packages(run: list[str]) -> None:
    program = textwrap.dedent("""
        import sys
        import fastvlm_edge, fastvlm_edge.cli
        light = {name.partition(".")[0] for name in sys.modules}
        assert not light & {"numpy", "PIL", "tokenizers", "onnxruntime"}, light
        from fastvlm_edge import FastVLM, Reply, SamplingParams
        assert "onnxruntime" not in sys.modules
        assert fastvlm_edge.cli.main(sys.argv[1:]) == 0
        loaded = {name.partition(".")[0] for name in sys.modules}
        heavy = loaded & {"torch", "transformers", "onnx", "matplotlib", "timm", "safetensors", "ml_dtypes", "huggingface_hub", "scipy"}
        assert not heavy, heavy
        assert not any(name.startswith(("fastvlm_edge.convert", "fastvlm_edge.engines", "fastvlm_edge.calib")) for name in sys.modules)
    """)
    done = subprocess.run([sys.executable, "-c", program, *run, "--max-new-tokens", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_progress_redraws_on_a_terminal_and_is_sparse_in_a_log() -> None:
    import io

    terminal, log = io.StringIO(), io.StringIO()
    for stream, is_terminal in ((terminal, True), (log, False)):
        progress = TextProgress(stream, terminal=is_terminal)
        progress.stage("reading", 4)
        progress._shown -= 1
        progress.advance()
        progress.stage("writing")
        progress.done()
        progress.done()
    assert "reading  [######..................] 1/4" in terminal.getvalue() and terminal.getvalue().count("\n") == 2
    assert [line[:8].strip() for line in log.getvalue().splitlines()] == ["reading", "writing"]


def test_progress_shows_speed_and_time_left_where_units_take_about_the_same() -> None:
    import io

    log = io.StringIO()
    progress = TextProgress(log, terminal=False)
    for total, age in ((9000, 10.0), (None, 10.0), (4, 100.0)):
        progress.stage("answering", total, speed=True)
        progress._began -= age
        progress._shown -= 60
        progress.advance(20 if age == 10 else 2)
    lines = log.getvalue().splitlines()
    assert [line for line in lines if "answering  1" not in line] == [
        "answering  20/9000, 2.0/s, 1:14:50 left",
        "answering ... 20, 2.0/s",
        "answering  2/4, 50.0 s each, 1:40 left",
    ]


def test_an_unknown_name_of_the_package() -> None:
    import fastvlm_edge

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastvlm_edge.nothing  # noqa: B018
    assert issubclass(FastVLMError, Exception)
