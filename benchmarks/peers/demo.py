"""The demo model's answers as a check of a GPU: which of them are the same as onnxruntime's on the CPU, in FP32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.protocol import ROOT

if TYPE_CHECKING:
    from fastvlm_edge import FastVLM

DEMO = ROOT / "examples" / "demo" / "fastvlm-demo"
QUESTIONS, SEED, NEW_TOKENS = 16, 2026, 16


def questions() -> list[tuple[str, Any]]:
    """(prompt, PIL image) of held-out scenes."""
    from examples.demo_training.scenes import make_scene

    scenes = [make_scene("heldout", SEED, index) for index in range(QUESTIONS)]
    return [(scene.questions[0].prompt, scene.image) for scene in scenes]


def demo_model(folder: Path, precision: str) -> Path:
    """The demo's model directory in `folder`, converted if it does not exist; it takes a second."""
    from fastvlm_edge.convert.pipeline import convert

    directory = folder / f"demo-{precision}"
    if not (directory / "fastvlm.json").is_file():
        convert(str(DEMO), directory, precision=precision)
    return directory


def ask(vlm: FastVLM) -> list[list[int]]:
    """Ids of the greedy replies to the questions."""
    return [vlm.generate(prompt, image=image, max_new_tokens=NEW_TOKENS).token_ids for prompt, image in questions()]


def prompts(folder: Path) -> Iterator[tuple[list[int], Any, list[int], int]]:
    """For each question: ids of the whole prompt, pixel_values [1, 3, S, S], the ids that end a reply, the size of the vocabulary."""
    from fastvlm_edge.inputs.preprocess import preprocess
    from fastvlm_edge.inputs.prompt import ChatTemplate
    from fastvlm_edge.inputs.tokenizer import TextTokenizer
    from fastvlm_edge.model_dir.manifest import read_manifest

    directory = demo_model(folder, "fp32")
    manifest = read_manifest(directory)
    template = ChatTemplate(TextTokenizer(directory / "tokenizer.json"), manifest)
    vision = manifest.vision
    for prompt, image in questions():
        ids = template.opening() + template.turn(prompt, (vision.tokens,))
        yield ids, preprocess(image, vision.image_size, vision.geometry), manifest.text.stop_ids, manifest.decoder.vocab


def compare_replies(folder: Path, found: list[list[int]]) -> dict[str, Any]:
    """`{"asked", "equal"}`: how many replies are those of onnxruntime on the CPU, which are computed once and kept in `folder`."""
    from fastvlm_edge import FastVLM

    path = folder / "demo-replies.json"
    if not path.is_file():
        with FastVLM.load(demo_model(folder, "fp32"), "ort") as vlm:
            path.write_text(json.dumps(ask(vlm)), encoding="utf-8")
    expected = json.loads(path.read_text(encoding="utf-8"))
    return {"asked": len(expected), "equal": sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))}
