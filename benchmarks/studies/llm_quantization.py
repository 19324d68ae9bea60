"""Ways of quantising the decoder's weights beside each other: ours, round-to-nearest, AWQ, onnxruntime's and nvidia-modelopt's.

Question: Which way of rounding the decoder's weights to INT4 and INT8 loses least?
Verdict: our GPTQ. INT4 in blocks of 128 on 2,000 held-out questions of the demo: a KL divergence of 31e-6 nats/token against 83e-6 or
more for each library and 105e-6 for rounding to nearest. INT8 loses nothing that these questions show. The product uses GPTQ with
--calib.
Ran: 2026-11-24, at commit e6613e4 (record: benchmarks/results/llm_quantization.json).
Command at that commit: python benchmarks/llm_quantization.py --count 2000 --blocks 128 --libraries PYTHON

Each way makes a decoder graph from the same graph (INT8 embedding and head, FP32 activations) in a process of its own, and the graph
answers held-out questions about demo pictures in onnxruntime. `--libraries` is the interpreter of an environment with onnxruntime, onnx_ir
and nvidia-modelopt[onnx]. `--random` is a checkpoint of examples/checkpoints/random_checkpoint.py, for figures of larger matrices.
A part that is not measured stays as it is in the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo" / "fastvlm-demo"
SEED = 2026
CALIBRATION = 256
"""Conversations of the split `calibration`."""
BLOCKS = (32, 64, 128)
OURS = ("rtn", "clip", "awq", "gptq", "awq+gptq")
LIBRARIES = ("ort default", "ort rtn", "ort k_quant", "ort hqq", "ort gptq", "modelopt rtn", "modelopt awq_clip", "modelopt awq_lite")
DEPLOYED = {"0.5b": (24, 2, 64, 2), "1.5b": (28, 2, 128, 2), "7b": (28, 4, 128, 2)}
"""Layers, KV heads, head_dim and bytes a value of the released sizes, for the memory of the cache."""


@dataclass(frozen=True)
class Question:
    """A question about a picture, with the right answer: ids up to the last but one of the answer."""

    ids: list[int]
    features: np.ndarray
    answer: list[int]
    kind: str

    @property
    def positions(self) -> range:
        """Where the answer's ids are foretold."""
        return range(len(self.ids) - len(self.answer), len(self.ids))


def main() -> int:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="demo questions; 0 leaves the demo's figures as they are")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS), help="of INT4; a choice of them gets a part of its own")
    parser.add_argument("--libraries", type=Path)
    parser.add_argument("--random", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "llm_quantization.json")
    parser.add_argument("--make", nargs=4, metavar=("METHOD", "BITS", "BLOCK", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        method, bits, block, folder = options.make
        print("\n" + json.dumps(make(method, int(bits), int(block), Path(folder))))  # libraries leave the cursor anywhere
        return 0
    from benchmarks.common import machine

    document: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    document |= {"what": __doc__.strip().splitlines()[0], "machine": machine.describe(), "kv_cache_bytes_at_4096": cache_bytes(4096)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.count:
            figures = measure_demo(folder, options.count, options.libraries, options.blocks)
            part = "demo" if tuple(options.blocks) == BLOCKS else f"demo, blocks of {' and '.join(map(str, options.blocks))}"
            document[part] = {"count": options.count, "seed": SEED, "calibration": CALIBRATION, **figures}
            options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if options.random:
            document["random"] = measure_random(folder, options.random)
            options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


# Questions ----------------------------------------------------------------------------------------------------------------------


def demo_questions(split: str, count: int) -> list[Question]:
    """The first question about each picture of a split, with the features of the FP32 encoder."""
    import torch
    from tokenizers import Tokenizer

    from examples.demo_training.language import Prompter
    from examples.demo_training.scenes import make_scene
    from fastvlm_edge.convert.checkpoint.checkpoint import load_projector, load_vision, open_checkpoint
    from fastvlm_edge.convert.fastvithd import image_tokens

    checkpoint = open_checkpoint(str(DEMO))
    encoder, projector = load_vision(checkpoint), load_projector(checkpoint)
    prompter = Prompter(Tokenizer.from_file(str(DEMO / "tokenizer.json")), (checkpoint.image_size // 64) ** 2)
    beginning = [token if token >= 0 else checkpoint.text.vocab - 1 - token for token in prompter.beginning]
    questions = []
    for start in range(0, count, 50):
        scenes = [make_scene(split, SEED, index, size=checkpoint.image_size) for index in range(start, min(start + 50, count))]
        pixels = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            features = projector(image_tokens(encoder(pixels))).numpy()
        for scene, rows in zip(scenes, features, strict=True):
            question = scene.questions[0]
            answer = prompter.answer(question.answer)
            questions.append(Question([*beginning, *prompter.prompt(question.prompt), *answer[:-1]], rows, answer, question.kind))
    return questions


def random_questions(checkpoint: Any, count: int, seed: int) -> list[Question]:
    """Pictures of 64 rows that share 48 directions, before 60 ids of a few hundred. Answers mean nothing."""
    rng, directions = np.random.default_rng(seed), np.random.default_rng(0)
    shared = directions.standard_normal((48, checkpoint.text.hidden)) / np.sqrt(48)
    known = directions.integers(0, checkpoint.text.vocab - 512, 300)
    questions = []
    for _ in range(count):
        ids = [*(checkpoint.text.vocab + row for row in range(64)), *(int(token) for token in rng.choice(known, 60))]
        questions.append(Question(ids, (rng.standard_normal((64, 48)) @ shared).astype(np.float32), ids[-24:], ""))
    return questions


# Making a decoder ---------------------------------------------------------------------------------------------------------------


def plan_of(bits: int, block: int) -> Any:
    """FP32 activations; INT8 embedding and head beside a body of the given type."""
    from fastvlm_edge.convert.precision import INT8_CHANNEL, PLANS, WeightType

    body = WeightType(bits, block)
    return replace(PLANS["fp32"], body=body, head=INT8_CHANNEL, embedding=INT8_CHANNEL) if bits else PLANS["fp32"]


def write_decoder(checkpoint: Any, plan: Any, quantized: Any, folder: Path) -> None:
    """decoder.onnx and decoder.weights."""
    from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
    from fastvlm_edge.convert.graphs.decoder import build_decoder
    from fastvlm_edge.convert.weights.decoder import write_decoder_weights

    folder.mkdir(parents=True, exist_ok=True)
    weights = WeightsFile(folder / "decoder.weights")
    write_decoder_weights(checkpoint, plan, weights, lambda: None, quantized, context=512)
    weights.close()
    graph = GraphBuilder("decoder", weights)
    build_decoder(graph, checkpoint.text, plan, provider="cpu" if plan.embedding.bits else None)  # the libraries want plain ONNX
    graph.save(folder / "decoder.onnx")


def make(method: str, bits: int, block: int, folder: Path) -> dict[str, float]:
    """One method in this process: folder/calibration.npz and checkpoint.txt, or folder/base, -> folder/made. Seconds and peak MiB."""
    began = time.perf_counter()
    if method in OURS:
        make_ours(method, bits, block, folder)
    else:
        make_library(method, block, folder)
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage has the parent's peak too
    return {"seconds": round(seconds, 1), "peak_mib": int(status.partition("VmHWM:")[2].split()[0]) >> 10}


def make_ours(method: str, bits: int, block: int, folder: Path) -> None:
    """With this project's code."""
    from fastvlm_edge.calib.decoder import calibrate_decoder
    from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint

    checkpoint: Any = open_checkpoint((folder / "checkpoint.txt").read_text())
    plan = plan_of(bits, block)
    plan = replace(plan, decoder="fp32")
    talk = conversations(folder)
    if method.startswith("awq"):
        checkpoint = Folded(checkpoint, talk, plan.body)
    quantized: Any = None
    if method == "clip":
        quantized = Clipped(checkpoint, plan)
    elif method.endswith("gptq"):
        quantized = calibrate_decoder(checkpoint, talk, plan)
    write_decoder(checkpoint, plan, quantized, folder / "made")
    if method.endswith("gptq"):
        quantized.close()


def conversations(folder: Path) -> list[tuple[list[int], np.ndarray]]:
    """Of calibration.npz."""
    stored = np.load(folder / "calibration.npz")
    lengths = np.cumsum(stored["lengths"])
    ids = np.split(stored["ids"], lengths[:-1])
    return [([int(token) for token in row], features) for row, features in zip(ids, stored["features"], strict=True)]


def make_library(method: str, block: int, folder: Path) -> None:
    """With a library, from the graph whose body is FP32; runs in the library's own environment."""
    import onnx

    library, _, algorithm = method.partition(" ")
    source, made = folder / "base" / "decoder.onnx", folder / "made"
    made.mkdir(parents=True, exist_ok=True)
    model = onnx.load(str(source))
    if library == "ort":
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        reader = _Reader(folder)
        config = {
            "default": lambda: nbits.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True),
            "rtn": lambda: nbits.RTNWeightOnlyQuantConfig(),
            "k_quant": lambda: nbits.KQuantWeightOnlyQuantConfig(),
            "hqq": lambda: nbits.HQQWeightOnlyQuantConfig(block_size=block),
            "gptq": lambda: nbits.GPTQWeightOnlyQuantConfig(reader, block_size=128),
        }[algorithm]()
        quantizer = nbits.MatMulNBitsQuantizer(model, block_size=block, is_symmetric=True, algo_config=config)
        quantizer.process()
        result = quantizer.model.model if hasattr(quantizer.model, "model") else quantizer.model
    else:
        from modelopt.onnx.quantization.int4 import quantize

        kind = "rtn_dq" if algorithm == "rtn" else algorithm
        result = quantize(
            str(source),
            calibration_method=kind,
            calibration_data_reader=_Reader(folder, equal=True),
            calibration_eps=["cpu"],
            use_external_data_format=False,
            block_size=block,
        )
    onnx.save(result, str(made / "decoder.onnx"))


class _Reader:
    """Calibration feeds as onnxruntime's CalibrationDataReader and as modelopt want them: again and again."""

    def __init__(self, folder: Path, *, equal: bool = False) -> None:
        """`equal`: only conversations of the commonest length, which modelopt needs: it concatenates activations."""
        shape = json.loads((folder / "cache.json").read_text())
        talk = conversations(folder)
        lengths = [len(ids) for ids, _ in talk]
        commonest = max(set(lengths), key=lengths.count)
        self.data = [feeds(ids, features, shape) for ids, features in talk if not equal or len(ids) == commonest]
        self.rewind()

    def rewind(self) -> None:
        self.left: Iterator[dict[str, np.ndarray]] = iter(self.data)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)

    def get_first(self) -> dict[str, np.ndarray]:
        return self.data[0]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __deepcopy__(self, _memo: object) -> _Reader:
        self.rewind()
        return self


def feeds(ids: Sequence[int], features: np.ndarray, shape: Sequence[int], positions: Sequence[int] = (0,)) -> dict[str, np.ndarray]:
    """Inputs of the decoder graph for one pass over an empty cache; `shape` is layers, kv_heads, head_dim."""
    layers, heads, dim = shape
    empty = np.zeros((1, heads, 0, dim), np.float32)
    return {
        "input_ids": np.array([ids]),
        "position_ids": np.arange(len(ids))[None],
        "image_features": features,
        "logit_positions": np.array([positions]),
        **{f"past_key_values.{layer}.{part}": empty for layer in range(layers) for part in ("key", "value")},
    }


# AWQ and clipping, to compare with ------------------------------------------------------------------------------------------------


class Clipped:
    """Every matrix rounded to nearest with the scales of least squared error: what GPTQ is without calibration."""

    def __init__(self, checkpoint: Any, plan: Any) -> None:
        from fastvlm_edge.convert.weights.decoder import layer_matrices

        self.checkpoint, self.plan, self.matrices = checkpoint, plan, layer_matrices
        self.scale_type = np.dtype(np.float32)

    def matrix(self, name: str) -> Any:
        """As `DecoderQuantization.matrix`."""
        from benchmarks.studies.recipes import quantize_gptq

        layer, _, part = name.rpartition(".")
        if part == "head":
            weight, kind = self.checkpoint.tensor(self.checkpoint.head_name).T, self.plan.head
        else:
            parts = {
                "qkv": lambda: self.matrices(layer, self.checkpoint.text)[name],
                "o_proj": lambda: [(f"{layer}.self_attn.o_proj", 1.0)],
                "gate_up": lambda: [(f"{layer}.mlp.gate_proj", 1.0), (f"{layer}.mlp.up_proj", 1.0)],
                "down": lambda: [(f"{layer}.mlp.down_proj", 1.0)],
            }[part]()
            weight = np.concatenate([self.checkpoint.tensor(f"{p}.weight").T * np.float32(scale) for p, scale in parts], axis=1)
            kind = self.plan.body
        weight = np.ascontiguousarray(weight.astype(np.float32))
        return quantize_gptq(weight, np.eye(len(weight), dtype=np.float32), kind)


class Folded:
    """A checkpoint with AWQ's scales (arXiv 2306.00978) folded into norms, v_proj and up_proj: the same model in floats."""

    def __init__(self, checkpoint: Any, talk: Sequence[tuple[list[int], np.ndarray]], kind: Any) -> None:
        self.checkpoint = checkpoint
        self.changed: dict[str, np.ndarray] = {}
        self._search(talk, kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint, name)

    def tensor(self, name: str) -> np.ndarray:
        """As `Checkpoint.tensor`."""
        return self.changed[name] if name in self.changed else self.checkpoint.tensor(name)

    def _search(self, talk: Sequence[tuple[list[int], np.ndarray]], kind: Any) -> None:
        import torch

        text = self.checkpoint.text
        group = text.heads // text.kv_heads

        def tie(x: Any) -> Any:
            """One scale for the heads that share a value."""
            return x.view(text.kv_heads, group, -1).mean(1, keepdim=True).expand(-1, group, -1).reshape(-1)

        def fold(names: Sequence[str], scale: Any, before: Sequence[tuple[str, Any]]) -> None:
            for name in names:
                self.changed[name] = self.tensor(name).astype(np.float32) * scale.numpy()
            for name, divisor in before:
                array = self.tensor(name).astype(np.float32)
                self.changed[name] = array / divisor.numpy().reshape(-1, *[1] * (array.ndim - 1))

        model = Model(self.checkpoint)
        hidden = [model.embed(ids, features) for ids, features in talk]
        with torch.inference_mode():
            for layer in model.layers:
                taps: dict[str, list[Any]] = {}
                hidden = [layer(x, taps) for x in hidden]
                found = {
                    site: _awq_scale(weight, torch.cat(taps[site]), kind, tie if site == "o_proj" else None)
                    for site, weight in layer.matrices.items()
                }
                name, values = layer.name, found["o_proj"].view(text.kv_heads, group, -1)[:, 0].reshape(-1)
                fold([f"{name}.mlp.down_proj.weight"], found["down"], [(f"{name}.mlp.up_proj.weight", found["down"])])
                v = f"{name}.self_attn.v_proj"
                fold([f"{name}.self_attn.o_proj.weight"], found["o_proj"], [(f"{v}.weight", values), (f"{v}.bias", values)])
                qkv = [f"{name}.self_attn.{part}_proj.weight" for part in "qkv"]
                fold(qkv, found["qkv"], [(f"{name}.input_layernorm.weight", found["qkv"])])
                gate_up = [f"{name}.mlp.{part}_proj.weight" for part in ("gate", "up")]
                fold(gate_up, found["gate_up"], [(f"{name}.post_attention_layernorm.weight", found["gate_up"])])


def _awq_scale(weight: Any, x: Any, kind: Any, tie: Callable[[Any], Any] | None) -> Any:
    """mean |x| to the power that changes the outputs least, of 21 powers. weight [inputs, outputs], x [rows, inputs]."""
    import torch

    from fastvlm_edge.convert.weights.round_to_nearest import dequantize, quantize_matrix

    moments, size = x.T @ x, x.abs().mean(0).clamp(min=1e-6)
    size = size if tie is None else tie(size)
    best, least = torch.ones(len(size)), float("inf")
    for power in np.linspace(0, 1, 21):
        scale = size**power
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = torch.from_numpy(dequantize(quantize_matrix((weight * scale[:, None]).numpy(), kind))) / scale[:, None] - weight
        loss = float((error * (moments @ error)).sum())
        if loss < least:
            best, least = scale, loss
    return best


# The model in PyTorch -------------------------------------------------------------------------------------------------------------


class Model:
    """The FP32 decoder whole in memory."""

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint, self.text = checkpoint, checkpoint.text
        self.layers = [Layer(checkpoint, f"llm.layers.{index}") for index in range(self.text.layers)]

    def embed(self, ids: Sequence[int], features: np.ndarray) -> Any:
        import torch

        vocab = self.text.vocab
        rows = [
            features[i - vocab] if i >= vocab else self.checkpoint.tensor_rows("llm.embed_tokens.weight", i, i + 1)[0].astype(np.float32)
            for i in ids
        ]
        return torch.from_numpy(np.stack(rows))

    def logits(self, question: Question, cache: Callable[[Any], Any] | None) -> np.ndarray:
        """At the answer's positions."""
        import torch

        with torch.inference_mode():
            x = self.embed(question.ids, question.features)
            for layer in self.layers:
                x = layer(x, {}, cache)
            x = layer.norm(x[list(question.positions)], "llm.norm.weight")
            head = (
                torch.from_numpy(self.checkpoint.tensor(self.checkpoint.head_name).astype(np.float32)) if not self._head else self._head[0]
            )
            self._head = [head]
            return (x @ head.T).numpy()

    _head: list[Any] = []  # noqa: RUF012


class Layer:
    """One layer; `matrices` are [inputs, outputs], by what they are called among the decoder's weights."""

    def __init__(self, checkpoint: Any, name: str) -> None:
        import torch

        from fastvlm_edge.convert.weights.decoder import layer_matrices

        def read(part: str, scale: float = 1.0) -> Any:
            return torch.from_numpy(checkpoint.tensor(part).astype(np.float32) * np.float32(scale))

        self.checkpoint, self.name, self.text = checkpoint, name, checkpoint.text
        parts = layer_matrices(name, self.text)[f"{name}.qkv"]
        self.matrices = {
            "qkv": torch.cat([read(f"{part}.weight", scale) for part, scale in parts]).T.contiguous(),
            "o_proj": read(f"{name}.self_attn.o_proj.weight").T.contiguous(),
            "gate_up": torch.cat([read(f"{name}.mlp.{part}_proj.weight") for part in ("gate", "up")]).T.contiguous(),
            "down": read(f"{name}.mlp.down_proj.weight").T.contiguous(),
        }
        self.bias = torch.cat([read(f"{part}.bias", scale) for part, scale in parts])

    def norm(self, x: Any, name: str) -> Any:
        import torch

        weight = torch.from_numpy(self.checkpoint.tensor(name).astype(np.float32))
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.text.rms_norm_eps) * weight

    def __call__(self, x: Any, taps: dict[str, list[Any]], cache: Callable[[Any], Any] | None = None) -> Any:
        """x [seq, hidden]; inputs of the matrices are appended to `taps`; keys and values go through `cache`, [kv_heads, seq, head_dim]."""
        import torch
        import torch.nn.functional as F

        from fastvlm_edge.calib.decoder import _rotary

        def times(site: str, value: Any) -> Any:
            taps.setdefault(site, []).append(value)
            return value @ self.matrices[site]

        text = self.text
        qkv = times("qkv", self.norm(x, f"{self.name}.input_layernorm.weight")) + self.bias
        qk, v = qkv.view(len(x), -1, text.head_dim).transpose(0, 1).tensor_split([text.heads + text.kv_heads])
        cos, sin = _rotary(text.rope_theta, text.head_dim, len(x))
        first, second = qk.chunk(2, dim=-1)
        q, k = (qk * cos + torch.cat((-second, first), dim=-1) * sin).tensor_split([text.heads])
        if cache is not None:
            k, v = cache(k), cache(v)
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=1.0, enable_gqa=True)[0]
        x = x + times("o_proj", attended.transpose(0, 1).flatten(1))
        gate, up = times("gate_up", self.norm(x, f"{self.name}.post_attention_layernorm.weight")).chunk(2, dim=-1)
        return x + times("down", F.silu(gate) * up)


def int8_cache(x: Any) -> Any:
    """Keys or values [kv_heads, seq, head_dim] rounded to INT8, one FP16 scale a head and position."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-7).half().float()
    return (x / scale).round() * scale


def cache_bytes(positions: int) -> dict[str, dict[str, int]]:
    """Of the released sizes: FP16, and INT8 with one FP16 scale a head and position."""
    result = {}
    for size, (layers, heads, dim, width) in DEPLOYED.items():
        vectors = layers * 2 * heads * positions
        result[size] = {"fp16": vectors * dim * width, "int8": vectors * (dim + 2)}
    return result


# Measuring ------------------------------------------------------------------------------------------------------------------------


def graph_logits(folder: Path, questions: Sequence[Question], shape: Sequence[int]) -> list[np.ndarray]:
    """Of every question at its answer's positions, by onnxruntime; products take FP32 activations, so that weights alone are judged."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(str(folder / "decoder.onnx"), options, providers=["CPUExecutionProvider"])
    return [
        session.run(["logits"], feeds(question.ids, question.features, shape, list(question.positions)))[0][0] for question in questions
    ]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], questions: Sequence[Question]) -> dict[str, Any]:
    """KL divergence in 1e-3 nat and agreement of the most likely id over the answers' ids; cosine; exact match, where it can be told.

    An answer is exactly right when each of its ids is the most likely one after the right ones before it: what greedy search finds.
    """
    a, b = _log_softmax(np.concatenate(expected)), _log_softmax(np.concatenate(found))
    kl = (np.exp(a) * (a - b)).sum(-1)
    x, y = np.concatenate(expected).ravel().astype(np.float64), np.concatenate(found).ravel().astype(np.float64)
    figures: dict[str, Any] = {
        "kl_1e-3": round(float(kl.mean()) * 1e3, 5),
        "kl_1e-3_p99": round(float(np.quantile(kl, 0.99)) * 1e3, 4),
        "logits_relative": round(float(np.linalg.norm(y - x) / np.linalg.norm(x)), 6),
        "logits_cosine": round(float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)), 7),
        "agreement": round(float((a.argmax(-1) == b.argmax(-1)).mean()), 5),
    }
    if questions[0].kind:
        right: dict[str, list[bool]] = {}
        for question, logits in zip(questions, found, strict=True):
            for key in (question.kind, "all"):
                right.setdefault(key, []).append(logits.argmax(-1).tolist() == question.answer)
        figures["exact_match"] = {key: round(float(np.mean(values)), 4) for key, values in sorted(right.items())}
    return figures


def run_methods(
    folder: Path,
    checkpoint: Any,
    questions: Sequence[Question],
    talk: Sequence[Question],
    cases: Sequence[tuple[str, int, int]],
    python: Path,
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """A row for each case of method, bits and block; and the logits of FP32."""
    text = checkpoint.text
    shape = (text.layers, text.kv_heads, text.head_dim)
    (folder / "checkpoint.txt").write_text(str(checkpoint.directory))
    (folder / "cache.json").write_text(json.dumps(shape))
    np.savez(
        folder / "calibration.npz",
        ids=np.concatenate([question.ids for question in talk]),
        lengths=[len(question.ids) for question in talk],
        features=np.stack([question.features for question in talk]),
    )
    write_decoder(checkpoint, plan_of(0, 0), None, folder / "fp32")
    expected = graph_logits(folder / "fp32", questions, shape)
    rows = [{"method": "fp32", "bytes": _bytes(folder / "fp32"), **compare(expected, expected, questions)}]
    write_decoder(checkpoint, replace(plan_of(8, 0), body=plan_of(0, 0).body), None, folder / "base")
    for method, bits, block in cases:
        row: dict[str, Any] = {"method": method, "bits": bits, "block": block}
        for path in sorted((folder / "made").glob("*")):
            path.unlink()
        program = sys.executable if method in OURS else str(python)
        command = [program, __file__, "--make", method, str(bits), str(block), str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            if result.returncode:
                raise RuntimeError(result.stderr.strip().splitlines()[-1])
            row |= json.loads(result.stdout.strip().splitlines()[-1])
            row |= {"bytes": _bytes(folder / "made"), **compare(graph_logits(folder / "made", questions, shape), expected, questions)}
        except Exception as error:  # a library's failure is a finding
            row["failed"] = str(error)[:300]
        rows.append(row)
        print({key: value for key, value in row.items() if key != "exact_match"}, row.get("exact_match", {}).get("all"), flush=True)
    return rows, expected


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def measure_cache(checkpoint: Any, questions: Sequence[Question], expected: Sequence[np.ndarray]) -> dict[str, Any]:
    """What rounding keys and values to INT8 changes in FP32."""
    model = Model(checkpoint)
    exact = [model.logits(question, None) for question in questions]
    assert np.allclose(np.concatenate(exact), np.concatenate(list(expected)), atol=1e-2)
    return compare([model.logits(question, int8_cache) for question in questions], exact, questions)


def measure_demo(folder: Path, count: int, libraries: Path | None, blocks: Sequence[int]) -> dict[str, Any]:
    """Every method on the demo model."""
    from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(DEMO))
    questions, talk = demo_questions("heldout", count), demo_questions("calibration", CALIBRATION)
    cases = [("rtn", 8, 0), ("gptq", 8, 0), *((method, 4, block) for method in OURS for block in blocks)]
    if libraries:
        cases += [(method, 4, block) for method in LIBRARIES for block in blocks]
    rows, expected = run_methods(folder, checkpoint, questions, talk, cases, libraries or Path(sys.executable))
    return {"rows": rows, "int8_kv_cache": measure_cache(checkpoint, questions, expected)}


def measure_random(folder: Path, location: Path) -> dict[str, Any]:
    """The methods that matter on random weights of a released width."""
    from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(location))
    questions, talk = random_questions(checkpoint, 4, 1), random_questions(checkpoint, 12, 2)
    cases = [("rtn", 8, 0), ("gptq", 8, 0), ("rtn", 4, 64), ("gptq", 4, 64)]
    rows, expected = run_methods(folder, checkpoint, questions, talk, cases, Path(sys.executable))
    shape = {"layers": checkpoint.text.layers, "hidden": checkpoint.text.hidden, "intermediate": checkpoint.text.intermediate}
    return {"checkpoint": shape, "rows": rows, "int8_kv_cache": measure_cache(checkpoint, questions, expected)}


if __name__ == "__main__":
    sys.exit(main())
