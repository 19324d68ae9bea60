"""Qwen2 in PyTorch and FP32, the reference for every decoder graph. Only one layer is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm_edge.convert.checkpoint.checkpoint import TextConfig
from fastvlm_edge.convert.precision import Magnitudes, PrecisionPlan

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


class Watch:
    """Sees the values of a pass, passage after passage; a subclass keeps what it needs."""

    def product(self, name: str, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """A product `name` (as in `layer_matrices`, or `llm.head`): x [positions, inputs], weight [outputs, inputs], and the result.

        Called for each module that the product joins, and for each part of the head.
        """

    def heads(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """Queries [heads, positions, head_dim], divided by sqrt(head_dim), and keys [kv_heads, positions, head_dim], both rotated."""


@dataclass(frozen=True)
class Arithmetic:
    """How a graph for a GPU rounds in a narrow float type: weights and values to `dtype`, sums in FP32 (convert/graphs/decoder.py)."""

    dtype: torch.dtype
    wide_scores: frozenset[int] = frozenset()
    """Layers whose attention scores are not rounded."""
    up_shifts: Mapping[int, int] = field(default_factory=dict)
    """As in a plan."""

    @classmethod
    def of(cls, plan: PrecisionPlan) -> Arithmetic:
        """That of a plan's graph for a GPU."""
        return cls(TORCH_TYPES[plan.decoder], plan.wide_scores, plan.up_shifts)

    def narrow(self, x: Tensor) -> Tensor:
        """x rounded to the type, in FP32."""
        return x.to(self.dtype).float()


EXACT = Arithmetic(torch.float32)
TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@torch.inference_mode()
def reference_logits(
    checkpoint: Weights,
    input_ids: Sequence[int],
    image_features: npt.NDArray[np.float32],
    logit_positions: Sequence[int],
    advance: Callable[[], None],
    watch: Watch | None = None,
    arithmetic: Arithmetic = EXACT,
) -> tuple[npt.NDArray[np.float32], Magnitudes]:
    """Logits [len(logit_positions), vocab] of one pass, and its magnitudes; `advance` is called once for each layer."""
    seen, watch = Magnitudes(), watch or Watch()
    (hidden,) = _run(checkpoint, [Passage(input_ids, image_features, logit_positions)], advance, seen, watch, arithmetic)
    logits = []
    for _, rows in _head(checkpoint):
        logits.append(arithmetic.narrow(hidden @ arithmetic.narrow(rows).T))
        watch.product("llm.head", hidden, rows, logits[-1])
    return torch.cat(logits, dim=1).numpy(), seen


@torch.inference_mode()
def reference_choices(
    checkpoint: Weights, passages: Sequence[Passage], advance: Callable[[], None], arithmetic: Arithmetic = EXACT
) -> list[npt.NDArray[np.int64]]:
    """For each passage, the id of the largest logit at each wanted position. The weights are read once for all passages."""
    hidden = _run(checkpoint, passages, advance, Magnitudes(), Watch(), arithmetic)
    joined = torch.cat(hidden)
    best, chosen = torch.full((len(joined),), -torch.inf), torch.zeros(len(joined), dtype=torch.int64)
    for start, rows in _head(checkpoint):
        values, ids = arithmetic.narrow(joined @ arithmetic.narrow(rows).T).max(1)
        better = values > best
        best = torch.where(better, values, best)
        chosen = torch.where(better, ids + start, chosen)
    return [part.numpy() for part in torch.split(chosen, [len(part) for part in hidden])]


def _run(
    checkpoint: Weights,
    passages: Sequence[Passage],
    advance: Callable[[], None],
    seen: Magnitudes,
    watch: Watch,
    arithmetic: Arithmetic,
) -> list[Tensor]:
    """Hidden states [positions, hidden] of each passage after the final norm.

    Written from the Qwen2 report (arXiv 2407.10671): pre-norm RMSNorm, rotary embedding on halves, grouped-query attention with biases on
    q, k and v, SwiGLU.
    """
    text = checkpoint.text
    states = [arithmetic.narrow(_embed(checkpoint, passage)[None]) for passage in passages]
    cos, sin = _rotary(text, max(len(passage.ids) for passage in passages))
    for layer in range(text.layers):
        weight = _Layer(checkpoint, layer, seen, watch, arithmetic)
        states = [weight.run(state, cos[: state.shape[1]], sin[: state.shape[1]]) for state in states]
        advance()
    norm = arithmetic.narrow(_torch(checkpoint.tensor("llm.norm.weight")))
    return [_rms_norm(state[0, list(p.positions)], norm, text.rms_norm_eps, arithmetic) for state, p in zip(states, passages, strict=True)]


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
    """One layer; each of its weights is read at its first use."""

    def __init__(self, checkpoint: Weights, layer: int, seen: Magnitudes, watch: Watch, arithmetic: Arithmetic) -> None:
        self.checkpoint, self.text, self.layer = checkpoint, checkpoint.text, layer
        self.prefix = f"llm.layers.{layer}"
        self.seen, self.watch, self.arithmetic = seen, watch, arithmetic
        self._read: dict[str, Tensor] = {}

    def _weight(self, name: str, divided_by: float = 1.0) -> Tensor:
        if name not in self._read:
            self._read[name] = self.arithmetic.narrow(_torch(self.checkpoint.tensor(f"{self.prefix}.{name}")) / divided_by)
        return self._read[name]

    def _product(self, product: str, module: str, x: Tensor, *, bias: bool = False, divided_by: float = 1.0) -> Tensor:
        weight = self._weight(f"{module}.weight", divided_by)
        narrow = self.arithmetic.narrow
        out = narrow(F.linear(x, weight))
        self.watch.product(f"{self.prefix}.{product}", x[0], weight, out[0])
        return narrow(out + self._weight(f"{module}.bias")) if bias else out

    def run(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden [1, seq, hidden] -> hidden [1, seq, hidden] after the layer."""
        text, seen, narrow = self.text, self.seen, self.arithmetic.narrow
        x = _rms_norm(hidden, self._weight("input_layernorm.weight"), text.rms_norm_eps, self.arithmetic)
        q, k, v = (
            self._product("qkv", f"self_attn.{part}_proj", x, bias=True).view(*x.shape[:2], -1, text.head_dim).transpose(1, 2)
            for part in "qkv"
        )  # [1, heads or kv_heads, seq, head_dim]
        seen.qkv.append(_largest(q, k, v))
        q, k = narrow(_rotate(q * text.head_dim**-0.5, cos, sin)), narrow(_rotate(k, cos, sin))
        self.watch.heads(self.layer, q[0], k[0])
        attended = self._attend(q, k, v)
        added = self._product("o_proj", "self_attn.o_proj", attended.transpose(1, 2).flatten(2))
        between = hidden + added
        x = _rms_norm(between, self._weight("post_attention_layernorm.weight"), text.rms_norm_eps, self.arithmetic)
        factor = 2.0 ** self.arithmetic.up_shifts.get(self.layer, 0)
        gate, up = self._product("gate_up", "mlp.gate_proj", x), self._product("gate_up", "mlp.up_proj", x, divided_by=factor)
        product = narrow(narrow(F.silu(gate)) * up)
        after = self._product("down", "mlp.down_proj", product) * factor
        seen.attention.append(_largest(added))
        seen.gate.append(_largest(gate))
        seen.product.append(_largest(up, product))
        seen.mlp.append(_largest(after))
        seen.residual.append(_largest(between, between + after))
        return between + after

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sums of values [1, heads, seq, head_dim] of causal attention; queries are scaled already. Scores of one head are in memory."""
        narrow, wide = self.arithmetic.narrow, self.layer in self.arithmetic.wide_scores
        group, seq = self.text.heads // self.text.kv_heads, q.shape[2]
        future = torch.ones(seq, seq, dtype=torch.bool).triu(1)
        out, largest = torch.empty_like(q), 0.0
        for head in range(self.text.heads):
            scores = q[0, head] @ k[0, head // group].T
            largest = max(largest, _largest(scores))
            scores = (scores if wide else narrow(scores)).masked_fill(future, -torch.inf)
            out[0, head] = narrow(narrow(scores.softmax(-1)) @ v[0, head // group])
        self.seen.scores.append(largest)
        return out


def _largest(*tensors: Tensor) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, arithmetic: Arithmetic) -> Tensor:
    narrow = arithmetic.narrow
    return narrow(narrow(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)) * weight)


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
