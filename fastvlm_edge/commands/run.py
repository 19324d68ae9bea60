"""`fastvlm-edge run`: ask one question about an image; the reply goes to stdout."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shlex
import stat
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from fastvlm_edge.backends.ort_session import share_arena
from fastvlm_edge.backends.protocol import PREFILL_CHUNK
from fastvlm_edge.backends.select import BACKENDS
from fastvlm_edge.camera.clip import FRAMES, check_frames, frames_of_clip
from fastvlm_edge.commands.arguments import given, given_path, image_size, positive
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.answer_format import answer_format, read_schema, schema_text
from fastvlm_edge.generation.cascade import ImageSize, sizes_to_try
from fastvlm_edge.generation.engine import Engine
from fastvlm_edge.generation.grammar import compile_grammar
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.generation.sampling import SamplingParams
from fastvlm_edge.generation.vlm import FastVLM, check_question, load_parts
from fastvlm_edge.inputs.image_input import ImageInput, load_rgb, read_all
from fastvlm_edge.inputs.preprocess import GEOMETRIES
from fastvlm_edge.inputs.rgb import to_colour
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.machine.power import NoSensor, PowerFigures, PowerRecorder, find_sensor, power_json
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME, Manifest
from fastvlm_edge.model_dir.mistaken import is_address, is_regular_file, looks_like_picture, shortened
from fastvlm_edge.pretrained import converted, is_hub_id
from fastvlm_edge.progress import Progress, SilentProgress, stderr_progress

_NEED_TEMPERATURE = ("top_k", "top_p", "seed")
"""Options that have no effect on greedy decoding."""
_FORMATS = ("json_schema", "choices", "regex")
"""Options of which one may say what the reply must look like."""
MODEL_HELP = "model directory, made by fastvlm-edge convert, or a hub id such as apple/FastVLM-0.5B, which is converted at its first use"
ENDS = {"length": ", cut off by --max-new-tokens", "context": ", the context is full"}


def main(arguments: Sequence[str]) -> int:
    """Stream the reply to stdout and print one line about it on stderr, or print one object with `--json`."""
    options = parser().parse_args(arguments)
    _check_places(options)
    sampling = sampling_options(options)
    if options.frames is not None and options.video is None:
        raise FastVLMError("--frames without --video", "name the clip with --video FILE")
    images = _images(options)
    progress = SilentProgress() if options.json or options.quiet else stderr_progress()

    def check(manifest: Manifest, tokenizer: TextTokenizer) -> None:
        if options.video is not None:
            images.extend(_frames(options, manifest, tokenizer, special_tokens=sampling.get("special_tokens", False)))
        check_reply(manifest, tokenizer, options, sampling, len(images))

    with load(options, progress, check) as vlm:
        recorder = PowerRecorder(find_sensor(card=vlm.backend.name != "ort"))
        stream = vlm.stream(options.prompt, images, system=options.system, **sampling)
        if options.json:
            with recorder:
                for _ in stream:
                    pass
            power = power_json(recorder.figures(), stream.reply.timings.new_tokens)
            document = {**stream.reply.to_json(), "backend_description": vlm.backend.description, "power": power}
            print(json.dumps(document, ensure_ascii=False))
            return 0
        began = False
        try:
            with recorder:
                for text in stream:
                    began = True
                    print(text, end="", flush=True)
        except (FastVLMError, KeyboardInterrupt):
            if began:
                print(flush=True)
            raise
        print(flush=True)
        if not options.quiet:
            print(_summary(stream.reply, recorder.figures()), file=sys.stderr)
    return 0


def check_reply(manifest: Manifest, tokenizer: TextTokenizer, options: argparse.Namespace, sampling: dict[str, Any], images: int) -> None:
    """Raise FastVLMError if the model cannot be asked this, or cannot answer in this format. `sampling` is that of `sampling_options`."""
    special = sampling.get("special_tokens", False)
    check_question(
        manifest, tokenizer, options.prompt, images, image_size=options.image_size, system=options.system, special_tokens=special
    )
    check_format(manifest, tokenizer, sampling)


def check_format(manifest: Manifest, tokenizer: TextTokenizer, sampling: dict[str, Any]) -> None:
    """Raise FastVLMError if the model cannot answer in the format that `sampling` asks for."""
    wanted = answer_format(**{name: sampling[name] for name in _FORMATS if name in sampling})
    if wanted is not None:
        compile_grammar(tokenizer, manifest, wanted)


# What was asked for -------------------------------------------------------------------------------------------------------------


def _check_places(options: argparse.Namespace) -> None:
    """Raise FastVLMError if a model directory, a picture or an address stands where the question belongs."""
    prompt: str = options.prompt
    if is_regular_file(Path(prompt, MANIFEST_NAME)) and not Path(options.model).exists():
        raise FastVLMError(
            f"{prompt} is a model directory, not a question", f'run: fastvlm-edge run {shlex.quote(prompt)} --image FILE "QUESTION"'
        )
    if is_address(prompt) and not any(map(str.isspace, prompt)):
        what = f"the question is only an address, {shortened(prompt)}"
        raise FastVLMError(what, "save the picture that it stands for as a file, and give that with --image")
    if looks_like_picture(prompt) and not any(map(str.isspace, prompt)):
        raise FastVLMError(f"the question is the name of a picture, {prompt}", f'give it with --image {shlex.quote(prompt)} "QUESTION"')


def _format(options: argparse.Namespace) -> dict[str, Any]:
    """What the reply must look like, as a keyword of `FastVLM.stream`. Raises FastVLMError if the schema is not usable."""
    if options.json_schema is not None:
        schema = read_schema(options.json_schema)
        schema_text(schema)
        return {"json_schema": schema}
    return {name: value for name in _FORMATS[1:] if (value := getattr(options, name)) is not None}


def sampling_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, for `FastVLM.stream`. Raises FastVLMError for a value that is out of range or has no effect."""
    wanted = _format(options)
    names = [field.name for field in dataclasses.fields(SamplingParams) if field.name != "format"]
    given: dict[str, Any] = {name: getattr(options, name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    idle = [f"--{name.replace('_', '-')}" for name in _NEED_TEMPERATURE if name in given and "temperature" not in given]
    params = SamplingParams(**given, format=answer_format(**wanted))
    if idle:
        what = f"{', '.join(idle)} without --temperature: the most likely token is always taken"
        raise FastVLMError(what, f"add --temperature 0.7, or leave {'it' if len(idle) == 1 else 'them'} out")
    if params.logprobs is not None and not options.json:
        raise FastVLMError("--logprobs without --json: only the JSON object has them", "add --json")
    return {**given, **wanted}


class _Piped(io.BytesIO):
    """A picture that was piped in, which can be read only once. `name` is for errors."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        super().__init__(read_all(file, name).getvalue())
        self.name = name


def _is_pipe(name: str) -> bool:
    with contextlib.suppress(OSError, ValueError):  # `load_rgb` says what is wrong
        return stat.S_ISFIFO(os.stat(name).st_mode)
    return False


def _images(options: argparse.Namespace) -> list[ImageInput]:
    """The pictures: paths, and what was piped in. Each is decoded once here as a check, because loading a model may take minutes."""
    if options.image and options.video is not None:
        raise FastVLMError("--video and --image were given, but a question is about one of them", "leave one out")
    if options.image.count("-") > 1:
        raise FastVLMError("--image - is given twice, but stdin has only one picture", "give the others as files")
    images: list[ImageInput] = []
    for name in options.image:
        image: ImageInput = name
        if name == "-":
            if sys.stdin.isatty():
                raise FastVLMError("--image - reads a picture from stdin, which is a terminal", "pipe one in, or give --image FILE")
            image = _Piped(sys.stdin.buffer, "stdin")
        elif _is_pipe(name):
            with open(name, "rb") as file:
                image = _Piped(file, name)
        load_rgb(image, options.background)
        if isinstance(image, _Piped):
            image.seek(0)
        images.append(image)
    to_colour(options.background)
    return images


def _frames(options: argparse.Namespace, manifest: Manifest, tokenizer: TextTokenizer, *, special_tokens: bool) -> list[ImageInput]:
    """The frames of the clip. Raises FastVLMError before they are decoded if they do not fit into the context."""
    size = sizes_to_try(options.image_size, manifest)[0]
    check = partial(
        check_frames, manifest, tokenizer, options.prompt, image_size=size, system=options.system, special_tokens=special_tokens
    )
    return list(frames_of_clip(options.video, FRAMES if options.frames is None else options.frames, check=check))


# What is printed ----------------------------------------------------------------------------------------------------------------


def _summary(reply: Reply, power: PowerFigures | NoSensor) -> str:
    """One short line; `--json` has all figures."""
    timings = reply.timings
    speed = f", then {timings.decode_tokens_per_second:.1f} tokens/s" if timings.new_tokens > 1 else ""
    tokens = f"{timings.new_tokens} token{'s' * (timings.new_tokens != 1)}{ENDS.get(reply.stop_reason, '')}"
    size = f"; {', then '.join(map(str, reply.tried_sizes))} px" if reply.tried_sizes else ""
    return f"[{tokens}, first after {timings.ttft_ms:.0f} ms{speed}{size}; {reply.backend}, {reply.precision}{_power(power)}]"


def _power(figures: PowerFigures | NoSensor) -> str:
    """The mean power, or nothing if there is no sensor. `--json` gives the reason."""
    if isinstance(figures, NoSensor):
        return ""
    return f", {figures.mean_w:.1f} W" + (", throttled" if figures.throttled else "")


class _Parser(argparse.ArgumentParser):
    """Accepts the question before, between and behind the options, also directly behind the files of `--image`."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The options, with `image` as a list of names and `prompt` from wherever it stands."""
        options = self.parse_intermixed_args(args, namespace)
        groups: list[list[str]] = options.image or []
        words: list[str] = options.question
        if len(words) > 1:
            self.error(f"{len(words)} arguments after MODEL: give pictures with --image, and put the question in quotes")
        if options.prompt is not None and words:
            self.error("the question is given twice: as an argument, and with --prompt")
        if options.prompt is None:
            options.prompt = words[0] if words else _last_word(groups)
        if options.prompt is None:
            self.error('a question is missing: fastvlm-edge run MODEL --image FILE "QUESTION"')
        options.image = [name for group in groups for name in group]
        return options


def _last_word(groups: list[list[str]]) -> str | None:
    """Take the question from behind the files of an `--image`, which takes all words up to the next option."""
    for group in reversed(groups):
        if len(group) > 1:
            return group.pop()
    return None


def parser() -> argparse.ArgumentParser:
    """The options of `fastvlm-edge run`."""
    parser = _Parser(prog="fastvlm-edge run", description="Ask a question about an image. The reply streams to stdout.")
    parser.add_argument("model", metavar="MODEL", type=given, help=MODEL_HELP)
    parser.add_argument("question", metavar="QUESTION", nargs="*", help="the question, before or after the options")
    parser.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        nargs="+",
        help="image file, or - for stdin; several may be given, or none to ask without an image",
    )
    parser.add_argument("--video", metavar="FILE", type=given, help="video clip, which is shown as frames that are spread evenly over it")
    parser.add_argument("--frames", metavar="N", type=positive, help=f"number of frames that stand for the clip (default: {FRAMES})")
    parser.add_argument("--prompt", metavar="TEXT", help="the question, instead of QUESTION")
    add_reply_options(parser)
    group = add_loading_options(parser)
    group.add_argument(
        "--logprobs",
        metavar="N",
        type=int,
        help="with --json: the log probability of each token, and the N most likely ones at its place (at most 20)",
    )
    group.add_argument("-q", "--quiet", action="store_true", help="print nothing but the reply and errors")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def add_reply_options(parser: argparse.ArgumentParser) -> None:
    """The options of `SamplingParams`, and the system prompt."""
    defaults = SamplingParams()
    group = parser.add_argument_group("the reply")
    group.add_argument("--system", metavar="TEXT", help='the system prompt, "" for none (default: that of the model)')
    group.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=defaults.max_new_tokens, help="longest reply, in tokens (default: %(default)s)"
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        help="randomness of sampling, such as 0.7; 0, the default, always takes the most likely token",
    )
    group.add_argument("--top-k", metavar="K", type=int, help="sample from the K most likely tokens (default and maximum: 64)")
    group.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        help="sample from the most likely tokens whose probabilities add up to P (default: 1)",
    )
    group.add_argument("--seed", metavar="N", type=int, help="random seed, to make sampling reproducible")
    group.add_argument(
        "--repetition-penalty",
        metavar="X",
        type=float,
        default=defaults.repetition_penalty,
        help="values above 1 discourage repetition (default: 1)",
    )
    group.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end the reply before this text; may be repeated")
    group.add_argument(
        "--special-tokens",
        action="store_true",
        help="read special tokens in the prompt, such as <loc_12> of a fine-tune, as tokens, and show those in the reply",
    )
    group = parser.add_argument_group("what the reply must look like (one of these; needs llguidance)").add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="FILE", type=given_path, help="JSON that is valid for the schema in this file")
    group.add_argument("--choice", metavar="TEXT", dest="choices", action="append", help="one of the texts; give it once for each")
    group.add_argument(
        "--regex", metavar="REGEX", help="text that matches this regular expression as a whole, in the syntax of Rust's regex"
    )


def model_directory(model: str | Path, progress: Progress, image_size: ImageSize = None) -> str | Path:
    """The model directory that a MODEL of the command line stands for: itself, or a hub id after its conversion, for one size if given."""
    if not is_hub_id(os.fspath(model)):
        return model
    share_arena()  # for the comparison with PyTorch, too
    return converted(model, image_size=image_size if isinstance(image_size, int) else None, progress=progress)


def load(
    options: argparse.Namespace,
    progress: Progress,
    check: Callable[[Manifest, TextTokenizer], None] | None = None,
    *,
    slots: int = 1,
) -> FastVLM:
    """The model, loaded with the options of `add_loading_options`. `check` and errors as in `load_parts`.

    A hub id is converted at its first use.
    """
    manifest, tokenizer, backend = load_parts(
        model_directory(options.model, progress, options.image_size),
        options.backend,
        threads=options.threads,
        slots=slots,
        image_size=options.image_size,
        verify=options.verify,
        tune_process=True,
        progress=progress,
        check=check,
    )
    if options.image_size == "auto" and manifest.cascade is None:
        progress.note(f"warning: {never_fitted(manifest, options.model)}")
    return FastVLM(
        manifest,
        tokenizer,
        Engine(backend, manifest.decoder),
        image_size=options.image_size,
        geometry=options.geometry,
        background=options.background,
        prefill_chunk=options.prefill_chunk,
    )


def never_fitted(manifest: Manifest, model: str | Path) -> str:
    """What `--image-size auto` means for a model without a cascade."""
    fit = f"fastvlm-edge eval {shlex.quote(os.fspath(model))} --data FILE --image-size auto --accuracy-drop 0.5"
    return f"--image-size auto of this model was never fitted, so pictures have {manifest.vision.image_size} px; run: {fit}"


def add_loading_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What `load_parts` and `FastVLM` take."""
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what runs the model; auto takes the best that can (default: %(default)s)"
    )
    group.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: all that this process may use)")
    group.add_argument(
        "--image-size",
        metavar="PX|auto",
        type=image_size,
        help="size of the pictures, one that the model was converted with (default: the first of them); auto answers at a small one first, "
        "and at a larger one when it is not sure (docs/image_size.md)",
    )
    group.add_argument("--geometry", choices=GEOMETRIES, help="how the image becomes a square (default: as converted)")
    group.add_argument(
        "--background",
        metavar="COLOUR",
        default="white",
        help="what is behind transparent pixels: a name or #rrggbb (default: %(default)s)",
    )
    group.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=positive,
        default=PREFILL_CHUNK,
        help="tokens per prefill call (default: %(default)s); smaller uses less memory",
    )
    group.add_argument("--verify", action="store_true", help="first compare the sha256 of every model file with the manifest")
    return group
