"""`fastvlm-edge run`: ask one question about an image; the reply goes to stdout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from fastvlm_edge.backends.protocol import PREFILL_CHUNK
from fastvlm_edge.backends.select import BACKENDS
from fastvlm_edge.commands.arguments import positive
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.generation.sampling import SamplingParams
from fastvlm_edge.generation.vlm import FastVLM
from fastvlm_edge.inputs.preprocess import GEOMETRIES
from fastvlm_edge.machine.power import NoSensor, PowerFigures, PowerRecorder, find_sensor, power_json
from fastvlm_edge.progress import SilentProgress, stderr_progress


def main(arguments: Sequence[str]) -> int:
    """Stream the reply to stdout and print timings on stderr, or print one object with `--json`."""
    options = parser().parse_args(arguments)
    sampling: dict[str, Any] = {
        field.name: tuple(getattr(options, field.name)) if field.name == "stop" else getattr(options, field.name)
        for field in dataclasses.fields(SamplingParams)
    }
    SamplingParams(**sampling)  # wrong values are reported before the model loads
    vlm = FastVLM.load(
        options.model,
        options.backend,
        threads=options.threads,
        verify=options.verify,
        geometry=options.geometry,
        background=options.background,
        prefill_chunk=options.prefill_chunk,
        tune_process=True,
        progress=SilentProgress() if options.json else stderr_progress(),
    )
    with vlm:
        recorder = PowerRecorder(find_sensor(card=vlm.backend.name != "ort"))
        stream = vlm.stream(options.prompt, options.image, **sampling)
        if options.json:
            with recorder:
                for _ in stream:
                    pass
            power = power_json(recorder.figures(), stream.reply.timings.new_tokens)
            print(json.dumps({**stream.reply.to_json(), "power": power}, ensure_ascii=False))
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
        print(_summary(stream.reply, vlm.backend.description, recorder.figures()), file=sys.stderr)
    return 0


def _summary(reply: Reply, backend: str, power: PowerFigures | NoSensor) -> str:
    timings = reply.timings
    reason = f"stop string {reply.stop_string!r}" if reply.stop_string is not None else reply.stop_reason
    speed = f", then {timings.decode_tokens_per_second:.1f} tokens/s" if timings.decode_tokens_per_second else ""
    return (
        f"[{timings.prompt_tokens} + {timings.new_tokens} tokens, ended by {reason}; first token {timings.ttft_ms:.0f} ms "
        f"(preprocess {timings.preprocess_ms:.0f}, vision {timings.vision_ms:.0f}, prefill {timings.prefill_ms:.0f}){speed}; "
        f"{backend}, {reply.precision}{_power(power, timings.new_tokens)}]"
    )


def _power(figures: PowerFigures | NoSensor, tokens: int) -> str:
    """Power and energy, or nothing if there is no sensor. `--json` gives the reason."""
    if isinstance(figures, NoSensor):
        return ""
    parts = [f"{figures.mean_w:.1f} W on {figures.sensor}"]
    if tokens:
        parts.append(f"{figures.energy_j / tokens:.2f} J/token")
    if figures.temperature_c is not None:
        parts.append(f"{figures.temperature_c:.0f} °C")
    if figures.throttled:
        parts.append("throttled")
    return "; " + ", ".join(parts)


def parser() -> argparse.ArgumentParser:
    """The options of `fastvlm-edge run`."""
    parser = argparse.ArgumentParser(prog="fastvlm-edge run", description="Ask a question about an image. The reply streams to stdout.")
    parser.add_argument("model", metavar="MODEL", help="model directory, made by fastvlm-edge convert")
    parser.add_argument(
        "--image", metavar="FILE", action="append", help="image file; repeat the option for several images, omit it to ask without one"
    )
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the question")
    defaults = SamplingParams()
    group = parser.add_argument_group("the reply")
    group.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=defaults.max_new_tokens, help="longest reply, in tokens (default: %(default)s)"
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=defaults.temperature,
        help="randomness of sampling; 0, the default, always takes the most likely token",
    )
    group.add_argument("--top-k", metavar="K", type=int, help="sample from the K most likely tokens (default and maximum: 64)")
    group.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=defaults.top_p,
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
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what runs the model; auto takes the best that can (default: %(default)s)"
    )
    group.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: all that this process may use)")
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
    group.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser
