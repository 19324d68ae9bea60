"""The decoder graph: Qwen2 as standard ONNX operators, stateless, one graph for every backend (docs/graphs.md).

One call has `seq` new positions and a read-only cache. Scores for the cache and for the new keys are two matrix products that are joined
before the softmax, so the cache is never copied inside the graph; the runtime writes `kv_new` into it afterwards.
A second graph for onnxruntime's CPU provider uses the provider's own attention, which appends to the cache in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastvlm_edge.convert.checkpoint.checkpoint import TextConfig
from fastvlm_edge.convert.graphs.builder import ORT_DOMAIN, GraphBuilder, element_type
from fastvlm_edge.convert.precision import FLOAT_TYPES, PrecisionPlan

CANDIDATES = 64
"""Length of top_values and top_ids, from which greedy, top-k and top-p sampling choose without reading all logits."""
MASKED = -30000.0
"""Added to the scores of masked keys: finite in FP16, and its exponential is zero in every type."""


@dataclass(frozen=True)
class _Shared:
    """Values that every layer uses."""

    cos: str  # [batch, 1, seq, head_dim]
    sin: str  # the same with its first half negated, which saves the Neg of rotate_half
    mask: str  # [batch, 1, group * seq, capacity + seq]
    capacity: str  # [1]
    end: str  # [1], past the last key


@dataclass(frozen=True)
class _SharedOnCpu:
    """Values that every layer uses in the graph for the CPU."""

    cos: str  # [context, head_dim / 2]
    sin: str  # the same
    last: str  # [batch] int32, the last position of each row
    total: str  # int32, positions of the longest row


def build_decoder(graph: GraphBuilder, text: TextConfig, plan: PrecisionPlan, *, cpu_context: int | None = None) -> None:
    """Add the whole decoder to `graph`, whose weights file holds what `write_decoder_weights` wrote.

    Floats that are stored in another type than `plan.decoder` are cast to it, so that a second graph can share the file. `cpu_context`, the
    longest conversation in positions, makes the graph for onnxruntime's CPU provider: it appends keys and values to the cache in place. Its
    outputs `present.N.key` and `.value` must be bound to the memory of `past_key_values`.
    """
    _Decoder(graph, text, plan, cpu_context).build()


class _Decoder:
    """Builds the graph from inputs to outputs."""

    def __init__(self, graph: GraphBuilder, text: TextConfig, plan: PrecisionPlan, cpu_context: int | None) -> None:
        self.cpu_context = cpu_context
        self.graph = graph
        self.text = text
        self.dtype = np.dtype(FLOAT_TYPES[plan.decoder])
        self.group = text.heads // text.kv_heads

    def build(self) -> None:
        graph, text = self.graph, self.text
        ids = graph.input("input_ids", np.int64, ["batch", "seq"])
        positions = graph.input("position_ids", np.int64, ["batch", "seq"])
        features = graph.input("image_features", self.dtype, ["rows", text.hidden])
        cache: list[int | str] = ["batch", text.kv_heads, "capacity", text.head_dim]
        past = [[graph.input(f"past_key_values.{i}.{part}", self.dtype, cache) for part in ("key", "value")] for i in range(text.layers)]
        logit_positions = graph.input("logit_positions", np.int64, ["batch", "m"])

        shared = self._shared(positions, past[0][0]) if self.cpu_context is None else self._shared_on_cpu(positions, self.cpu_context)
        hidden = self._embed(ids, features)
        wanted = graph.node("Unsqueeze", [logit_positions, graph.ints(-1)], "/wanted")
        new: list[str] = []
        for layer, (past_key, past_value) in enumerate(past):
            path = f"/layers.{layer}"
            weights = f"llm.layers.{layer}"
            normed = self._rms_norm(hidden, f"{weights}.input_norm", f"{path}/input_norm")
            if isinstance(shared, _Shared):
                attended, key, value = self._attention(normed, past_key, past_value, shared, weights, f"{path}/attn")
            else:
                attended, key, value = self._attention_on_cpu(normed, past_key, past_value, shared, weights, f"{path}/attn")
            if layer == text.layers - 1:  # from here on, only positions with wanted logits are needed
                attended = graph.node("GatherND", [attended, wanted], f"{path}/attn/wanted", batch_dims=1)  # [batch, m, heads * head_dim]
                hidden = graph.node("GatherND", [hidden, wanted], f"{path}/wanted", batch_dims=1)  # [batch, m, hidden]
            attended = graph.node("MatMul", [attended, self._weight(f"{weights}.o_proj", f"{path}/attn/o_proj")], f"{path}/attn/o_proj")
            hidden = graph.node("Add", [hidden, attended], f"{path}/attn/residual")
            normed = self._rms_norm(hidden, f"{weights}.post_norm", f"{path}/post_norm")
            hidden = graph.node("Add", [hidden, self._mlp(normed, weights, f"{path}/mlp")], f"{path}/mlp/residual")
            new += [key, value]
        self._logits(hidden, logit_positions)
        if self.cpu_context is None:
            self._kv_new(new)
        else:
            for index, value in enumerate(new):
                name = f"present.{index // 2}.{('key', 'value')[index % 2]}"
                graph.output(name, value, self.dtype, cache)

    # Inputs ---------------------------------------------------------------------------------------------------------------------

    def _shared(self, positions: str, past_key: str) -> _Shared:
        graph = self.graph
        capacity = graph.node("Shape", [past_key], "/shared/capacity", start=2, end=3)
        seq = graph.node("Shape", [positions], "/shared/seq", start=1, end=2)
        cos, sin = self._rotary(positions)
        return _Shared(cos, sin, self._mask(positions, capacity), capacity, graph.node("Add", [capacity, seq], "/shared/end"))

    def _shared_on_cpu(self, positions: str, context: int) -> _SharedOnCpu:
        graph = self.graph
        every = graph.constant(np.arange(context)[:, None], np.float32)  # onnxruntime computes all that depends on it at load
        cos, sin = self._angles(every)
        last = graph.node("Slice", [positions, graph.ints(-1), graph.ints(np.iinfo(np.int64).max), graph.ints(1)], "/shared/last")
        last = graph.node("Cast", [graph.node("Squeeze", [last, graph.ints(1)], "/shared/last")], "/shared/last", to=element_type(np.int32))
        total = graph.node("ReduceMax", [last], "/shared/total", keepdims=0)
        total = graph.node("Add", [total, graph.constant(1, np.int32)], "/shared/total")
        return _SharedOnCpu(self._cast(cos, "/rotary/cos"), self._cast(sin, "/rotary/sin"), last, total)

    def _angles(self, position: str) -> tuple[str, str]:
        """cos and sin of position * theta^(-2i/head_dim) (RoFormer, arXiv 2104.09864), in FP32 whatever the plan; position [..., 1]."""
        graph, half = self.graph, self.text.head_dim // 2
        frequencies = self.text.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
        angle = graph.node("Mul", [position, graph.constant(frequencies, np.float32)], "/rotary/angle")
        return graph.node("Cos", [angle], "/rotary"), graph.node("Sin", [angle], "/rotary")

    def _rotary(self, positions: str) -> tuple[str, str]:
        graph = self.graph
        position = graph.node("Cast", [positions], "/rotary/position", to=element_type(np.float32))
        cos, sin = self._angles(graph.node("Unsqueeze", [position, graph.ints(1, 3)], "/rotary/position"))  # [batch, 1, seq, head_dim / 2]
        cos = graph.node("Concat", [cos, cos], "/rotary/cos", axis=-1)
        sin = graph.node("Concat", [graph.node("Neg", [sin], "/rotary/sin"), sin], "/rotary/sin", axis=-1)
        return self._cast(cos, "/rotary/cos"), self._cast(sin, "/rotary/sin")

    def _mask(self, positions: str, capacity: str) -> str:
        """[batch, 1, group * seq, capacity + seq]: 0 where a query may see a key, MASKED elsewhere.

        The first position of a row is also the number of valid positions in its cache.
        """
        graph = self.graph
        scalar = graph.node("Squeeze", [capacity], "/mask/capacity")
        slots = graph.node("Range", [graph.constant(0, np.int64), scalar, graph.constant(1, np.int64)], "/mask/slots")
        first = graph.node("Slice", [positions, graph.ints(0), graph.ints(1), graph.ints(1)], "/mask/first")  # [batch, 1]
        valid = graph.node("Less", [slots, first], "/mask/past")
        valid = graph.node("Unsqueeze", [valid, graph.ints(1)], "/mask/past")  # [batch, 1, capacity]
        query = graph.node("Unsqueeze", [positions, graph.ints(2)], "/mask/query")
        key = graph.node("Unsqueeze", [positions, graph.ints(1)], "/mask/key")
        causal = graph.node("LessOrEqual", [key, query], "/mask/new")  # [batch, seq, seq]
        visible, masked = graph.constant(0, self.dtype), graph.constant(MASKED, self.dtype)
        past = graph.node("Where", [valid, visible, masked], "/mask/past")
        new = graph.node("Where", [causal, visible, masked], "/mask/new")
        rows = graph.node("Concat", [graph.node("Shape", [query], "/mask/rows", end=2), capacity], "/mask/rows", axis=0)
        past = graph.node("Expand", [past, rows], "/mask/past")  # [batch, seq, capacity]
        mask = graph.node("Unsqueeze", [graph.node("Concat", [past, new], "/mask", axis=-1), graph.ints(1)], "/mask")
        # The queries of one KV head are the rows of one matrix, query head after query head, so the mask repeats for each of them.
        mask = graph.node("Expand", [mask, graph.ints(1, self.group, 1, 1)], "/mask")
        shape = graph.node("Shape", [mask], "/mask/width", start=3)
        shape = graph.node("Concat", [graph.ints(0, 1, -1), shape], "/mask/shape", axis=0)
        return graph.node("Reshape", [mask, shape], "/mask")

    def _embed(self, ids: str, features: str) -> str:
        """Rows of the embedding for ids below `vocab`, rows of image_features for ids from `vocab` on."""
        graph = self.graph
        vocab, zero = graph.constant(self.text.vocab, np.int64), graph.constant(0, np.int64)
        is_image = graph.node("GreaterOrEqual", [ids, vocab], "/embed/is_image")
        text_ids = graph.node("Where", [is_image, zero, ids], "/embed/text_ids")
        image_rows = graph.node("Where", [is_image, graph.node("Sub", [ids, vocab], "/embed/row"), zero], "/embed/image_rows")
        text = self._text_embedding(text_ids)
        image = graph.node("Gather", [features, image_rows], "/embed/image", axis=0)
        condition = graph.node("Unsqueeze", [is_image, graph.ints(2)], "/embed/is_image")
        return graph.node("Where", [condition, image, text], "/embed")  # [batch, seq, hidden]

    def _text_embedding(self, text_ids: str) -> str:
        """[batch, seq, hidden] from a table of floats, or of int8 with one scale for each row.

        TensorRT allows int8 constants only as inputs of DequantizeLinear. onnxruntime's CPU provider would then dequantise the whole table
        at every step (0.5 s measured for 50,000 rows), so the graph for the CPU gathers the rows first.
        """
        graph, name = self.graph, "llm.embedding"
        if graph.is_quantized(name) and self.cpu_context is None:
            table = graph.dequantized(name, "/embed/table", self.dtype, axis=0)
            return graph.node("Gather", [table, text_ids], "/embed/text", axis=0)
        text = graph.node("Gather", [graph.weight(name), text_ids], "/embed/text", axis=0)
        text = self._cast(text, "/embed/text", stored=graph.dtype(name))
        if graph.is_quantized(name):
            scale = graph.node("Gather", [graph.weight(f"{name}.scale"), text_ids], "/embed/scale", axis=0)
            scale = graph.node("Unsqueeze", [scale, graph.ints(2)], "/embed/scale")
            text = graph.node("Mul", [text, self._cast(scale, "/embed/scale", stored=graph.dtype(f"{name}.scale"))], "/embed/text")
        return text

    # A layer --------------------------------------------------------------------------------------------------------------------

    def _attention(self, x: str, past_key: str, past_value: str, shared: _Shared, weights: str, path: str) -> tuple[str, str, str]:
        """Attention of every head [batch, seq, heads * head_dim], and the new key and value [batch, kv_heads, seq, head_dim]."""
        graph, text = self.graph, self.text
        heads, kv_heads, dim = text.heads, text.kv_heads, text.head_dim
        qkv = self._qkv(x, weights, path)
        qkv = graph.node("Reshape", [qkv, graph.ints(0, 0, heads + 2 * kv_heads, dim)], f"{path}/qkv")
        qkv = graph.node("Transpose", [qkv], f"{path}/qkv", perm=[0, 2, 1, 3])
        qk, value = graph.split("Split", [qkv, graph.ints(heads + kv_heads, kv_heads)], f"{path}/qkv", 2, axis=1)
        first, second = graph.split("Split", [qk, graph.ints(dim // 2, dim // 2)], f"{path}/rotary", 2, axis=-1)
        swapped = graph.node("Concat", [second, first], f"{path}/rotary", axis=-1)
        straight = graph.node("Mul", [qk, shared.cos], f"{path}/rotary/cos")
        turned = graph.node("Mul", [swapped, shared.sin], f"{path}/rotary/sin")
        qk = graph.node("Add", [straight, turned], f"{path}/rotary")
        query, key = graph.split("Split", [qk, graph.ints(heads, kv_heads)], f"{path}/qk", 2, axis=1)
        query = graph.node("Reshape", [query, graph.ints(0, kv_heads, -1, dim)], f"{path}/query")  # [batch, kv_heads, group * seq, dim]

        past_scores = graph.node("MatMul", [query, self._transposed(past_key, f"{path}/past_key")], f"{path}/past_scores")
        new_scores = graph.node("MatMul", [query, self._transposed(key, f"{path}/new_key")], f"{path}/new_scores")
        scores = graph.node("Concat", [past_scores, new_scores], f"{path}/scores", axis=-1)
        scores = graph.node("Add", [scores, shared.mask], f"{path}/scores")
        weight = graph.node("Softmax", [scores], f"{path}/scores", axis=-1)
        past_weight = graph.node("Slice", [weight, graph.ints(0), shared.capacity, graph.ints(3)], f"{path}/past_weight")
        new_weight = graph.node("Slice", [weight, shared.capacity, shared.end, graph.ints(3)], f"{path}/new_weight")
        past_sum = graph.node("MatMul", [past_weight, past_value], f"{path}/past_sum")
        new_sum = graph.node("MatMul", [new_weight, value], f"{path}/new_sum")
        out = graph.node("Add", [past_sum, new_sum], f"{path}/sum")
        out = graph.node("Reshape", [out, graph.ints(0, heads, -1, dim)], f"{path}/heads")
        out = graph.node("Transpose", [out], f"{path}/heads", perm=[0, 2, 1, 3])
        return graph.node("Reshape", [out, graph.ints(0, 0, heads * dim)], f"{path}/joined"), key, value

    # GroupQueryAttention of onnxruntime: rotation, append to the cache, scores, softmax and sum in one kernel, over valid positions only
    def _attention_on_cpu(
        self, x: str, past_key: str, past_value: str, shared: _SharedOnCpu, weights: str, path: str
    ) -> tuple[str, str, str]:
        """Attention of every head [batch, seq, heads * head_dim], and key and value of the cache with the new positions appended."""
        graph, text = self.graph, self.text
        out, key, value = graph.split(
            "GroupQueryAttention",
            [self._qkv(x, weights, path), "", "", past_key, past_value, shared.last, shared.total, shared.cos, shared.sin],
            path,
            3,
            domain=ORT_DOMAIN,
            num_heads=text.heads,
            kv_num_heads=text.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=1.0,  # folded into the weights of the queries
        )
        return out, key, value

    def _qkv(self, x: str, weights: str, path: str) -> str:
        """[batch, seq, (heads + 2 * kv_heads) * head_dim]: queries, keys and values as one product."""
        qkv = self.graph.node("MatMul", [x, self._weight(f"{weights}.qkv", f"{path}/qkv")], f"{path}/qkv")
        return self.graph.node("Add", [qkv, self._weight(f"{weights}.qkv.bias", f"{path}/qkv/bias")], f"{path}/qkv")

    def _mlp(self, x: str, weights: str, path: str) -> str:
        """down(silu(gate(x)) * up(x)), gate and up as one product."""
        graph, width = self.graph, self.text.intermediate
        gate_up = graph.node("MatMul", [x, self._weight(f"{weights}.gate_up", f"{path}/gate_up")], f"{path}/gate_up")
        gate, up = graph.split("Split", [gate_up, graph.ints(width, width)], f"{path}/gate_up", 2, axis=-1)
        gate = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], f"{path}/silu")], f"{path}/silu")
        product = graph.node("Mul", [gate, up], f"{path}/product")
        return graph.node("MatMul", [product, self._weight(f"{weights}.down", f"{path}/down")], f"{path}/down")

    def _rms_norm(self, x: str, name: str, path: str) -> str:
        """x / sqrt(mean(x^2) + eps) * weight, always in FP32: in FP16 the squares of activations above 256 would overflow."""
        graph = self.graph
        wide = graph.node("Cast", [x], f"{path}/wide", to=element_type(np.float32)) if self.dtype != np.float32 else x
        square = graph.node("Pow", [wide, graph.constant(2, np.float32)], path)
        mean = graph.node("ReduceMean", [square, graph.ints(-1)], path, keepdims=1)
        mean = graph.node("Add", [mean, graph.constant(self.text.rms_norm_eps, np.float32)], path)
        normed = graph.node("Div", [wide, graph.node("Sqrt", [mean], path)], path)
        return graph.node("Mul", [self._cast(normed, path), self._weight(name, f"{path}/weight")], path)

    # Outputs --------------------------------------------------------------------------------------------------------------------

    def _logits(self, hidden: str, logit_positions: str) -> None:
        """Add the outputs `logits`, `top_values` and `top_ids` for `hidden` [batch, m, hidden]."""
        graph, text = self.graph, self.text
        hidden = self._rms_norm(hidden, "llm.norm", "/head/norm")
        if graph.is_quantized("llm.head"):
            logits = graph.node("MatMul", [hidden, self._weight("llm.head", "/head")], "/head")
        else:
            table = self._weight("llm.embedding" if text.tied else "llm.head", "/head")  # [vocab, hidden]
            flat = graph.node("Reshape", [hidden, graph.ints(-1, text.hidden)], "/head/flat")
            flat = graph.node("Gemm", [flat, table], "/head", transB=1)
            shape = graph.node("Concat", [graph.node("Shape", [logit_positions], "/head"), graph.ints(text.vocab)], "/head/shape", axis=0)
            logits = graph.node("Reshape", [flat, shape], "/head/logits")
        if self.dtype != np.float32:
            logits = graph.node("Cast", [logits], "/head/logits", to=element_type(np.float32))
        count = min(CANDIDATES, text.vocab)
        values, ids = graph.split("TopK", [logits, graph.ints(count)], "/head", 2, axis=-1, largest=1, sorted=1)
        graph.output("logits", logits, np.float32, ["batch", "m", text.vocab])
        graph.output("top_values", values, np.float32, ["batch", "m", count])
        graph.output("top_ids", ids, np.int64, ["batch", "m", count])

    def _kv_new(self, new: list[str]) -> None:
        """Add the output `kv_new` from the key and value of every layer, each [batch, kv_heads, seq, head_dim]."""
        graph, text = self.graph, self.text
        kv = graph.node("Concat", new, "/kv_new", axis=0)  # [layers * 2 * batch, kv_heads, seq, head_dim]
        tail = graph.node("Shape", [kv], "/kv_new", start=1)
        shape = graph.node("Concat", [graph.ints(text.layers, 2, -1), tail], "/kv_new/shape", axis=0)
        kv = graph.node("Reshape", [kv, shape], "/kv_new")
        graph.output("kv_new", kv, self.dtype, [text.layers, 2, "batch", text.kv_heads, "seq", text.head_dim])

    # Values ---------------------------------------------------------------------------------------------------------------------

    def _weight(self, name: str, path: str) -> str:
        """A weight as a float value of the computing type."""
        if self.graph.is_quantized(name):
            return self.graph.dequantized(name, path, self.dtype)
        return self._cast(self.graph.weight(name), f"{path}/weight", stored=self.graph.dtype(name))

    def _cast(self, value: str, path: str, stored: object = np.float32) -> str:
        """Cast `value` from the type `stored` to the computing type, if they differ."""
        if np.dtype(stored) == self.dtype:  # type: ignore[call-overload]
            return value
        return self.graph.node("Cast", [value], path, to=element_type(self.dtype))

    def _transposed(self, value: str, path: str) -> str:
        return self.graph.node("Transpose", [value], path, perm=[0, 1, 3, 2])
