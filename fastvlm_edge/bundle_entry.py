"""The command line of a bundle on its board: the commands of fastvlm-edge, which use the bundled model, and a few of its own.

The shell header of the bundle calls `main` after `fastvlm_edge/bundling/start.py` has unpacked the runtime.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastvlm_edge import cli
from fastvlm_edge.bundling import unit
from fastvlm_edge.bundling.start import Bundle, BundleError, ensure, state_folder, unpacked
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.engine_record import find_records, gpu_of, mismatch
from fastvlm_edge.model_dir.json_record import parse_json
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.model_dir.verified import remember
from fastvlm_edge.nvidia.drivers import open_cuda
from fastvlm_edge.nvidia.tensorrt_library import find_library
from fastvlm_edge.progress import stderr_progress

MODEL = "model"
"""Word on the command line for the bundled model, if there is no directory of that name."""
NOT_HERE = {
    "convert": "conversion needs PyTorch",
    "bundle": "bundling needs pip and a network",
    "demo": "it has a model of its own",
}
_ENGINES = ("run", "chat", "serve", "watch", "batch", "bench", "eval")
"""Commands that answer questions: missing engines are built before them."""
_OPTIONAL = ("doctor",)
"""Commands that do without a model if none is named."""


def main(bundle: Bundle, arguments: list[str]) -> int:
    """Run one command and return its exit status. Raises BundleError for everything that a user can put right."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        if command in ("-h", "--help"):
            print(_help(bundle))
            return 0
        if command in NOT_HERE:
            raise BundleError(f"{command} is not part of a bundle: {NOT_HERE[command]}", "run it on a computer with fastvlm-edge installed")
        if command in OWN:
            return _run_own(bundle, command, rest)
        if command not in cli.COMMANDS:
            return cli.main([command, *rest])
        return cli.main([command, *_with_model(bundle, command, rest)])
    except FastVLMError as error:
        raise BundleError(error.what, error.mend) from None


# The model ----------------------------------------------------------------------------------------------------------------------


def _with_model(bundle: Bundle, command: str, arguments: list[str]) -> list[str]:
    """The arguments, with the bundled model if MODEL is missing or is the word `model`. MODEL comes directly after the command."""
    if {"-h", "--help"} & set(arguments):
        return arguments
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if named == MODEL and not os.path.isdir(named):
        arguments = arguments[1:]
    elif named is not None and not (command == "run" and _is_question(arguments)):
        return arguments
    if named is None and command in _OPTIONAL:
        return arguments
    model = unpack_model(bundle, hashes=False)
    if command == "eval" and _fits_cascade(arguments):
        mend = f"fit it before the model is bundled, or copy {model} and give the copy"
        raise BundleError("the bundled model is not changed, so --accuracy-drop cannot write a cascade into it", mend)
    if command in _ENGINES and not _names_onnxruntime(arguments):
        build_missing_engines(bundle, model)
    return [str(model), *arguments]


def _is_question(arguments: list[str]) -> bool:
    """Whether the first argument of `run` is the question: nothing else is one, and no directory has its name."""
    from fastvlm_edge.commands.run import parser

    options = parser().parse_intermixed_args(arguments)  # without the check that there is a question
    behind_image = any(len(group) > 1 for group in options.image or [])
    return not (options.question or options.prompt is not None or behind_image or os.path.isdir(options.model))


def _fits_cascade(arguments: list[str]) -> bool:
    """Whether `eval` would change the manifest."""
    from fastvlm_edge.commands.eval import parser

    return parser().parse_args([MODEL, *arguments]).accuracy_drop is not None


def _names_onnxruntime(arguments: list[str]) -> bool:
    words = " ".join(arguments).replace("--backend=", "--backend ")
    return "--backend ort" in words


def unpack_model(bundle: Bundle, *, hashes: bool) -> Path:
    """Directory of the bundled model, unpacked and checked."""
    progress = stderr_progress()
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        progress.advance(((done + count) >> 20) - (done >> 20))
        done += count

    if unpacked(bundle, MODEL) is None:
        total = sum(record["bytes"] for record in bundle.files(MODEL).values())
        progress.stage("unpacking the model, once (MB)", total >> 20)
    folder = ensure(bundle, MODEL, hashes=hashes, advance=advance)
    progress.done()
    remember(folder, read_manifest(folder))  # `ensure` has compared all files
    return folder


def build_missing_engines(bundle: Bundle, model: Path) -> bool:
    """Build engines for the GPU of this machine if TensorRT is installed and none fit yet. Returns whether there are engines now.

    A build that failed is not repeated until the user runs `build`; until then onnxruntime answers.
    """
    try:
        library = find_library()
        cuda = open_cuda()
    except FastVLMError:
        return False
    try:
        device = cuda.device
    finally:
        cuda.close()
    manifest = read_manifest(model)
    here = gpu_of(device)
    if any(mismatch(record, manifest, library.name, library.version, here) is None for record in find_records(model)):
        return True
    progress = stderr_progress()
    failed = model.parent / f"{model.name}.failed"
    machine = f"{library.name} {library.version}, {device.name}"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        last = parse_json(failed.read_text(encoding="utf-8"))
        if last["machine"] == machine:
            progress.note(f"no engines: {last['error']}; to try again, run: {bundle.path} build")
            return False
    if not os.access(model, os.W_OK):
        progress.note(f"no engines yet, and {model} is not writable; run: sudo {bundle.path} prepare")
        return False
    from fastvlm_edge.backends.ort_session import share_arena
    from fastvlm_edge.engines.build import build

    share_arena()  # for a comparison with onnxruntime
    try:
        build(model, progress=progress)
    except FastVLMError as error:
        progress.note(f"warning: no engines: {error}")
        failed.write_text(json.dumps({"machine": machine, "error": str(error)}), encoding="utf-8")
        return False
    return True


# Own commands -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OwnCommand:
    """A command that only a bundle has."""

    call: Callable[[Bundle, list[str]], str]
    """Takes the arguments and returns the text to print."""
    summary: str
    flag: str | None = None
    """The only option without a value."""
    option: str | None = None
    """The only option with a value."""
    argument: str | None = None
    """The only argument; it may be left out."""

    @property
    def usage(self) -> str:
        words = (self.flag, self.option and f"{self.option} DIR", self.argument)
        return "".join(f" [{word}]" for word in words if word)

    def accepts(self, arguments: list[str]) -> bool:
        """Whether these arguments are possible."""
        rest = [word for word in arguments if word != self.flag]
        if self.option:
            return not rest or (len(rest) == 2 and rest[0] == self.option)
        return len(rest) <= (1 if self.argument else 0)


def _run_own(bundle: Bundle, command: str, arguments: list[str]) -> int:
    own = OWN[command]
    if arguments in (["-h"], ["--help"]):
        print(f"{command}{own.usage}: {own.summary}")
        return 0
    if not own.accepts(arguments):
        print(f"{bundle.path.name}: error: {command} does not take {' '.join(arguments)}; see --help", file=sys.stderr)
        return 2
    print(own.call(bundle, arguments), flush=True)
    return 0


def _root(words: list[str]) -> Path | None:
    return Path(words[words.index(_ROOT) + 1]) if _ROOT in words else None


def _prepare(bundle: Bundle) -> str:
    model = unpack_model(bundle, hashes=True)
    engines = "engines are built" if build_missing_engines(bundle, model) else "no engines: onnxruntime answers"
    return f"{model}: checked, {engines}"


def _licences(bundle: Bundle, words: list[str]) -> str:
    rows = bundle.index["licences"]
    model = bundle.index["model"]
    own_files = bundle.index["model_licences"]
    if not words:
        lines = [f"{row['name']:18}{row['version']:14}{row['licence']}" for row in rows]
        said = f"see `licenses model` ({', '.join(own_files)})" if own_files else "not in its directory; ask whoever converted it"
        return "\n".join([*lines, f"{MODEL:18}{model['precision']:14}{said}; converted from {model['source']}"])
    runtime = unpacked(bundle, "runtime")
    assert runtime is not None  # this code runs from it
    texts: dict[str, list[bytes]] = {row["name"]: [(runtime / name).read_bytes() for name in row["files"]] for row in rows}
    if own_files:
        texts[MODEL] = [bundle.open(bundle.files(MODEL)[name]).read() for name in own_files]
    if not texts.get(words[0]):
        raise BundleError(f"there is no licence text of {words[0]!r}", f"use one of: {', '.join(name for name in texts if texts[name])}")
    return "\n\n".join(text.decode("utf-8", "replace") for text in texts[words[0]])


def _about(bundle: Bundle) -> str:
    index = {key: value for key, value in bundle.index.items() if key not in ("parts", "licences")}
    folders = {part: str(unpacked(bundle, part) or state_folder() / bundle.folder(part)) for part in bundle.index["parts"]}
    return json.dumps({**index, "index_sha256": bundle.index_sha256, "folders": folders}, indent=1)


def _help(bundle: Bundle) -> str:
    index = bundle.index
    rows = {name: summary for name, summary in cli.COMMANDS.items() if name not in NOT_HERE}
    rows |= {name: own.summary for name, own in OWN.items()}
    head = f"{bundle.path.name}: fastvlm-edge {index['toolkit_version']} with {index['model']['name']} ({index['model']['precision']})"
    return "\n".join(
        [
            f"{head} for {index['title']}",
            f"usage: {bundle.path.name} COMMAND [MODEL] ...; MODEL comes directly after COMMAND, and the default is the bundled model",
            *(f"  {name:11}{summary}" for name, summary in rows.items()),
        ]
    )


_ROOT = "--root"
_SERVE = "--serve"
OWN = {
    "prepare": _OwnCommand(lambda bundle, _: _prepare(bundle), "unpack, check every hash, build missing engines"),
    "install": _OwnCommand(
        lambda bundle, words: unit.install(bundle.path, _root(words), serve=_SERVE in words),
        "run prepare at every boot, with systemd (as root); with --serve also the server",
        flag=_SERVE,
        option=_ROOT,
    ),
    "uninstall": _OwnCommand(lambda bundle, words: unit.uninstall(bundle.path, _root(words)), "undo install (as root)", option=_ROOT),
    "licenses": _OwnCommand(_licences, "list all licences; with PACKAGE, print its licence text", argument="PACKAGE"),
    "about": _OwnCommand(lambda bundle, _: _about(bundle), "print the contents and where they are unpacked, as JSON"),
}
"""Commands that only a bundle has."""
