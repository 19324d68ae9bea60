"""Calibrated weight-only quantisation of the decoder with GPTQ, matrix by matrix, on the way from checkpoint to decoder weights.

Conversations run through the layers in order. The second moments of a matrix's inputs are taken with all earlier matrices quantised; its
integers are written to a folder. Memory holds one matrix, its moments, and the hidden states of the conversations.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm_edge.calib.gptq import Factor, factorize, round_in_order
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint
from fastvlm_edge.convert.precision import FLOAT_TYPES, PrecisionPlan, WeightType
from fastvlm_edge.convert.weights.decoder import ROWS, layer_matrices
from fastvlm_edge.convert.weights.round_to_nearest import (
    LARGEST,
    SMALLEST,
    Quantized,
    dequantize,
    quantize_channels,
    quantize_matrix,
    stored_type,
)
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.progress import Progress, SilentProgress

Float32 = npt.NDArray[np.float32]
Conversation = tuple[Sequence[int], Float32]
"""Ids of one causal pass and its image features [rows, hidden]; the id `vocab + k` is row k of the features."""

RATIOS = tuple(1 - 0.03 * step for step in range(11))
"""Scales to try, relative to the smallest one that clips nothing."""
COLUMNS = 2048
"""Outputs that are quantised at once; they do not depend on each other."""
STEP = 128
"""Inputs whose errors reach the inputs after them as one matrix product."""
SAMPLE = 16
"""Every SAMPLE-th output is measured for `DecoderQuantization.errors`."""

_TORCH = {np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float16, np.dtype(ml_dtypes.bfloat16): torch.bfloat16}


@dataclass
class DecoderQuantization:
    """The quantised matrices of a decoder, in .npy files of a temporary folder; `write_decoder_weights` takes it as `quantized`.

    Names are those of the decoder weights: `llm.layers.N.{qkv,o_proj,gate_up,down}` and `llm.head`. `close`, or leaving the context,
    removes the folder.
    """

    scale_type: np.dtype[Any]
    """The float type in which the scales are exact."""
    errors: dict[str, float] = field(default_factory=dict)
    """Matrix -> relative error: norm of the change of its outputs on the calibration data over their norm, from a sample of outputs."""
    rounded: dict[str, float] = field(default_factory=dict)
    """Matrix -> relative error of rounding to nearest."""
    directory: Path | None = None
    """Where the folder is created; it becomes as large as the INT8 decoder. None: in the system's temporary folder."""
    _folder: tempfile.TemporaryDirectory[str] = field(init=False, repr=False)
    _bits: dict[str, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=".calibration-", dir=self.directory)

    def __enter__(self) -> DecoderQuantization:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()

    def names(self) -> tuple[str, ...]:
        """Names of the matrices, in the order of quantisation."""
        return tuple(self._bits)

    def matrix(self, name: str) -> Quantized:
        """Integers [inputs, outputs] and scales of a matrix, as `quantize_matrix` returns them. Raises KeyError for an unknown name."""
        kind = ml_dtypes.int4 if self._bits[name] == 4 else np.int8
        values = np.load(self._path(name, "values"))
        return Quantized(values.astype(kind, copy=False), np.load(self._path(name, "scales")))

    def open(self, name: str, inputs: int, outputs: int, bits: int) -> npt.NDArray[np.int8]:
        """A writable file for the integers of a new matrix, [inputs, outputs]; `finish` adds its scales."""
        self._bits[name] = bits
        return np.lib.format.open_memmap(self._path(name, "values"), mode="w+", dtype=np.int8, shape=(inputs, outputs))

    def finish(self, name: str, scales: Float32, error: float, rounded: float) -> None:
        """Store the scales of a matrix whose integers are written, and its relative errors."""
        np.save(self._path(name, "scales"), scales)
        self.errors[name], self.rounded[name] = error, rounded

    def _path(self, name: str, what: str) -> Path:
        return Path(self._folder.name) / f"{name}.{what}.npy"


@torch.inference_mode()
def calibrate_decoder(
    checkpoint: Checkpoint,
    conversations: Iterable[Conversation],
    plan: PrecisionPlan,
    *,
    progress: Progress | None = None,
    directory: Path | None = None,
) -> DecoderQuantization:
    """Quantise every matrix that the plan stores as integers, so that the outputs on the conversations change least.

    `plan` is the plan of the weights file, after `fit`: scales are exact in its decoder's type. `conversations` is read once; 512 questions
    of a few dozen ids, or 64 of a few hundred, are enough. `progress` advances four times per layer and once for the head.
    Raises FastVLMError if there are no conversations, or an activation is not finite.
    """
    text = checkpoint.text
    progress = progress or SilentProgress()
    progress.stage("calibrate decoder", 4 * text.layers + 1)
    result = DecoderQuantization(np.dtype(FLOAT_TYPES[plan.decoder]), directory=directory)
    try:
        _Calibration(checkpoint, plan, result, progress.advance).run(conversations)
    except BaseException:
        result.close()
        raise
    return result


class _Calibration:
    """Runs the decoder on all conversations at once, layer by layer. `hidden` has a tensor [seq, hidden] per conversation."""

    def __init__(self, checkpoint: Checkpoint, plan: PrecisionPlan, result: DecoderQuantization, advance: Callable[[], None]) -> None:
        self.checkpoint, self.plan, self.result, self.advance = checkpoint, plan, result, advance
        self.text = checkpoint.text
        self.hidden: list[Tensor] = []

    def run(self, conversations: Iterable[Conversation]) -> None:
        known: dict[int, Float32] = {}
        self.hidden = [self._embed(ids, features, known) for ids, features in conversations]
        if not sum(len(hidden) for hidden in self.hidden):
            raise FastVLMError("the calibration data has no conversations", "give pictures and questions with --calib")
        cos, sin = _rotary(self.text.rope_theta, self.text.head_dim, max(len(hidden) for hidden in self.hidden))
        for layer in range(self.text.layers):
            self._attention(f"llm.layers.{layer}", cos, sin)
            self._mlp(f"llm.layers.{layer}", self.plan.up_shift(layer))
        self._head()

    def _embed(self, ids: Sequence[int], features: Float32, known: dict[int, Float32]) -> Tensor:
        """[seq, hidden], with the rows of the embedding as the plan stores them; `known` keeps the rows that were read."""
        rows = np.empty((len(ids), self.text.hidden), np.float32)
        for position, token in enumerate(ids):
            if token >= self.text.vocab:
                rows[position] = features[token - self.text.vocab]
                continue
            if token not in known:
                row = self.checkpoint.tensor_rows("llm.embed_tokens.weight", token, token + 1).astype(np.float32)
                known[token] = dequantize(quantize_channels(row, 0, 8, self.result.scale_type), 0) if self.plan.embedding.bits else row
            rows[position] = known[token]
        return torch.from_numpy(rows)

    def _attention(self, name: str, cos: Tensor, sin: Tensor) -> None:
        text = self.text
        norm = self._norm(f"{name}.input_layernorm.weight")
        matrices = layer_matrices(name, text)
        parts = matrices[f"{name}.qkv"]
        weight = self._quantize(f"{name}.qkv", parts, (norm(hidden) for hidden in self.hidden))
        bias = torch.cat([self._tensor(f"{part}.bias") * scale for part, scale in parts])

        def attend(hidden: Tensor) -> Tensor:
            qkv = (norm(hidden) @ weight + bias).view(len(hidden), -1, text.head_dim).transpose(0, 1)  # [heads, seq, head_dim]
            qk, v = qkv.tensor_split([text.heads + text.kv_heads])
            first, second = qk.chunk(2, dim=-1)
            qk = qk * cos[: len(hidden)] + torch.cat((-second, first), dim=-1) * sin[: len(hidden)]
            q, k = qk.tensor_split([text.heads])
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=1.0, enable_gqa=True)
            return out[0].transpose(0, 1).flatten(1)

        attended = [attend(hidden) for hidden in self.hidden]
        out = self._quantize(f"{name}.o_proj", matrices[f"{name}.o_proj"], iter(attended))
        for hidden, added in zip(self.hidden, attended, strict=True):
            hidden += added @ out

    def _mlp(self, name: str, up_shift: int) -> None:
        norm = self._norm(f"{name}.post_attention_layernorm.weight")
        matrices = layer_matrices(name, self.text, up_shift)
        weight = self._quantize(f"{name}.gate_up", matrices[f"{name}.gate_up"], (norm(hidden) for hidden in self.hidden))

        def product(hidden: Tensor) -> Tensor:
            gate, up = (norm(hidden) @ weight).chunk(2, dim=-1)
            return F.silu(gate) * up

        down = self._quantize(f"{name}.down", matrices[f"{name}.down"], map(product, self.hidden))
        for hidden in self.hidden:
            hidden += product(hidden) @ down * 2.0**up_shift

    def _head(self) -> None:
        text, kind = self.text, self.plan.head
        if kind.bits:
            norm = self._norm("llm.norm.weight")
            solver = Solver.prepare("llm.head", (norm(hidden) for hidden in self.hidden), kind, self.result.scale_type)
            name = self.checkpoint.head_name
            rows = (
                _torch(self.checkpoint.tensor_rows(name, start, min(start + ROWS, text.vocab))).T for start in range(0, text.vocab, ROWS)
            )
            self._store("llm.head", solver, rows, text.vocab)
        self.advance()

    def _quantize(self, name: str, parts: Sequence[tuple[str, float]], inputs: Iterator[Tensor]) -> Tensor:
        """Quantise matrices that have the same inputs. Returns them side by side, [inputs, outputs], dequantised."""
        outputs = sum(self.checkpoint.shape(f"{part}.weight")[0] for part, _ in parts)
        matrices = (self._tensor(f"{part}.weight").T * scale for part, scale in parts)
        if not self.plan.body.bits:
            weight = torch.cat(list(matrices), dim=1)
        else:
            solver = Solver.prepare(name, inputs, self.plan.body, self.result.scale_type)
            weight = torch.empty(len(solver.factor.order), outputs)
            self._store(name, solver, matrices, outputs, weight)
        self.advance()
        return weight

    def _store(self, name: str, solver: Solver, matrices: Iterable[Tensor], outputs: int, weight: Tensor | None = None) -> None:
        """Quantise `matrices`, `outputs` columns together, into the folder, and dequantised into `weight`."""
        values = self.result.open(name, len(solver.factor.order), outputs, solver.kind.bits)
        scales, squares, start = [], np.zeros(3), 0
        for matrix in matrices:
            for columns in torch.split(matrix, COLUMNS, dim=1):
                part = solver.quantize(columns)
                values[:, start : start + columns.shape[1]] = part.values.numpy()
                if weight is not None:
                    weight[:, start : start + columns.shape[1]] = part.weight()
                scales.append(part.scales)
                squares += (part.lost, part.rounded, part.whole)
                start += columns.shape[1]
        error, rounded = np.sqrt(squares[:2] / max(squares[2], np.finfo(np.float64).tiny))
        self.result.finish(name, torch.cat(scales, dim=-1).numpy(), float(error), float(rounded))

    def _norm(self, name: str) -> Callable[[Tensor], Tensor]:
        weight, eps = self._tensor(name), self.text.rms_norm_eps
        return lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def _tensor(self, name: str) -> Tensor:
        return _torch(self.checkpoint.tensor(name))


# One matrix ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Some quantised outputs of a matrix."""

    values: Tensor
    """int8 [inputs, outputs]"""
    scales: Tensor
    """[outputs], or [inputs / block, outputs]"""
    lost: float
    """Sum of the squared changes of a sample of the outputs, for the damped moments."""
    rounded: float
    """The same sum for rounding to nearest."""
    whole: float
    """Sum of the squares of these outputs themselves."""

    def weight(self) -> Tensor:
        """Dequantised weights [inputs, outputs]."""
        scales = self.scales.view(-1, 1, self.values.shape[1])
        return (self.values.view(len(scales), -1, self.values.shape[1]) * scales).view(self.values.shape)


@dataclass(frozen=True)
class Solver:
    """Quantises the matrices behind some inputs with GPTQ."""

    kind: WeightType
    scale_type: np.dtype[Any]
    factor: Factor
    ratios: Sequence[float] = RATIOS

    @classmethod
    def prepare(cls, name: str, inputs: Iterable[Tensor], kind: WeightType, scale_type: np.dtype[Any]) -> Solver:
        """Learn the moments of inputs [rows, inputs]. Raises FastVLMError if they are not finite."""
        try:
            factor = factorize(_moments(inputs))
        except ValueError:
            what = f"the inputs of {name} are not finite on the calibration conversations"
            raise FastVLMError(what, "leave out --calib") from None
        return cls(stored_type(kind, len(factor.order)), scale_type, factor)

    def quantize(self, weight: Tensor) -> Columns:
        """Quantise [inputs, outputs]."""
        inputs, outputs = weight.shape
        block, order = self.kind.block or inputs, self.factor.order
        scales = self._scales(weight.reshape(-1, block, outputs))
        ordered = weight[order]
        smallest, largest = SMALLEST[self.kind.bits], LARGEST[self.kind.bits]
        found = round_in_order(self.factor, ordered, scales[order // block], smallest, largest, block=STEP, sample=SAMPLE)
        natural = torch.empty(inputs, outputs, dtype=torch.int8)
        natural[order] = found.values.to(torch.int8)
        sample = ordered[:, ::SAMPLE]
        nearest = quantize_matrix(weight[:, ::SAMPLE].contiguous().numpy(), self.kind, self.scale_type)
        rounded = self._square(sample - torch.from_numpy(dequantize(nearest))[order])
        return Columns(natural, scales if self.kind.block else scales[0], found.lost, rounded, self._square(sample))

    def _square(self, weight: Tensor) -> float:
        """Sum of the squared outputs of [inputs, outputs], inputs in the order of quantisation."""
        return float((self.factor.unit @ weight).mul_(self.factor.diagonal[:, None]).square_().sum())

    def _scales(self, blocks: Tensor) -> Tensor:
        """Scales [blocks, outputs] for weights [blocks, block, outputs]: the ones of RATIOS with the least error.

        An input counts by the square of its R_ii: the cost of its error after later inputs have made up for what they can.
        """
        cost = torch.empty(len(self.factor.order))
        cost[self.factor.order] = self.factor.diagonal.square()
        cost = cost.view(len(blocks), -1, 1)
        smallest, largest = SMALLEST[self.kind.bits], LARGEST[self.kind.bits]
        full = torch.maximum(blocks.amax(1) / largest, blocks.amin(1) / smallest)
        chosen, least = full, torch.full_like(full, torch.inf)
        for ratio in self.ratios:
            scale = (full * ratio).to(_TORCH[self.scale_type]).float()
            scale = torch.where(scale > 0, scale, 1.0)
            rounded = (blocks / scale[:, None]).round_().clamp_(smallest, largest).mul_(scale[:, None])
            loss = (rounded.sub_(blocks).square_().mul_(cost)).sum(1)
            better = loss < least
            chosen, least = torch.where(better, scale, chosen), torch.where(better, loss, least)
        return chosen


def _moments(inputs: Iterable[Tensor]) -> Tensor:
    """Mean of x x^T over all rows x of tensors [rows, inputs]."""
    total, rows = None, 0
    for x in inputs:
        total = x.T @ x if total is None else total.addmm_(x.T, x)
        rows += len(x)
    assert total is not None
    return total.div_(rows)


def _rotary(theta: float, head_dim: int, length: int) -> tuple[Tensor, Tensor]:
    """Rotary cos and sin, each [length, head_dim]."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency).repeat(1, 2)
    return angle.cos().float(), angle.sin().float()


def _torch(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))
