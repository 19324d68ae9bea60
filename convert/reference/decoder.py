"""Qwen2 in PyTorch and FP32, the reference for every decoder graph. Only one layer is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm_edge.convert.checkpoint.checkpoint import TextConfig
from fastvlm_edge.convert.precision import Magnitudes

ROWS = 8192
"""How many rows of the head are multiplied at a time."""


class Weights(Protocol):
    """What the reference reads weights from: a `Checkpoint` or a `QuantizedDecoder`."""

    text: TextConfig

    @property
    def head_name(self) -> str: ...
    def tensor(self, name: str) -> npt.NDArray[Any]: ...
    def tensor_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]: ...


@dataclass(frozen=True)
class Passage:
    """The input of one causal pass, and the positions whose logits are wanted. The id `vocab + k` is row k of `features` [rows, hidden]."""

    ids: Sequence[int]
    features: npt.NDArray[np.float32]
    positions: Sequence[int]


@torch.inference_mode()
def reference_logits(
    checkpoint: Weights,
    input_ids: Sequence[int],
    image_features: npt.NDArray[np.float32],
    logit_positions: Sequence[int],
    advance: Callable[[], None],
) -> tuple[npt.NDArray[np.float32], Magnitudes]:
    """Logits [len(logit_positions), vocab] of one pass, and its magnitudes; `advance` is called once for each layer."""
    seen = Magnitudes()
    (hidden,) = _run(checkpoint, [Passage(input_ids, image_features, logit_positions)], advance, seen)
    return torch.cat([hidden @ rows.T for _, rows in _head(checkpoint)], dim=1).numpy(), seen


@torch.inference_mode()
def reference_choices(checkpoint: Weights, passages: Sequence[Passage], advance: Callable[[], None]) -> list[npt.NDArray[np.int64]]:
    """For each passage, the id of the largest logit at each wanted position. The weights are read once for all passages."""
    hidden = _run(checkpoint, passages, advance, Magnitudes())
    joined = torch.cat(hidden)
    best, chosen = torch.full((len(joined),), -torch.inf), torch.zeros(len(joined), dtype=torch.int64)
    for start, rows in _head(checkpoint):
        values, ids = (joined @ rows.T).max(1)
        better = values > best
        best = torch.where(better, values, best)
        chosen = torch.where(better, ids + start, chosen)
    return [part.numpy() for part in torch.split(chosen, [len(part) for part in hidden])]


def _run(checkpoint: Weights, passages: Sequence[Passage], advance: Callable[[], None], seen: Magnitudes) -> list[Tensor]:
    """Hidden states [positions, hidden] of each passage after the final norm.

    Written from the Qwen2 report (arXiv 2407.10671): pre-norm RMSNorm, rotary embedding on halves, grouped-query attention with biases on
    q, k and v, SwiGLU.
    """
    text = checkpoint.text
    states = [_embed(checkpoint, passage)[None] for passage in passages]
    cos, sin = _rotary(text, max(len(passage.ids) for passage in passages))
    for layer in range(text.layers):
        weight = _Layer(checkpoint, layer)
        states = [_layer(weight, text, state, cos[: state.shape[1]], sin[: state.shape[1]], seen) for state in states]
        advance()
    norm = _torch(checkpoint.tensor("llm.norm.weight"))
    return [_rms_norm(state[0, list(p.positions)], norm, text.rms_norm_eps) for state, p in zip(states, passages, strict=True)]


def _embed(checkpoint: Weights, passage: Passage) -> Tensor:
    """The embeddings [seq, hidden] of a passage, with the image features in their places."""
    vocab = checkpoint.text.vocab
    rows = [
        passage.features[token - vocab] if token >= vocab else checkpoint.tensor_rows("llm.embed_tokens.weight", token, token + 1)[0]
        for token in passage.ids
    ]
    return torch.stack([_torch(np.asarray(row)) for row in rows])


def _head(checkpoint: Weights) -> Iterator[tuple[int, Tensor]]:
    """The head in parts [ROWS, hidden], each with the id of its first row."""
    for row in range(0, checkpoint.text.vocab, ROWS):
        yield row, _torch(checkpoint.tensor_rows(checkpoint.head_name, row, min(row + ROWS, checkpoint.text.vocab)))


class _Layer:
    """The weights of one layer; each is read at its first use."""

    def __init__(self, checkpoint: Weights, layer: int) -> None:
        self.checkpoint = checkpoint
        self.prefix = f"llm.layers.{layer}"
        self._read: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self._read:
            self._read[name] = _torch(self.checkpoint.tensor(f"{self.prefix}.{name}"))
        return self._read[name]


def _layer(weight: _Layer, text: TextConfig, hidden: Tensor, cos: Tensor, sin: Tensor, seen: Magnitudes) -> Tensor:
    """hidden [1, seq, hidden] -> hidden [1, seq, hidden] after one layer; its magnitudes are added to `seen`."""
    x = _rms_norm(hidden, weight("input_layernorm.weight"), text.rms_norm_eps)
    q, k, v = (
        F.linear(x, weight(f"self_attn.{part}_proj.weight"), weight(f"self_attn.{part}_proj.bias"))
        .view(*x.shape[:2], -1, text.head_dim)
        .transpose(1, 2)
        for part in "qkv"
    )  # [1, heads or kv_heads, seq, head_dim]
    seen.qkv.append(_largest(q, k, v))
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    keys = k.repeat_interleave(text.heads // text.kv_heads, 1)
    seen.scores.append(max(_largest(head @ key.T) for head, key in zip(q[0] * text.head_dim**-0.5, keys[0], strict=True)))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    added = F.linear(attended.transpose(1, 2).flatten(2), weight("self_attn.o_proj.weight"))
    between = hidden + added
    x = _rms_norm(between, weight("post_attention_layernorm.weight"), text.rms_norm_eps)
    gate, up = (F.linear(x, weight(f"mlp.{part}_proj.weight")) for part in ("gate", "up"))
    product = F.silu(gate) * up
    after = F.linear(product, weight("mlp.down_proj.weight"))
    seen.attention.append(_largest(added))
    seen.gate.append(_largest(gate))
    seen.product.append(_largest(up, product))
    seen.mlp.append(_largest(after))
    seen.residual.append(_largest(between, between + after))
    return between + after


def _largest(*tensors: Tensor) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotary(text: TextConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each [length, head_dim]."""
    frequency = text.rope_theta ** (-torch.arange(0, text.head_dim, 2, dtype=torch.float64) / text.head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency).repeat(1, 2)
    return angle.cos().float(), angle.sin().float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _torch(array: npt.NDArray[Any]) -> Tensor:
    """A float32 tensor of any stored float type."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(array.astype(np.float32))
