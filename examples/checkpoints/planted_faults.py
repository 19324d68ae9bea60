"""Plants the outliers of trained LLMs into a checkpoint that has none, so that its answers in FP32 stay the same, or nearly the same.

    python -m examples.checkpoints.planted_faults CHECKPOINT OUT --fault final_norm --scale 300

Trained LLMs have a few channels with activations far above all others (LLM.int8(), arXiv 2208.07339; SmoothQuant, arXiv 2211.10438), and a
few tokens with activations that are larger still (massive activations, arXiv 2402.17762). The demo checkpoint and random weights have
neither, so whatever they lose in 8 bits says little about released weights. `FAULTS` lists what can be planted.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_edge.convert.checkpoint.structure import TextConfig
from fastvlm_edge.convert.checkpoint.tensor_names import EMBEDDING, HEAD, canonical_names

SCALES = (10.0, 300.0, 10_000.0)
"""Not powers of two: a fault must not be undone exactly by chance."""
SEVERAL = 6
"""Channels of a fault with several of them: LLM.int8() finds outliers in at most seven, the same ones in all layers."""
COPIES = (7, 12)
"""For `widen`, of every channel of the residual stream and of the MLP: 896 and 4,608 of the demo, about the widths of the 0.5B."""
LEVELS = {"no AVX2": "Nehalem", "AVX2": "Haswell"}
"""Instructions -> a processor of qemu that has them and nothing newer, on which answers are compared as well."""


@dataclass
class Tensors:
    """The tensors of a checkpoint, to be changed in place."""

    text: TextConfig
    config: dict[str, Any]
    """config.json"""
    values: dict[str, Tensor]
    """By canonical name (convert/checkpoint/tensor_names.py); those that a fault touches become float32."""
    stored: dict[str, str]
    """Canonical name -> name in the file."""
    period: int
    """Token id of ".", which ends the system prompt."""

    def rows(self, name: str, channels: Sequence[int], factor: float) -> None:
        """Multiply some outputs of a matrix, convolution, norm or bias."""
        tensor = self.values[name].to(torch.float32, copy=True)
        tensor[list(channels)] *= factor
        self.values[name] = tensor

    def columns(self, name: str, channels: Sequence[int], factor: float) -> None:
        """Multiply the weights that read some inputs."""
        tensor = self.values[name].to(torch.float32, copy=True)
        tensor[:, list(channels)] *= factor
        self.values[name] = tensor

    def size(self, name: str, axis: int) -> Tensor:
        """Norm over the other axis of a matrix, or the magnitudes of a vector."""
        tensor = self.values[name].float()
        return tensor.abs() if tensor.ndim == 1 else tensor.norm(dim=1 - axis)

    def layers(self) -> list[str]:
        """The path of every layer of the LLM."""
        return [f"llm.layers.{layer}" for layer in range(self.text.layers)]

    def encoder(self, product: str) -> list[str]:
        """The path of every block of the encoder that has this product."""
        pattern = re.compile(rf"(vision\.stages\.\d+\.blocks\.\d+)\.{re.escape(product)}\.weight")
        return [match[1] for match in map(pattern.fullmatch, self.values) if match]

    def head_rows(self, heads: int, channels: Iterable[int]) -> list[int]:
        """These channels of every head, as rows of a projection."""
        return [head * self.text.head_dim + channel for head in range(heads) for channel in channels]

    def untie(self) -> None:
        """Give the head weights of its own."""
        self.values.setdefault(HEAD, self.values[EMBEDDING].clone())
        self.stored.setdefault(HEAD, HEAD)
        for part in (self.config, self.config.get("text_config", {})):
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False


def spread(width: int, count: int = 1) -> list[int]:
    """`count` channels, evenly spread over `width`."""
    return [width * (2 * index + 1) // (2 * count) for index in range(count)]


def norms(tensors: Tensors, scale: float, count: int = 1) -> None:
    """One channel behind both norms of every layer, the same everywhere; the products behind them divide it.

    The outlier features of OPT and others (arXiv 2208.07339, section 4; arXiv 2211.10438, figure 4). The weights of the norms amplify them
    (arXiv 2209.13325).
    """
    channels = spread(tensors.text.hidden, count)
    for layer in tensors.layers():
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors.rows(f"{layer}.{norm}.weight", channels, scale)
            for reader in readers:
                tensors.columns(f"{layer}.{reader}.weight", channels, 1 / scale)


def several_norm_channels(tensors: Tensors, scale: float) -> None:
    """As `norms`, with six channels."""
    norms(tensors, scale, SEVERAL)


def final_norm(tensors: Tensors, scale: float) -> None:
    """One channel behind the final norm; the head divides it, and has weights of its own, as in the 7B.

    Outlier features go through to the last layer (arXiv 2208.07339, section 4).
    """
    tensors.untie()
    channels = spread(tensors.text.hidden)
    tensors.rows("llm.norm.weight", channels, scale)
    tensors.columns(HEAD, channels, 1 / scale)


def values(tensors: Tensors, scale: float) -> None:
    """One channel of the values of every key-value head; o_proj divides it for all query heads that read it.

    No trained model is known for it. The attention is linear in the values, so nothing in training prevents it.
    """
    text, channels = tensors.text, spread(tensors.text.head_dim)
    for layer in tensors.layers():
        _projection(tensors, f"{layer}.self_attn.v_proj", tensors.head_rows(text.kv_heads, channels), scale)
        tensors.columns(f"{layer}.self_attn.o_proj.weight", tensors.head_rows(text.heads, channels), 1 / scale)


def mlp(tensors: Tensors, scale: float) -> None:
    """One channel of up_proj; down_proj divides it.

    Inputs of down_proj are the largest ones of models with gated MLPs, such as LLaMA and Qwen (arXiv 2405.14428).
    """
    channels = spread(tensors.text.intermediate)
    for layer in tensors.layers():
        tensors.rows(f"{layer}.mlp.up_proj.weight", channels, scale)
        tensors.columns(f"{layer}.mlp.down_proj.weight", channels, 1 / scale)


def queries(tensors: Tensors, scale: float) -> None:
    """One pair of channels that the rotary embedding mixes, of the queries of every head; the keys divide it.

    The counterpart of `keys`, for which no trained model is known.
    """
    keys(tensors, 1 / scale)


def keys(tensors: Tensors, scale: float) -> None:
    """One pair of channels that the rotary embedding mixes, of the keys of every head; the queries divide it.

    Keys of LLaMA-2 and Falcon have a few channels with large magnitudes (KIVI, arXiv 2402.02750, figure 2).
    """
    text = tensors.text
    pair = [text.head_dim // 4, text.head_dim // 4 + text.head_dim // 2]
    for layer in tensors.layers():
        _projection(tensors, f"{layer}.self_attn.k_proj", tensors.head_rows(text.kv_heads, pair), scale)
        _projection(tensors, f"{layer}.self_attn.q_proj", tensors.head_rows(text.heads, pair), 1 / scale)


def encoder_convolutions(tensors: Tensors, scale: float) -> None:
    """One channel of the depthwise convolution and BatchNorm of every block of the encoder; fc1 divides it.

    The ranges of depthwise convolutions differ by orders of magnitude between channels (MobileNetV2: arXiv 1906.04721, figure 2).
    """
    for block in tensors.encoder("mlp.fc1"):
        channels = spread(tensors.values[f"{block}.mlp.fc1.weight"].shape[1])
        for part in ("weight", "bias"):
            tensors.rows(f"{block}.mlp.conv.bn.{part}", channels, scale)
        tensors.columns(f"{block}.mlp.fc1.weight", channels, 1 / scale)


def encoder_norms(tensors: Tensors, scale: float) -> None:
    """One channel behind the norm of every attention of the encoder; qkv divides it.

    Vision transformers have massive activations in a few channels, too (arXiv 2402.17762, section 5).
    """
    for block in tensors.encoder("token_mixer.qkv"):
        channels = spread(tensors.values[f"{block}.token_mixer.qkv.weight"].shape[1])
        for part in ("weight", "bias"):
            tensors.rows(f"{block}.norm.{part}", channels, scale)
        tensors.columns(f"{block}.token_mixer.qkv.weight", channels, 1 / scale)


def encoder_values(tensors: Tensors, scale: float) -> None:
    """One channel of the values of every attention of the encoder; the projection behind it divides it. As `values`."""
    for block in tensors.encoder("token_mixer.proj"):
        width = tensors.values[f"{block}.token_mixer.proj.weight"].shape[1]
        channels = spread(width)
        tensors.rows(f"{block}.token_mixer.qkv.weight", [2 * width + channel for channel in channels], scale)
        tensors.columns(f"{block}.token_mixer.proj.weight", channels, 1 / scale)


def everywhere(tensors: Tensors, scale: float) -> None:
    """All of the above but the queries, which would undo the keys."""
    for fault in (norms, final_norm, values, mlp, keys, encoder_convolutions, encoder_norms, encoder_values):
        fault(tensors, scale)


def massive_residual(tensors: Tensors, scale: float) -> None:
    """Three channels of the residual stream: all that is added to them is multiplied, and all norms divide them.

    The residual stream of trained LLMs has such channels (arXiv 2402.17762, section 2). FP32 changes, because the norms divide by the size
    of the whole stream. The channels are those that the model uses least.
    """
    tensors.untie()
    added = [(EMBEDDING, 1), ("projector.linear_2.weight", 0), ("projector.linear_2.bias", 0)]
    added += [(f"{layer}.{part}.weight", 0) for layer in tensors.layers() for part in ("self_attn.o_proj", "mlp.down_proj")]
    channels = _smallest([tensors.size(name, axis) for name, axis in added], 3)
    for name, axis in added:
        (tensors.columns if axis else tensors.rows)(name, channels, scale)
    read_by = [f"{layer}.{norm}.weight" for layer in tensors.layers() for norm in ("input_layernorm", "post_attention_layernorm")]
    for name in (*read_by, "llm.norm.weight"):
        tensors.rows(name, channels, 1 / scale)


def massive_token(tensors: Tensors, scale: float) -> None:
    """One channel of one token, the period that ends the system prompt: `scale` times as large as a usual channel of an embedding.

    Massive activations stand at the first token and at the first period or line break (arXiv 2402.17762, section 2). FP32 changes, because
    other tokens attend to this one.
    """
    tensors.untie()
    (channel,) = _smallest([_reading(tensors, layer) for layer in tensors.layers()], 1)
    embedding = tensors.values[EMBEDDING].to(torch.float32, copy=True)
    embedding[tensors.period, channel] = scale * float(embedding[tensors.period].square().mean().sqrt())
    tensors.values[EMBEDDING] = embedding


def key_biases(tensors: Tensors, scale: float) -> None:
    """The bias of the keys is `scale` in one channel of every head, the one that the rotary embedding turns most slowly.

    It adds nearly the same to the scores of all keys, which the softmax ignores; so FP32 changes little. Keys of trained LLMs have such
    channels (KIVI, arXiv 2402.02750, figure 2), and in Qwen2 the biases of q, k and v can make them.
    """
    channel = tensors.text.head_dim - 1
    for layer in tensors.layers():
        name = f"{layer}.self_attn.k_proj.bias"
        bias = tensors.values[name].to(torch.float32, copy=True)
        bias[tensors.head_rows(tensors.text.kv_heads, [channel])] += scale
        tensors.values[name] = bias


def norms_undivided(tensors: Tensors, scale: float) -> None:
    """One channel behind both norms of every layer, which the products do not divide: the model needs it as it is.

    FP32 changes; the channel is the one that the products of the layer read least.
    """
    for layer in tensors.layers():
        channels = _smallest([_reading(tensors, layer)], 1)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.rows(f"{layer}.{norm}.weight", channels, scale)


def _projection(tensors: Tensors, name: str, rows: Sequence[int], factor: float) -> None:
    """Multiply outputs of a projection with its bias, if it has one."""
    for part in ("weight", "bias"):
        if f"{name}.{part}" in tensors.values:
            tensors.rows(f"{name}.{part}", rows, factor)


def _reading(tensors: Tensors, layer: str) -> Tensor:
    """How much the products of a layer take from each channel of the residual stream: [hidden]."""
    taken = []
    for norm, part, readers in (("input_layernorm", "self_attn", "qkv"), ("post_attention_layernorm", "mlp", ("gate", "up"))):
        weight = tensors.size(f"{layer}.{norm}.weight", 0)
        taken += [weight * tensors.size(f"{layer}.{part}.{reader}_proj.weight", 1) for reader in readers]
    return torch.stack(taken).norm(dim=0)


def _smallest(sizes: Sequence[Tensor], count: int) -> list[int]:
    """The channels that are smallest in all of `sizes`, each [channels], relative to its mean."""
    total = torch.stack([size / size.mean() for size in sizes]).square().sum(0)
    return total.topk(count, largest=False).indices.tolist()


@dataclass(frozen=True)
class Fault:
    """A fault that can be planted at several scales."""

    plant: Callable[[Tensors, float], None]
    exact: bool = True
    """Whether FP32 computes the same, but for rounding. Otherwise a precision is compared with FP32 of the same checkpoint."""
    scales: tuple[float, ...] = SCALES
    """At these, the demo in FP32 answers nearly as well as before."""

    @property
    def what(self) -> str:
        """The first line of its docstring."""
        return (self.plant.__doc__ or "").partition("\n")[0]


FAULTS = {
    fault.plant.__name__: fault
    for fault in (
        Fault(norms),
        Fault(several_norm_channels),
        Fault(final_norm),
        Fault(values),
        Fault(mlp),
        Fault(queries),
        Fault(keys),
        Fault(encoder_convolutions),
        Fault(encoder_norms),
        Fault(encoder_values),
        Fault(everywhere),
        Fault(massive_residual, exact=False, scales=(3.0,)),
        Fault(massive_token, exact=False),
        Fault(key_biases, exact=False, scales=(10.0, 300.0)),
        Fault(norms_undivided, exact=False, scales=(5.0,)),
    )
}
"""Name -> fault."""


def plant(source: Path, target: Path, fault: str, scale: float) -> Path:
    """Write the checkpoint `source`, of any layout, with a fault into the new directory `target`, and return that."""
    tensors = read_tensors(source)
    FAULTS[fault].plant(tensors, scale)
    return write_tensors(tensors, source, target)


def widen(source: Path, target: Path, hidden: int, intermediate: int) -> Path:
    """Write a checkpoint of the native layout that computes the same with every channel of the LLM in several copies.

    `hidden` and `intermediate` are the numbers of copies. The demo with 7 and 12 of them has about the widths of the 0.5B (896 and 4,608).
    """
    tensors = read_tensors(source)
    text = tensors.config["text_config"]
    text.setdefault("head_dim", tensors.text.head_dim)
    text["hidden_size"], text["intermediate_size"] = hidden * tensors.text.hidden, intermediate * tensors.text.intermediate

    def repeat(name: str, copies: int, axis: int, *, share: bool = False) -> None:
        repeated = tensors.values[name].float().repeat_interleave(copies, dim=axis)
        tensors.values[name] = repeated / copies if share else repeated

    repeat(EMBEDDING, hidden, 1)
    for name in ("projector.linear_1.weight", "projector.linear_1.bias", "projector.linear_2.weight", "projector.linear_2.bias"):
        repeat(name, hidden, 0)
    repeat("projector.linear_2.weight", hidden, 1, share=True)
    for layer in tensors.layers():
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            repeat(f"{layer}.{part}.weight", hidden, 1, share=True)
        for part in ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"):
            repeat(f"{layer}.{part}.weight", hidden, 0)
        for part in ("gate_proj", "up_proj"):
            repeat(f"{layer}.mlp.{part}.weight", intermediate, 0)
        repeat(f"{layer}.mlp.down_proj.weight", intermediate, 1, share=True)
    if tensors.text.tied:
        repeat("llm.norm.weight", hidden, 0, share=True)  # the head is the embedding, which is not divided
    else:
        repeat("llm.norm.weight", hidden, 0)
        repeat(HEAD, hidden, 1, share=True)
    return write_tensors(tensors, source, target)


def read_tensors(source: Path) -> Tensors:
    """All tensors of a checkpoint. Errors as in `open_checkpoint`."""
    checkpoint = open_checkpoint(str(source))
    found: dict[str, Tensor] = {}
    for path in checkpoint.weights:
        found |= load_file(path)
    stored = canonical_names(found, checkpoint.layout, str(source))
    (period,) = Tokenizer.from_file(str(source / "tokenizer.json")).encode(".", add_special_tokens=False).ids
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return Tensors(checkpoint.text, config, {name: found[key] for name, key in stored.items()}, stored, period)


def write_tensors(tensors: Tensors, source: Path, target: Path) -> Path:
    """Write the tensors in one file into the new directory `target`, with the other files of `source`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    (target / "config.json").write_text(json.dumps(tensors.config, indent=2) + "\n", encoding="utf-8")
    named = {tensors.stored[name]: tensor.contiguous() for name, tensor in tensors.values.items()}
    save_file(named, target / "model.safetensors", metadata={"format": "pt"})
    return target


def main() -> None:
    """Plant one fault from the command line."""
    parser = argparse.ArgumentParser(
        description="Plant a fault into a checkpoint.",
        epilog="\n".join(f"{name:22} {fault.what}" for name, fault in FAULTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fault", choices=FAULTS, required=True)
    parser.add_argument("--scale", type=float, default=300.0)
    options = parser.parse_args()
    plant(options.checkpoint, options.out, options.fault, options.scale)


if __name__ == "__main__":
    main()
