"""The workload of the peers, made once in the project's own environment: checkpoint, model directories, the LLM alone, pictures, ids."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.checkpoint import random_checkpoint
from benchmarks.peers.protocol import ROOT
from fastvlm_edge.bench.workload import TEXT_TOKENS, Pictures, question_near
from fastvlm_edge.inputs.preprocess import preprocess
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.progress import Progress

PRECISIONS = ("fp32", "int8", "int4")
PICTURES = 8
NEW_TOKENS = 65


def prepare(folder: Path, size: str, progress: Progress, precisions: Sequence[str] = PRECISIONS) -> None:
    """Make everything below `folder` that is missing, and convert again what an older converter wrote.

    `size` is a key of `examples.checkpoints.random_checkpoint.SIZES`.
    """
    from fastvlm_edge.convert.pipeline import convert

    progress.stage("random checkpoint")
    checkpoint = random_checkpoint(folder, size)
    progress.done()
    for precision in precisions:
        made_by = folder / f"{precision}.made-by"
        if not made_by.is_file() or made_by.read_text(encoding="ascii") != converter_digest():
            shutil.rmtree(folder / precision, ignore_errors=True)
            convert(str(checkpoint), folder / precision, precision=precision, context=2048, progress=progress)
            made_by.write_text(converter_digest(), encoding="ascii")
    if not (folder / "qwen2" / "config.json").is_file():
        write_llm(checkpoint, folder / "qwen2")
    directory = folder / precisions[0]
    manifest = read_manifest(directory)
    template = ChatTemplate(TextTokenizer(directory / "tokenizer.json"), manifest)

    def whole(prompt: str) -> list[int]:
        return template.opening() + template.turn(prompt, (manifest.vision.tokens,))

    if not (folder / "pixels.npy").is_file():
        pictures = Pictures()
        pixels = [preprocess(pictures.new(), manifest.vision.image_size, manifest.vision.geometry) for _ in range(PICTURES)]
        pixels = [np.roll(each, 61 * number, axis=3) for number, each in enumerate(pixels)]
        np.save(folder / "pixels.npy", np.concatenate(pixels))
    document = {
        "size": size,
        "image_size": manifest.vision.image_size,
        "visual_tokens": manifest.vision.tokens,
        "vocab": manifest.decoder.vocab,
        "ids": whole(question_near(lambda prompt: len(whole(prompt)), manifest.vision.tokens + TEXT_TOKENS)),
        "new_tokens": NEW_TOKENS,
    }
    (folder / "workload.json").write_text(json.dumps(document) + "\n", encoding="utf-8")


def converter_digest() -> str:
    """Changes with the source of the converter: yesterday's graphs must not be measured as today's."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "convert").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_llm(checkpoint: Path, folder: Path) -> None:
    """Write the LLM of a native FastVLM checkpoint as a checkpoint of `Qwen2ForCausalLM`, for tools that do not know FastVLM."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["text_config"]
    tensors = {}
    with safe_open(checkpoint / "model.safetensors", framework="pt") as source:
        for name in source.keys():  # noqa: SIM118
            if name.startswith("model.language_model."):
                tensors["model." + name.removeprefix("model.language_model.")] = source.get_tensor(name)
            elif name == "lm_head.weight":
                tensors[name] = source.get_tensor(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(checkpoint / name, folder / name)
    config |= {"architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")  # last: it says that the rest exists
