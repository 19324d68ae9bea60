"""A model directory of a few kilobytes whose graphs have the same inputs and outputs as the real ones (docs/graphs.md), without attention.

Keys and values depend on id and position. Logits depend on the sum over all valid cached positions of all layers, so any error in the cache
(stale, shifted, cut or reordered) changes the text at once. Nothing is trained: the text is noise, and the same noise every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fastvlm_edge.model_dir.manifest import Cascade, DecoderSpec, FileRecord, Manifest, Source, TextSpec, VisionSpec, sha256

LAYERS, KV_HEADS, HEAD_DIM, HIDDEN, CANDIDATES = 3, 2, 4, 8, 64
VOCAB, TOKEN_COUNT = 512, 500
"""The last 12 rows of the head are padding. Half of them always have the largest logits, so that a sampler must mask them."""
IMAGE_SIZE, PATCH = 256, 64
TOKENS = (IMAGE_SIZE // PATCH) ** 2
SYSTEM_PROMPT = "You are a helpful assistant."
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_CORPUS = [
    "You are a helpful assistant. system user assistant\n",
    "Describe the picture. What does the meter read? It reads 042.\n",
    "Ein Zähler, déjà vu, \u6c34\u9053\u30e1\u30fc\u30bf\u30fc \U0001f600\U0001f44d\U0001f3fd \u0441\u0447\u0451\u0442\u0447\u0438\u043a\n",
] * 4
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer shaped like Qwen2's: NFC, the same word pattern, three control tokens at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=TOKEN_COUNT - 4, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    filler = [f"<unused{index}>" for index in range(TOKEN_COUNT - 4 - tokenizer.get_vocab_size())]
    tokenizer.add_tokens(filler)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", AddedToken("<image>", special=True)])
    assert tokenizer.get_vocab_size() == TOKEN_COUNT
    return tokenizer


class _Graph:
    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def weight(self, *shape: int) -> str:
        return self.constant(self.random.standard_normal(shape).astype(np.float32))

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{op}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def save(self, path: Path, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> None:
        graph = helper.make_graph(self.nodes, path.stem, inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def build_vision(path: Path, dtype: str, *, any_size: bool = False) -> None:
    """The encoder: the mean colour of each patch, times a matrix."""
    size: int | str = "size" if any_size else IMAGE_SIZE
    tokens: int | str = "tokens" if any_size else TOKENS
    g = _Graph(seed=1)
    pooled = g.add("AveragePool", "pixel_values", kernel_shape=[PATCH, PATCH], strides=[PATCH, PATCH])  # [batch, 3, h, w]
    flat = g.add("Reshape", pooled, g.ints(0, 3, -1))
    rows = g.add("Transpose", flat, perm=[0, 2, 1])  # [batch, tokens, 3]
    g.add("Cast", g.add("MatMul", rows, g.weight(3, HIDDEN)), output="image_features", to=_TYPES[dtype])
    g.save(
        path,
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("image_features", _TYPES[dtype], ["batch", tokens, HIDDEN])],
    )


def build_decoder(path: Path, dtype: str, *, appends: bool = False) -> None:
    """The decoder that the docstring of this module describes. With `appends` it writes into the cache itself, like decoder.cuda.onnx."""
    g = _Graph(seed=2)
    features = g.add("Cast", "image_features", to=TensorProto.FLOAT)
    table = g.add("Concat", g.weight(VOCAB, HIDDEN), features, axis=0)
    x = g.add("Gather", table, "input_ids", axis=0)  # [batch, seq, hidden]
    angle = g.add("Mul", g.add("Cast", "position_ids", to=TensorProto.FLOAT), g.constant(np.array([0.37], np.float32)))
    turn = g.add("Unsqueeze", g.add("Sin", angle), g.ints(2))  # [batch, seq, 1]
    x = g.add("Add", x, turn)
    start = g.add("Slice", "position_ids", g.ints(0), g.ints(1), g.ints(1))  # [batch, 1]
    capacity = g.add("Gather", g.add("Shape", "past_key_values.0.key"), g.constant(np.int64(2)))
    steps = g.add("Range", g.constant(np.int64(0)), capacity, g.constant(np.int64(1)))
    valid = g.add("Cast", g.add("Less", g.add("Unsqueeze", steps, g.ints(0)), start), to=TensorProto.FLOAT)  # [batch, capacity]
    mask = g.add("Unsqueeze", valid, g.ints(1, 3))  # [batch, 1, capacity, 1]
    layers, total = [], None
    for layer in range(LAYERS):
        pair = []
        for part in ("key", "value"):
            projected = g.add("Tanh", g.add("MatMul", x, g.weight(HIDDEN, KV_HEADS * HEAD_DIM)))
            heads = g.add("Transpose", g.add("Reshape", projected, g.ints(0, 0, KV_HEADS, HEAD_DIM)), perm=[0, 2, 1, 3])
            stored = g.add("Cast", heads, to=_TYPES[dtype])  # rounded once, so cached and new values are the same
            pair.append(stored)
            past = g.add("Mul", g.add("Cast", f"past_key_values.{layer}.{part}", to=TensorProto.FLOAT), mask)
            seen = g.add("ReduceSum", past, g.ints(2), keepdims=1)  # [batch, kv_heads, 1, head_dim]
            new = g.add("CumSum", g.add("Cast", stored, to=TensorProto.FLOAT), g.constant(np.int64(2)))
            state = g.add("Add", seen, new)  # [batch, kv_heads, seq, head_dim]
            flat = g.add("Reshape", g.add("Transpose", state, perm=[0, 2, 1, 3]), g.ints(0, 0, KV_HEADS * HEAD_DIM))
            mixed = g.add("MatMul", flat, g.weight(KV_HEADS * HEAD_DIM, HIDDEN))
            total = mixed if total is None else g.add("Add", total, mixed)
        if appends:
            for part, stored in zip(("key", "value"), pair, strict=True):
                at = g.add("Expand", g.add("Unsqueeze", "position_ids", g.ints(1, 3)), g.add("Shape", stored))
                g.add("ScatterElements", f"past_key_values.{layer}.{part}", at, stored, output=f"present.{layer}.{part}", axis=2)
        else:
            layers.append(g.add("Concat", *[g.add("Unsqueeze", tensor, g.ints(0)) for tensor in pair], axis=0))
    if not appends:
        g.add("Concat", *[g.add("Unsqueeze", layer, g.ints(0)) for layer in layers], output="kv_new", axis=0)
    assert total is not None
    # The sine keeps the sums of a long conversation from always pointing at the same few ids.
    hidden = g.add("Sin", total)
    chosen = g.add("GatherND", hidden, g.add("Unsqueeze", "logit_positions", g.ints(2)), batch_dims=1)  # [batch, m, hidden]
    head = g.random.standard_normal((HIDDEN, VOCAB)).astype(np.float32)
    head[:, TOKEN_COUNT::2] *= 3
    logits = g.add("MatMul", chosen, g.constant(head), output="logits")
    g.add("Identity", g.ints(CANDIDATES), output="k")
    g.nodes.append(helper.make_node("TopK", [logits, "k"], ["top_values", "top_ids"], sorted=1))
    g.add("ReduceLogSumExp", logits, g.ints(2), output="log_normalizer", keepdims=0)
    int64, info = TensorProto.INT64, helper.make_tensor_value_info
    cache: list[str | int] = ["batch", KV_HEADS, "capacity", HEAD_DIM]
    cached = [info(f"past_key_values.{layer}.{part}", _TYPES[dtype], cache) for layer in range(LAYERS) for part in ("key", "value")]
    g.save(
        path,
        [
            info("input_ids", int64, ["batch", "seq"]),
            info("position_ids", int64, ["batch", "seq"]),
            info("image_features", _TYPES[dtype], ["rows", HIDDEN]),
            *cached,
            info("logit_positions", int64, ["batch", "m"]),
        ],
        [
            *([info(value.name.replace("past_key_values", "present"), _TYPES[dtype], cache) for value in cached] if appends else []),
            *([] if appends else [info("kv_new", _TYPES[dtype], [LAYERS, 2, "batch", KV_HEADS, "seq", HEAD_DIM])]),
            info("logits", TensorProto.FLOAT, ["batch", "m", VOCAB]),
            info("top_values", TensorProto.FLOAT, ["batch", "m", CANDIDATES]),
            info("top_ids", int64, ["batch", "m", CANDIDATES]),
            info("log_normalizer", TensorProto.FLOAT, ["batch", "m"]),
        ],
    )


def build_model(
    directory: Path, *, context: int = 2048, dtype: str = "float32", other_sizes: Sequence[int] = (), cascade: Cascade | None = None
) -> Path:
    """Write the whole model directory and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    build_vision(directory / "vision.onnx", dtype, any_size=bool(other_sizes))
    vision = VisionSpec(image_size=IMAGE_SIZE, geometry="pad", tokens=TOKENS, hidden=HIDDEN, other_sizes=list(other_sizes))
    build_decoder(directory / "decoder.onnx", dtype)
    build_decoder(directory / "decoder.cuda.onnx", dtype, appends=True)
    names = ["tokenizer.json", *(path.name for path in sorted(directory.glob("*.onnx")))]
    stop_ids = [token_id for name in ("<|im_end|>", "<|endoftext|>") if (token_id := tokenizer.token_to_id(name)) is not None]
    Manifest(
        name="fake",
        toolkit_version="0",
        source=Source(checkpoint="none", layout="none", files={}),
        precision="fp32",
        plan={},
        vision=vision,
        decoder=DecoderSpec(
            layers=LAYERS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            hidden=HIDDEN,
            vocab=VOCAB,
            context=context,
            candidates=CANDIDATES,
            dtype=dtype,
        ),
        text=TextSpec(system_prompt=SYSTEM_PROMPT, stop_ids=stop_ids, token_count=TOKEN_COUNT),
        files={name: FileRecord(sha256(directory / name), (directory / name).stat().st_size) for name in names},
        cascade=cascade,
    ).write(directory)
    return directory
