"""Train the demo checkpoint on a CPU: pictures are drawn on the fly, and training resumes after a kill at any moment.

    python -m examples.demo_training.train --work DIR --pictures 320000
    python -m examples.demo_training.train --work DIR --export examples/demo/fastvlm-demo

With `--from` it starts from an exported checkpoint, for example to teach it further image sizes. The convolutions then stay merged and no
BatchNorm measures the pictures, so the model is the same in training and afterwards at every size.

Auxiliary losses are added to the language-model loss on the answers (`model.DemoVision`). The dense head learns characters and shapes an
order of magnitude sooner than the answers alone would teach them, the summary head brings them into the visual tokens, and the place
head puts each object into the token of its square, where the LLM's attention finds it.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.demo_training.checkpoint import config_dict, export_checkpoint, load_checkpoint, save_state
from examples.demo_training.data import WARM_UP_PICTURES, Batch, draw_batches, resize_scene
from examples.demo_training.drawing.picture import Scene
from examples.demo_training.evaluate import answer_scenes, score
from examples.demo_training.language import Prompter, build_tokenizer
from examples.demo_training.model import DemoConfig, DemoModel, fold
from examples.demo_training.scenes import make_scene
from examples.demo_training.training_kernels import load_kernels
from fastvlm_edge.model_dir.manifest import STRIDE

CHECK_SEED = 1
"""Held-out seed of the checks during training; `benchmarks/demo_accuracy.py` reports on another one."""
CHECK_COUNT = 400
LOG_EVERY = 50
STATE_SECONDS = 180.0
LONGEST_WAIT = timedelta(days=1)
"""For the other processes: all of them may have been stopped for hours."""
PROCESS_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""Environment of the training processes. The allocator keeps freed memory: page faults on fresh memory cost a tenth of a step."""
BACKGROUND_WEIGHT = 0.1
"""Weight of background cells in the losses of the dense head: nine cells in ten are background."""


@dataclass(frozen=True)
class Recipe:
    """How to train. The schedule counts pictures, so it can be stretched later."""

    pictures: int
    image_sizes: tuple[int, ...] = (DemoConfig.image_size,)
    batch: int = 32
    peak_rate: float = 2e-3
    last_rate: float = 2e-5
    rise: int = 6_000
    warm_up: int = WARM_UP_PICTURES
    heads: bool = True
    """Whether the auxiliary heads learn and teach the encoder."""
    weight_decay: float = 0.05
    clip: float = 1.0
    average: float = 0.999
    seed: int = 0
    check_every: int = 24_000


FURTHER_RATE = 4e-4


def train_further(recipe: Recipe) -> Recipe:
    """The recipe for a start from a checkpoint, which has no auxiliary heads any more and knows full distortions."""
    return replace(recipe, peak_rate=FURTHER_RATE, rise=2_000, warm_up=0, heads=False)


@dataclass
class Trainer:
    """The state of the training. `averaged` has the moving average of the weights, which is checked and exported."""

    model: DemoModel
    averaged: DemoModel
    optimizer: torch.optim.Optimizer
    tokenizer: Tokenizer
    folded: bool
    seen: int = 0
    steps: int = 0

    def state(self) -> dict[str, Any]:
        """What `save_state` writes and `load_trainer` restores."""
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tokenizer": self.tokenizer.to_str(),
            "config": config_dict(self.model.config),
            "folded": self.folded,
            "seen": self.seen,
            "steps": self.steps,
        }


def build_trainer(model: DemoModel, tokenizer: Tokenizer, recipe: Recipe, *, folded: bool) -> Trainer:
    """A trainer at the beginning. `folded`: the convolutions are merged, and the few BatchNorms that remain keep their statistics."""
    model.train(not folded).vision.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.98), fused=True)
    return Trainer(model, averaged, optimizer, tokenizer, folded)


def load_trainer(path: Path, recipe: Recipe) -> Trainer:
    """The trainer of a state that `save_state` wrote."""
    state = torch.load(path, weights_only=True)
    model = DemoModel(DemoConfig(**state["config"]))
    if state["folded"]:
        fold(model.vision.vision_tower)
    trainer = build_trainer(model, Tokenizer.from_str(state["tokenizer"]), recipe, folded=state["folded"])
    trainer.model.load_state_dict(state["model"])
    trainer.averaged.load_state_dict(state["averaged"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.seen, trainer.steps = state["seen"], state["steps"]
    return trainer


def learning_rate(recipe: Recipe, seen: int) -> float:
    """Linear rise, then half a cosine down to `last_rate` at `pictures`."""
    if seen < recipe.rise:
        return recipe.peak_rate * (seen + recipe.batch) / (recipe.rise + recipe.batch)
    share = min(1.0, (seen - recipe.rise) / max(1, recipe.pictures - recipe.rise))
    return recipe.last_rate + (recipe.peak_rate - recipe.last_rate) * 0.5 * (1 + math.cos(math.pi * share))


def losses(model: DemoModel, batch: Batch, *, heads: bool = True) -> dict[str, Tensor]:
    """The terms of the loss: weighted mean cross entropies, whose sum is the loss. Without `heads` only that of the answers."""
    pixels = batch.pixels.to(torch.float32).div_(255).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        seen = model.vision(pixels)
        logits = torch.cat([model.logits(packed, seen.features[pictures]) for pictures, packed in batch.packed])
    labels = torch.cat([packed.labels[packed.labels >= 0] for _, packed in batch.packed])
    answer = F.cross_entropy(logits.float(), labels)
    if not heads:
        return {"answer": answer}
    glyph_weight, tint_weight = _foreground_weight(seen.glyphs.shape[1]), _foreground_weight(seen.tints.shape[1])
    read = batch.counts[:, 0] < 0
    return {
        "answer": answer,
        "glyph": F.cross_entropy(seen.glyphs.float(), batch.glyphs, weight=glyph_weight),
        "tint": 0.5 * F.cross_entropy(seen.tints.float(), batch.tints, weight=tint_weight),
        "slot": F.cross_entropy(seen.slots[read].float().flatten(0, 1), batch.slots[read].flatten()),
        "relation": F.cross_entropy(seen.relations.float().flatten(0, 1), batch.relations.flatten(), ignore_index=-1),
        "place": F.cross_entropy(seen.place_shapes.float(), batch.place_shapes, ignore_index=-1)
        + F.cross_entropy(seen.place_tints.float(), batch.place_tints, ignore_index=-1),
        "count": 0.5 * F.cross_entropy(seen.counts[~read].float().flatten(0, 1), batch.counts[~read].flatten()),
    }


def _foreground_weight(classes: int) -> Tensor:
    weight = torch.ones(classes)
    weight[0] = BACKGROUND_WEIGHT
    return weight


def average_gradients(model: nn.Module) -> None:
    """Mean of the gradients over all processes, as one transfer."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def step(trainer: Trainer, recipe: Recipe, batch: Batch) -> dict[str, float]:
    """One update. Returns the terms of the loss."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate(recipe, trainer.seen)
    # A term is NaN if the batch has nothing of its kind.
    terms = {name: term for name, term in losses(trainer.model, batch, heads=recipe.heads).items() if term.isfinite()}
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    average_gradients(trainer.model)
    nn.utils.clip_grad_norm_(trainer.model.parameters(), recipe.clip)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.seen += recipe.batch
    trainer.steps += 1
    follow = 1 - min(recipe.average, (1 + trainer.steps) / (10 + trainer.steps))
    with torch.no_grad():
        for target, source in zip(trainer.averaged.state_dict().values(), trainer.model.state_dict().values(), strict=True):
            if target.is_floating_point():
                target.lerp_(source, follow)
    return {name: float(term.detach()) for name, term in terms.items()}


def check(trainer: Trainer, scenes: list[Scene], size: int) -> str:
    """Exact match of the averaged weights on a few held-out scenes seen at `size`, as one line."""
    prompter = Prompter(trainer.tokenizer, (size // STRIDE) ** 2)
    scenes, pairs = [resize_scene(scene, size) for scene in scenes], []
    for start in range(0, len(scenes), 100):
        part = scenes[start : start + 100]
        pairs += list(zip(part, answer_scenes(trainer.averaged, prompter, part), strict=True))
    return "  ".join(f"{kind} {100 * row['exact_match']:.0f}" for kind, row in score(pairs).items())


def train(trainer: Trainer, recipe: Recipe, work: Path, *, rank: int, ranks: int) -> None:
    """Train up to `recipe.pictures`; the process of rank 0 writes `state.pt` and `log.txt` into `work`."""
    config = trainer.model.config
    batches = draw_batches(
        trainer.tokenizer,
        seed=recipe.seed,
        start=trainer.seen,
        batch=recipe.batch,
        rank=rank,
        ranks=ranks,
        image_sizes=recipe.image_sizes,
        warm_up=recipe.warm_up,
    )
    if rank:
        while trainer.seen < recipe.pictures:
            step(trainer, recipe, next(batches))
        return
    held_out = [make_scene("heldout", CHECK_SEED, index, size=config.image_size) for index in range(CHECK_COUNT)]
    with open(work / "log.txt", "a", encoding="utf-8", buffering=1) as log:

        def say(text: str) -> None:
            line = f"{time.strftime('%H:%M:%S')} {trainer.seen:>8} {text}"
            print(line, file=log)
            print(line, file=sys.stderr, flush=True)

        say(f"start: {recipe}, {config}, {ranks} processes")
        begun, begun_at, saved = time.monotonic(), trainer.seen, time.monotonic()
        sums: dict[str, float] = {}
        logged = trainer.steps
        while trainer.seen < recipe.pictures:
            for name, value in step(trainer, recipe, next(batches)).items():
                sums[name] = sums.get(name, 0.0) + value
            if trainer.steps % LOG_EVERY == 0:
                means = "  ".join(f"{name} {total / (trainer.steps - logged):.3f}" for name, total in sums.items())
                logged = trainer.steps
                speed = (trainer.seen - begun_at) / (time.monotonic() - begun)
                say(f"{means}  rate {learning_rate(recipe, trainer.seen):.2e}  {speed:.1f} pictures/s")
                sums.clear()
                begun, begun_at = time.monotonic(), trainer.seen
            if trainer.seen % recipe.check_every < recipe.batch:
                for size in recipe.image_sizes:
                    say(f"check at {size} px: {check(trainer, held_out, size)}")
            if time.monotonic() - saved > STATE_SECONDS:
                save_state(work / "state.pt", trainer.state())
                saved = time.monotonic()
        save_state(work / "state.pt", trainer.state())
        for size in recipe.image_sizes:
            say(f"done at {size} px: {check(trainer, held_out, size)}")


def run_rank(rank: int, ranks: int, recipe: Recipe, work: Path, start: Path | None, meeting: str) -> None:
    """One training process on one core: it draws its own share of the pictures, and only the gradients are exchanged.

    Two processes of one thread do a quarter more than one process of two threads, and lose less when other programs want the cores.
    """
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=LONGEST_WAIT)
    train(open_trainer(work, recipe, start), recipe, work, rank=rank, ranks=ranks)
    if ranks > 1:
        dist.destroy_process_group()


def open_trainer(work: Path, recipe: Recipe, start: Path | None = None) -> Trainer:
    """The saved training in `work`, or a new one: from the checkpoint in `start`, or with seeded random weights."""
    state = work / "state.pt"
    if state.exists():
        return load_trainer(state, recipe)
    torch.manual_seed(recipe.seed)
    if start:
        return build_trainer(*load_checkpoint(start), recipe, folded=True)
    config = DemoConfig()
    return build_trainer(DemoModel(config), build_tokenizer(config.vocab), recipe, folded=False)


def parse_sizes(text: str) -> tuple[int, ...]:
    """`128,192,256`: multiples of 64, ascending."""
    sizes = tuple(sorted({int(part) for part in text.split(",")}))
    if any(size < STRIDE or size % STRIDE for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: image sizes are multiples of {STRIDE}")
    return sizes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint, or resume the training in --work.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state and the log")
    parser.add_argument("--pictures", type=int, help="number of pictures to train on; may be raised later")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step; default: %(default)s")
    parser.add_argument("--from", dest="start", type=Path, metavar="CHECKPOINT", help="folder of an exported checkpoint to train further")
    parser.add_argument("--image-sizes", type=parse_sizes, default=Recipe.image_sizes, help="as 128,192,256; default: 192")
    parser.add_argument("--rate", type=float, help=f"highest learning rate; default: {Recipe.peak_rate}, with --from {FURTHER_RATE}")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="training processes; default: one per core (%(default)s)"
    )
    parser.add_argument("--export", type=Path, help="at the end write the checkpoint into this folder")
    args = parser.parse_args(argv)
    state = args.work / "state.pt"
    if args.pictures is None and not args.export:
        parser.error("give --pictures to train, --export to write the checkpoint, or both")
    if args.pictures is None and not state.exists():
        parser.error(f"nothing to export: {state} does not exist")
    if args.processes < 1 or args.batch % args.processes:
        parser.error(f"--batch {args.batch} must be a multiple of --processes {args.processes}")
    recipe = Recipe(args.pictures or 0, image_sizes=args.image_sizes, batch=args.batch, seed=args.seed)
    if args.start:
        recipe = train_further(recipe)
    if args.rate:
        recipe = replace(recipe, peak_rate=args.rate)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.pictures:
        load_kernels()  # compiled once, before the processes start
        os.environ.update(PROCESS_SETTINGS)
        with tempfile.TemporaryDirectory() as folder:
            meeting = f"file://{folder}/meeting"
            spawn(run_rank, (args.processes, recipe, args.work, args.start, meeting), nprocs=args.processes)
    if args.export:
        trainer = open_trainer(args.work, recipe)
        export_checkpoint(trainer.averaged, trainer.tokenizer, args.export)
    return 0


if __name__ == "__main__":
    sys.exit(main())
