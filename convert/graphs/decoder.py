"""The decoder graph: Qwen2 as standard ONNX operators, stateless, one graph for every backend (docs/graphs.md).

One call has `seq` new positions and a read-only cache; the runtime writes `kv_new` into it afterwards. Inside the graph, keys and values
are joined with the cache before one product each. This costs a copy of the cache at every call, but TensorRT then computes the attention
of a layer in one kernel (docs/tensorrt.md).
More graphs, for onnxruntime's CPU and CUDA providers, use their own attention, which appends to the cache in place.

In a plan with a narrow float type (FP16, BF16), a Cast to FP32 before a product and a Cast back after it ask for sums in FP32. Mask,
softmax, rotation and the residual stream are FP32, and the scores of a layer where they are large (docs/precision.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastvlm_edge.backends.ort_session import ACCURACY_LEVEL, INT8_BLOCK
from fastvlm_edge.convert.checkpoint.checkpoint import TextConfig
from fastvlm_edge.convert.graphs.builder import ORT_DOMAIN, GraphBuilder, element_type
from fastvlm_edge.convert.precision import FLOAT_TYPES, PrecisionPlan

CANDIDATES = 64
"""Length of top_values and top_ids, from which greedy, top-k and top-p sampling choose without reading all logits."""
MASKED = -1e9
"""Added to the scores of masked keys: its exponential is zero whatever the score."""
TOP_ROW = 4096
"""TensorRT's kernels search and add up a row with one thread block, so the logits of a position are cut into rows of this length first."""


@dataclass(frozen=True)
class _Shared:
    """Values that every layer uses."""

    cos: str  # [batch, 1, seq, head_dim] float32
    sin: str  # the same with its first half negated, which saves the Neg of rotate_half
    mask: str  # [batch, 1, group * seq, capacity + seq] float32


@dataclass(frozen=True)
class _SharedInOrt:
    """Values that every layer uses in the graphs for a provider of onnxruntime."""

    cos: str  # [context, head_dim / 2]
    sin: str  # the same
    last: str  # [batch] int32, the last position of each row
    total: str  # int32, at least the positions of the longest row


Provider = Literal["cpu", "cuda"]
"""A provider of onnxruntime that has its own graph."""


def has_cuda_graph(plan: PrecisionPlan) -> bool:
    """Whether onnxruntime's CUDA provider has attention for the decoder's float type: FP16 and BF16 in onnxruntime 1.31."""
    return plan.decoder in ("fp16", "bf16")


def build_decoder(graph: GraphBuilder, text: TextConfig, plan: PrecisionPlan, *, provider: Provider | None = None) -> None:
    """Add the whole decoder to `graph`, whose weights file holds what `write_decoder_weights` wrote.

    Floats that are stored in another type than `plan.decoder` are cast to it, so that a second graph can share the file. `provider` makes
    the graph for a provider of onnxruntime: it appends keys and values to the cache in place. Its outputs `present.N.key` and `.value` must
    be bound to the memory of `past_key_values`.
    """
    _Decoder(graph, text, plan, provider).build()


class _Decoder:
    """Builds the graph from inputs to outputs."""

    def __init__(self, graph: GraphBuilder, text: TextConfig, plan: PrecisionPlan, provider: Provider | None) -> None:
        self.provider = provider
        self.graph = graph
        self.text = text
        self.plan = plan
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

        shared = self._shared_in_ort(positions, past[0][0]) if self.provider else self._shared(positions, past[0][0])
        hidden = self._wide(self._embed(ids, features), "/embed")
        wanted = graph.node("Unsqueeze", [logit_positions, graph.ints(-1)], "/wanted")
        new: list[str] = []
        for layer, (past_key, past_value) in enumerate(past):
            path = f"/layers.{layer}"
            weights = f"llm.layers.{layer}"
            normed = self._rms_norm(hidden, f"{weights}.input_norm", f"{path}/input_norm")
            if isinstance(shared, _Shared):
                wide_scores = layer in self.plan.wide_scores
                attended, key, value = self._attention(normed, past_key, past_value, shared, weights, f"{path}/attn", wide_scores)
            else:
                attended, key, value = self._attention_in_ort(normed, past_key, past_value, shared, weights, f"{path}/attn")
            if layer == text.layers - 1:  # from here on, only positions with wanted logits are needed
                attended = graph.node("GatherND", [attended, wanted], f"{path}/attn/wanted", batch_dims=1)  # [batch, m, heads * head_dim]
                hidden = graph.node("GatherND", [hidden, wanted], f"{path}/wanted", batch_dims=1)  # [batch, m, hidden]
            attended = self._product(attended, f"{weights}.o_proj", f"{path}/attn/o_proj")
            hidden = self._add(hidden, attended, f"{path}/attn/residual")
            normed = self._rms_norm(hidden, f"{weights}.post_norm", f"{path}/post_norm")
            mlp = self._mlp(normed, weights, f"{path}/mlp")
            hidden = self._add(hidden, mlp, f"{path}/mlp/residual", factor=2.0 ** self.plan.up_shift(layer))
            new += [key, value]
        self._logits(hidden, logit_positions)
        if self.provider is None:
            self._kv_new(new)
        else:
            for index, value in enumerate(new):
                name = f"present.{index // 2}.{('key', 'value')[index % 2]}"
                graph.output(name, value, self.dtype, cache)

    # Inputs ---------------------------------------------------------------------------------------------------------------------

    def _shared(self, positions: str, past_key: str) -> _Shared:
        graph = self.graph
        cos, sin = (graph.node("Gather", [graph.weight(f"llm.rotary.{name}"), positions], f"/rotary/{name}") for name in ("cos", "sin"))
        cos = graph.node("Concat", [cos, cos], "/rotary/cos", axis=-1)
        sin = graph.node("Concat", [graph.node("Neg", [sin], "/rotary/sin"), sin], "/rotary/sin", axis=-1)
        cos, sin = (graph.node("Unsqueeze", [table, graph.ints(1)], f"/rotary/{name}") for table, name in ((cos, "cos"), (sin, "sin")))
        return _Shared(cos, sin, self._mask(positions, past_key))

    def _shared_in_ort(self, positions: str, past_key: str) -> _SharedInOrt:
        """`total` is read by the host. On a GPU it is the capacity, a shape, so that no step waits for a number from the device."""
        graph = self.graph
        last = graph.node("Slice", [positions, graph.ints(-1), graph.ints(np.iinfo(np.int64).max), graph.ints(1)], "/shared/last")
        last = graph.node("Cast", [graph.node("Squeeze", [last, graph.ints(1)], "/shared/last")], "/shared/last", to=element_type(np.int32))
        if self.provider == "cuda":
            total = graph.node("Shape", [past_key], "/shared/total", start=2, end=3)
            total = graph.node("Cast", [total], "/shared/total", to=element_type(np.int32))
        else:
            total = graph.node("ReduceMax", [last], "/shared/total", keepdims=0)
            total = graph.node("Add", [total, graph.constant(1, np.int32)], "/shared/total")
        cos, sin = (self._cast(graph.weight(f"llm.rotary.{name}"), f"/rotary/{name}") for name in ("cos", "sin"))
        return _SharedInOrt(cos, sin, last, total)

    def _mask(self, positions: str, past_key: str) -> str:
        """[batch, 1, group * seq, capacity + seq] float32: 0 where a query may see a key, MASKED elsewhere.

        The first position of a row is also the number of valid positions in its cache. Among the ids of the call, their order decides, so
        ids that only fill up a fixed length may have any position.
        """
        graph = self.graph

        def numbers(length: str, path: str) -> str:
            scalar = graph.node("Squeeze", [length], path)
            return graph.node("Range", [graph.constant(0, np.int64), scalar, graph.constant(1, np.int64)], path)

        capacity = graph.node("Shape", [past_key], "/mask/capacity", start=2, end=3)
        first = graph.node("Slice", [positions, graph.ints(0), graph.ints(1), graph.ints(1)], "/mask/first")  # [batch, 1]
        valid = graph.node("Less", [numbers(capacity, "/mask/slots"), first], "/mask/past")
        valid = graph.node("Unsqueeze", [valid, graph.ints(1)], "/mask/past")  # [batch, 1, capacity]
        seq = graph.node("Shape", [positions], "/mask/seq", start=1)
        key = numbers(seq, "/mask/key")
        query = graph.node("Unsqueeze", [key, graph.ints(1)], "/mask/query")
        causal = graph.node("LessOrEqual", [key, query], "/mask/new")  # [seq, seq]
        visible, masked = graph.constant(0, np.float32), graph.constant(MASKED, np.float32)
        shape = graph.node("Shape", [positions], "/mask/shape")
        past = graph.node("Where", [valid, visible, masked], "/mask/past")
        past = graph.node("Expand", [past, graph.node("Concat", [shape, capacity], "/mask/past/shape", axis=0)], "/mask/past")
        new = graph.node("Where", [causal, visible, masked], "/mask/new")
        new = graph.node("Expand", [new, graph.node("Concat", [shape, seq], "/mask/new/shape", axis=0)], "/mask/new")
        mask = graph.node("Unsqueeze", [graph.node("Concat", [past, new], "/mask", axis=-1), graph.ints(1)], "/mask")
        # The queries of one KV head are the rows of one matrix, query head after query head, so the mask repeats for each of them.
        mask = graph.node("Expand", [mask, graph.ints(1, self.group, 1, 1)], "/mask")
        width = graph.node("Shape", [mask], "/mask/width", start=3)
        return graph.node("Reshape", [mask, graph.node("Concat", [graph.ints(0, 1, -1), width], "/mask/rows", axis=0)], "/mask")

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

        TensorRT allows int8 constants only as inputs of DequantizeLinear. onnxruntime would then dequantise the whole table at every step
        (0.5 s measured for 50,000 rows on a CPU), so its graphs gather the rows first.
        """
        graph, name = self.graph, "llm.embedding"
        if graph.is_quantized(name) and self.provider is None:
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

    def _attention(
        self, x: str, past_key: str, past_value: str, shared: _Shared, weights: str, path: str, wide_scores: bool
    ) -> tuple[str, str, str]:
        """Attention of every head [batch, seq, heads * head_dim], and the new key and value [batch, kv_heads, seq, head_dim].

        The product of queries and keys passes through the narrow type once, because TensorRT then computes the attention in one kernel.
        With `wide_scores` it stays in FP32, which takes two products and a softmax.
        """
        graph, text = self.graph, self.text
        heads, kv_heads, dim = text.heads, text.kv_heads, text.head_dim
        qkv = self._qkv(x, weights, path)
        qkv = graph.node("Reshape", [qkv, graph.ints(0, 0, heads + 2 * kv_heads, dim)], f"{path}/qkv")
        qkv = graph.node("Transpose", [qkv], f"{path}/qkv", perm=[0, 2, 1, 3])
        qk, value = graph.split("Split", [qkv, graph.ints(heads + kv_heads, kv_heads)], f"{path}/qkv", 2, axis=1)
        qk = self._wide(qk, f"{path}/rotary")
        first, second = graph.split("Split", [qk, graph.ints(dim // 2, dim // 2)], f"{path}/rotary", 2, axis=-1)
        swapped = graph.node("Concat", [second, first], f"{path}/rotary", axis=-1)
        straight = graph.node("Mul", [qk, shared.cos], f"{path}/rotary/cos")
        turned = graph.node("Mul", [swapped, shared.sin], f"{path}/rotary/sin")
        qk = self._narrow(graph.node("Add", [straight, turned], f"{path}/rotary"), f"{path}/rotary")
        query, key = graph.split("Split", [qk, graph.ints(heads, kv_heads)], f"{path}/qk", 2, axis=1)
        query = graph.node("Reshape", [query, graph.ints(0, kv_heads, -1, dim)], f"{path}/query")  # [batch, kv_heads, group * seq, dim]

        keys = graph.node("Concat", [past_key, key], f"{path}/keys", axis=2)
        values = graph.node("Concat", [past_value, value], f"{path}/values", axis=2)
        keys = graph.node("Transpose", [keys], f"{path}/keys", perm=[0, 1, 3, 2])
        scores = graph.node("MatMul", [self._wide(query, f"{path}/query"), self._wide(keys, f"{path}/keys")], f"{path}/scores")
        if not wide_scores:
            scores = self._wide(self._narrow(scores, f"{path}/scores"), f"{path}/scores")
        scores = graph.node("Add", [scores, shared.mask], f"{path}/scores")
        share = self._narrow(graph.node("Softmax", [scores], f"{path}/scores", axis=-1), f"{path}/share")
        out = graph.node("MatMul", [self._wide(share, f"{path}/share"), self._wide(values, f"{path}/values")], f"{path}/sum")
        out = graph.node("Reshape", [self._narrow(out, f"{path}/sum"), graph.ints(0, heads, -1, dim)], f"{path}/heads")
        out = graph.node("Transpose", [out], f"{path}/heads", perm=[0, 2, 1, 3])
        return graph.node("Reshape", [out, graph.ints(0, 0, heads * dim)], f"{path}/joined"), key, value

    # GroupQueryAttention of onnxruntime: rotation, append to the cache, scores, softmax and sum in one kernel, over valid positions only
    def _attention_in_ort(
        self, x: str, past_key: str, past_value: str, shared: _SharedInOrt, weights: str, path: str
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
        qkv = self._product(x, f"{weights}.qkv", f"{path}/qkv")
        return self.graph.node("Add", [qkv, self._weight(f"{weights}.qkv.bias", f"{path}/qkv/bias")], f"{path}/qkv")

    def _mlp(self, x: str, weights: str, path: str) -> str:
        """down(silu(gate(x)) * up(x)), gate and up as one product."""
        graph, width = self.graph, self.text.intermediate
        gate_up = self._product(x, f"{weights}.gate_up", f"{path}/gate_up")
        gate, up = graph.split("Split", [gate_up, graph.ints(width, width)], f"{path}/gate_up", 2, axis=-1)
        gate = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], f"{path}/silu")], f"{path}/silu")
        return self._product(graph.node("Mul", [gate, up], f"{path}/product"), f"{weights}.down", f"{path}/down")

    def _product(self, x: str, name: str, path: str) -> str:
        """x [batch, positions, inputs] times the matrix `name` [inputs, outputs]."""
        if self.provider == "cpu" and name in self.plan.fine_inputs:
            return self._product_of_halves(x, name, path)
        return self._times(x, name, path)

    def _product_of_halves(self, x: str, name: str, path: str) -> str:
        """The same with 16-bit inputs, for onnxruntime's product of integers on a CPU, which rounds its inputs to 8 bits in blocks.

        x is the sum of two halves: multiples of a block's step, which the product represents exactly, and what is left, whose step is 1/254
        of that. Both are rows of one product, so the weights are read once.
        """
        graph = self.graph
        inputs, scales = graph.shape(name)[0], graph.shape(f"{name}.scale")
        block = INT8_BLOCK if len(scales) == 1 else inputs // scales[0]
        missing = -inputs % block
        if missing:
            x = graph.node("Pad", [x, graph.ints(0, 0, 0, 0, 0, missing)], f"{path}/blocks")
        rows = graph.node("Reshape", [x, graph.ints(0, 0, (inputs + missing) // block, block)], f"{path}/blocks")
        largest = graph.node("ReduceMax", [graph.node("Abs", [rows], f"{path}/blocks"), graph.ints(-1)], f"{path}/blocks", keepdims=1)
        step = graph.node("Mul", [largest, graph.constant(1 / 127, np.float32)], f"{path}/step")
        step = graph.node("Max", [step, graph.constant(np.finfo(np.float32).tiny, np.float32)], f"{path}/step")
        coarse = graph.node("Round", [graph.node("Div", [rows, step], f"{path}/coarse")], f"{path}/coarse")
        coarse = graph.node("Mul", [coarse, step], f"{path}/coarse")
        halves = graph.node("Concat", [coarse, graph.node("Sub", [rows, coarse], f"{path}/rest")], f"{path}/halves", axis=1)
        halves = graph.node("Reshape", [halves, graph.ints(0, 0, inputs + missing)], f"{path}/halves")
        if missing:
            halves = graph.node("Slice", [halves, graph.ints(0), graph.ints(inputs), graph.ints(2)], f"{path}/halves")
        product = self._times(halves, name, path)
        first, second = graph.split("Split", [product], f"{path}/halves", 2, axis=1, num_outputs=2)
        return graph.node("Add", [first, second], f"{path}/halves")

    def _times(self, x: str, name: str, path: str) -> str:
        """x [..., inputs] times the stored matrix `name` [inputs, outputs]."""
        if not self._is_packed(name):
            return self._multiply("MatMul", x, self._weight(name, path), path)
        matrix, scales = self.graph.packed(name, path, INT8_BLOCK)
        inputs, outputs = self.graph.shape(name)
        sizes = {"K": inputs, "N": outputs, "bits": 8, "block_size": INT8_BLOCK, "accuracy_level": ACCURACY_LEVEL}
        return self.graph.node("MatMulNBits", [x, matrix, scales], path, domain=ORT_DOMAIN, **sizes)

    def _is_packed(self, name: str) -> bool:
        """Whether a product needs onnxruntime's own operator: INT8 with per-channel scales, on a CPU.

        Before 1.25, onnxruntime makes floats of all these weights at every step, instead of joining DequantizeLinear and MatMul
        (microsoft/onnxruntime#27614, #27769).
        """
        return self.provider == "cpu" and self.graph.is_quantized(name) and len(self.graph.shape(f"{name}.scale")) == 1

    def _multiply(self, op: str, x: str, matrix: str, path: str, **attributes: int) -> str:
        """MatMul or Gemm of two values of the plan's type. The sums are FP32, the result has the plan's type.

        onnxruntime joins DequantizeLinear and MatMul in one kernel (MatMulNBits) only if there is no Cast between them, so its graph for a
        GPU has none. Sums are then as wide as its kernels make them.
        """
        if self.provider == "cuda":
            return self.graph.node(op, [x, matrix], path, **attributes)
        product = self.graph.node(op, [self._wide(x, f"{path}/input"), self._wide(matrix, f"{path}/matrix")], path, **attributes)
        return self._narrow(product, path)

    def _add(self, hidden: str, branch: str, path: str, factor: float = 1.0) -> str:
        """The residual stream [..., hidden] in FP32 plus `factor` times a branch in the plan's type."""
        branch = self._wide(branch, path)
        if factor != 1.0:
            branch = self.graph.node("Mul", [branch, self.graph.constant(factor, np.float32)], path)
        return self.graph.node("Add", [hidden, branch], path)

    def _rms_norm(self, x: str, name: str, path: str) -> str:
        """x / sqrt(mean(x^2) + eps) * weight: FP32 x [..., hidden] -> the plan's type."""
        graph = self.graph
        square = graph.node("Pow", [x, graph.constant(2, np.float32)], path)
        mean = graph.node("ReduceMean", [square, graph.ints(-1)], path, keepdims=1)
        mean = graph.node("Add", [mean, graph.constant(self.text.rms_norm_eps, np.float32)], path)
        normed = graph.node("Div", [x, graph.node("Sqrt", [mean], path)], path)
        return graph.node("Mul", [self._narrow(normed, path), self._weight(name, f"{path}/weight")], path)

    # Outputs --------------------------------------------------------------------------------------------------------------------

    def _logits(self, hidden: str, logit_positions: str) -> None:
        """Add the outputs `logits`, `top_values`, `top_ids` and `log_normalizer` for `hidden` [batch, m, hidden]."""
        graph, text = self.graph, self.text
        hidden = self._rms_norm(hidden, "llm.norm", "/head/norm")
        if graph.is_quantized("llm.head"):
            logits = self._product(hidden, "llm.head", "/head")
        else:
            table = self._weight("llm.embedding" if text.tied else "llm.head", "/head")  # [vocab, hidden]
            flat = graph.node("Reshape", [hidden, graph.ints(-1, text.hidden)], "/head/flat")
            flat = self._multiply("Gemm", flat, table, "/head", transB=1)
            shape = graph.node("Concat", [graph.node("Shape", [logit_positions], "/head"), graph.ints(text.vocab)], "/head/shape", axis=0)
            logits = graph.node("Reshape", [flat, shape], "/head/logits")
        logits = self._wide(logits, "/head/logits")
        count = min(CANDIDATES, text.vocab)
        rows = self._in_rows(logits)
        values, ids = self._top(logits, count) if rows is None else self._top_of_rows(rows, count)
        graph.output("log_normalizer", self._log_normalizer(logits, rows, values), np.float32, ["batch", "m"])
        graph.output("logits", logits, np.float32, ["batch", "m", text.vocab])
        graph.output("top_values", values, np.float32, ["batch", "m", count])
        graph.output("top_ids", ids, np.int64, ["batch", "m", count])

    def _in_rows(self, logits: str) -> str | None:
        """Logits [batch, m, vocab] as [batch, m, rows, TOP_ROW], filled up with the lowest float; None on a CPU, or if they are one row."""
        graph, vocab = self.graph, self.text.vocab
        rows = -(-vocab // TOP_ROW)
        if self.provider == "cpu" or rows == 1:
            return None
        if padding := rows * TOP_ROW - vocab:
            lowest = graph.constant(np.finfo(np.float32).min, np.float32)
            logits = graph.node("Pad", [logits, graph.ints(0, 0, 0, 0, 0, padding), lowest], "/head/rows")
        return graph.node("Reshape", [logits, graph.ints(0, 0, rows, TOP_ROW)], "/head/rows")

    def _top(self, logits: str, count: int) -> tuple[str, str]:
        """The `count` largest values of the last axis and their places, sorted; the smaller place comes first among equal values."""
        values, places = self.graph.split("TopK", [logits, self.graph.ints(count)], "/head/top", 2, axis=-1, largest=1, sorted=1)
        return values, places

    def _top_of_rows(self, rows: str, count: int) -> tuple[str, str]:
        """The `count` largest logits and their ids, [batch, m, count] each, from the largest ones of each row."""
        graph = self.graph
        first = TOP_ROW * np.arange(-(-self.text.vocab // TOP_ROW))[:, None]
        values, ids = graph.split("TopK", [rows, graph.ints(count)], "/head/rows", 2, axis=-1, largest=1, sorted=1)
        ids = graph.node("Add", [ids, graph.constant(first, np.int64)], "/head/ids")
        values, ids = (
            graph.node("Reshape", [each, graph.ints(0, 0, -1)], f"/head/{name}") for each, name in ((values, "values"), (ids, "ids"))
        )
        values, places = self._top(values, count)
        return values, graph.node("GatherElements", [ids, places], "/head/ids", axis=-1)

    def _log_normalizer(self, logits: str, rows: str | None, top_values: str) -> str:
        """log(sum(exp(logits))) of every position, [batch, m]; like the candidates, in rows first."""
        graph, path = self.graph, "/head/normalizer"
        largest = graph.node("Slice", [top_values, graph.ints(0), graph.ints(1), graph.ints(2)], path)  # [batch, m, 1]
        if rows is None:
            share = graph.node("Exp", [graph.node("Sub", [logits, largest], path)], path)
        else:
            share = graph.node("Sub", [rows, graph.node("Unsqueeze", [largest, graph.ints(3)], f"{path}/rows")], path)
            share = graph.node("ReduceSum", [graph.node("Exp", [share], path), graph.ints(-1)], f"{path}/rows", keepdims=0)
        total = graph.node("Log", [graph.node("ReduceSum", [share, graph.ints(-1)], path, keepdims=1)], path)
        return graph.node("Squeeze", [graph.node("Add", [total, largest], path), graph.ints(2)], path)

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

    def _wide(self, value: str, path: str) -> str:
        """A value of the computing type in FP32."""
        return value if self.dtype == np.float32 else self.graph.node("Cast", [value], f"{path}/wide", to=element_type(np.float32))

    def _narrow(self, value: str, path: str) -> str:
        """An FP32 value in the computing type."""
        return value if self.dtype == np.float32 else self.graph.node("Cast", [value], f"{path}/narrow", to=element_type(self.dtype))
