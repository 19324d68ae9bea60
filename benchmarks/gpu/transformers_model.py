"""FastVLM in transformers for the GPU benchmark: loaded, and asked with the same ids and pictures as our own backends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Part
from benchmarks.gpu.workload import DEMO, Task, demo_questions, model_directory, photograph
from fastvlm_edge.bench.record import digits
from fastvlm_edge.bench.workload import question
from fastvlm_edge.machine.peak_memory import DeviceMemory


@dataclass
class Loaded:
    """A model of transformers, and the ids that it is asked with."""

    torch: Any
    model: Any
    device: str
    image_size: int

    def ids(self, ids: list[int], vocab: int) -> Any:
        """Ids of ours, where `vocab + k` is row k of the picture, as transformers wants them: [1, n]."""
        picture = self.model.config.image_token_id
        return self.torch.tensor([[picture if each >= vocab else each for each in ids]], device=self.device)

    def wait(self) -> float:
        """The time when the GPU has done all its work."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()


Reply = Callable[[Loaded, Any, Any, int], list[int]]
"""Of (model, ids [1, n], pixels, count): that many greedy ids."""


def load_transformers(checkpoint: Path, dtype: str, image_size: int, device: str = "cuda") -> Loaded:
    """`FastVlmForConditionalGeneration` on the GPU; no id ends a reply. Raises RuntimeError where this PyTorch has no CUDA."""
    import torch

    from examples.checkpoints.in_transformers import import_timm

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this PyTorch has no CUDA; install one that has, see pytorch.org")
    import_timm()
    from transformers import FastVlmForConditionalGeneration

    model = FastVlmForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval().to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.do_sample = False
    return Loaded(torch, model, device, image_size)


def begin_transformers(task: Task, dtype: str, device: str) -> tuple[Loaded, Part, DeviceMemory | None]:
    """Load for a speed step."""
    memory = None
    if device == "cuda":
        import torch

        if torch.cuda.is_available():
            torch.cuda.init()
            memory = DeviceMemory(lambda: int(torch.cuda.mem_get_info()[0]))
    from fastvlm_edge.model_dir.manifest import read_manifest

    began = time.perf_counter()
    size = read_manifest(model_directory(task, "model", task.precisions[0])).vision.image_size
    loaded = load_transformers(task.checkpoint, dtype, size, device)
    return loaded, {"load_ms": digits((loaded.wait() - began) * 1e3)}, memory


def template_ids(task: Task, loaded: Loaded, positions: int) -> Any:
    """The ids that our own backends are asked with."""
    from fastvlm_edge.inputs.prompt import ChatTemplate
    from fastvlm_edge.inputs.tokenizer import TextTokenizer
    from fastvlm_edge.model_dir.manifest import read_manifest

    directory = model_directory(task, "model", task.precisions[0])
    manifest = read_manifest(directory)
    template = ChatTemplate(TextTokenizer(directory / "tokenizer.json"), manifest)

    def whole(prompt: str) -> list[int]:
        return template.opening() + template.turn(prompt, (manifest.vision.tokens,))

    return loaded.ids(whole(question(lambda prompt: len(whole(prompt)), positions)), manifest.decoder.vocab)


def preprocessor(task: Task, loaded: Loaded) -> Callable[[], Any]:
    """transformers' own preprocessing behind Apple's padding, up to pixels on the GPU."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(task.checkpoint, do_normalize=False)
    photo = photograph()

    def preprocess() -> Any:
        source = Image.fromarray(photo)
        square = Image.new("RGB", (max(source.size),) * 2)
        square.paste(source, ((square.width - source.width) // 2, (square.height - source.height) // 2))
        return processor(square, return_tensors="pt")["pixel_values"].to(loaded.device, loaded.model.dtype)

    return preprocess


def ask_demo_in_transformers(task: Task, dtype: str, reply: Reply, device: str = "cuda") -> list[list[int]]:
    """Ids of the greedy replies to the demo questions, by `generate` or by the loop that is compiled in the speed step."""
    from fastvlm_edge.inputs.preprocess import preprocess
    from fastvlm_edge.inputs.prompt import ChatTemplate
    from fastvlm_edge.inputs.tokenizer import TextTokenizer
    from fastvlm_edge.model_dir.manifest import read_manifest

    directory = model_directory(task, "demo", "fp32")
    manifest = read_manifest(directory)
    template = ChatTemplate(TextTokenizer(directory / "tokenizer.json"), manifest)
    vision = manifest.vision
    loaded = load_transformers(DEMO, dtype, vision.image_size, device)
    replies = []
    with loaded.torch.inference_mode():
        for prompt, image in demo_questions():
            ids = loaded.ids(template.opening() + template.turn(prompt, (vision.tokens,)), manifest.decoder.vocab)
            pixels = loaded.torch.from_numpy(preprocess(image, vision.image_size, vision.geometry)).to(device, loaded.model.dtype)
            tokens = reply(loaded, ids, pixels, 16)
            end = next((index for index, token in enumerate(tokens) if token in manifest.text.stop_ids), len(tokens))
            replies.append(tokens[:end])
    return replies
