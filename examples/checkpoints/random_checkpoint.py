"""Write a FastVLM checkpoint with random weights, in any of the layouts, from a few megabytes to the real 7B.

    python -m examples.checkpoints.random_checkpoint DIRECTORY --layout native --size 0.5b

The same size and seed give the same numbers in every layout. Activations stay of order one through encoder and decoder, pictures and
prompts change the answer, and padding rows are never chosen. Large tensors are cut from one block of random numbers, so writing is as fast
as the disk and needs little memory.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from fastvlm_edge.convert.checkpoint.structure import TextConfig, expected_shapes
from fastvlm_edge.convert.checkpoint.tensor_names import APPLE_INNER, APPLE_TOP
from fastvlm_edge.convert.checkpoint.text import QWEN2_SPLIT
from fastvlm_edge.convert.fastvithd import FastViTHDConfig

LAYOUTS = ("apple", "hub", "native", "mlx")
CHANNELS_LAST = {4: (0, 2, 3, 1), 3: (1, 2, 0)}
"""Axes of convolutions and layer scales in the order of MLX."""
POOL = 4_194_301  # prime: rows of one tensor, cut one after another from the pool, start at different places of it
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
IMAGE_TOKEN = "<image>"
BASE_TOKENS = 256 + 256
IDENTITY = {"token_mixer.reparam_conv.weight": 0.15, "pos_emb.reparam_conv.weight": 0.3}
NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}
STORED = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
CORPUS = """The meter on the wall reads four hundred and seventeen kilowatt hours, and the dial below it points between three and four.
A red sign says STOP. A green sign says EXIT 12, and a yellow label on the box says FRAGILE: THIS SIDE UP, lot 0042.
What does the meter read? How many circles are there? Which colour is the square on the left? Describe the picture in English.
There are two blue triangles above a white circle. There is one orange square to the right of the black star.
The display shows 21.5 degrees; the pressure gauge shows 3.2 bar, the tank is 80% full and the pump is off.
You are a helpful assistant. system user assistant. Output should be brief, about fifteen words or less.
"""


@dataclass(frozen=True)
class Size:
    """One model size. `rows` is the embedding of the Apple layouts; `tokens` counts the ordinary ones, before the special tokens."""

    vision: FastViTHDConfig
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rows: int
    tokens: int
    tied: bool
    image_size: int

    def text(self, rows: int, *, tied: bool) -> TextConfig:
        """The decoder's structure with an embedding of `rows`."""
        return TextConfig(
            self.layers,
            self.hidden,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.intermediate,
            rows,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            max_positions=32768,
            tied=tied,
        )


TINY_VISION = FastViTHDConfig(depths=(1, 2, 2, 1, 1), dims=(16, 32, 64, 128, 256), out_dim=512, se_dim=32)
SIZES = {
    "tiny": Size(TINY_VISION, 3, 128, 4, 2, 32, 352, 640, BASE_TOKENS, True, 256),
    "0.5b": Size(FastViTHDConfig(), 24, 896, 14, 2, 64, 4864, 151936, 151643, True, 1024),
    "0.5b-4-layers": Size(FastViTHDConfig(), 4, 896, 14, 2, 64, 4864, 151936, 151643, True, 1024),
    "1.5b": Size(FastViTHDConfig(), 28, 1536, 12, 2, 128, 8960, 151936, 151643, True, 1024),
    "7b": Size(FastViTHDConfig(), 28, 3584, 28, 4, 128, 18944, 152064, 151643, False, 1024),
}


def write_checkpoint(
    directory: Path | str,
    *,
    layout: str = "apple",
    size: str = "tiny",
    tied: bool | None = None,
    seed: int = 0,
    shards: int = 1,
    image_size: int | None = None,
    dtype: str = "bfloat16",
    tokenizer: str = "json",
) -> Path:
    """Write a checkpoint of random weights into `directory` (made if need be) and return it.

    `tied` None means as released. With `shards` above 1 an index names them. `tokenizer` is `json` (tokenizer.json) or `vocab`
    (vocab.json, merges.txt, added_tokens.json). A tied head is stored as a bit-equal copy in the Apple layouts and left out in the
    others, which is what their own code writes.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    spec = SIZES[size]
    tied = spec.tied if tied is None else tied
    image_size = spec.image_size if image_size is None else image_size
    native = layout == "native"
    rows = native_rows(spec.rows) if native else spec.rows
    text = spec.text(rows, tied=tied)
    shapes = stored_shapes(spec.vision, text, layout)
    weights = RandomWeights(seed, spec, dtype, tied=tied)
    write_safetensors(directory, shapes, lambda name: weights.blocks(name, shapes[name]), layout=layout, shards=shards, dtype=dtype)
    config = native_config(spec, text, image_size, dtype) if native else apple_config(spec, text, image_size, dtype, hub=layout != "apple")
    write_json(directory / "config.json", config)
    special = spec.tokens
    write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": special,
            "pad_token_id": special,
            "do_sample": True,
            "eos_token_id": [special + 2, special],
            "transformers_version": "5.0.0",
        },
    )
    write_preprocessor(directory, image_size)
    write_tokenizer(directory, spec.tokens, native=native, form=tokenizer)
    return directory


def native_rows(rows: int) -> int:
    """The Apple embedding with a row for `<image>` added, padded to a multiple of 64 as transformers' conversion does."""
    return math.ceil((rows + 1) / 64) * 64


def stored_shapes(vision: FastViTHDConfig, text: TextConfig, layout: str) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of what a layout stores, `vision.head.proj` of the Apple layouts included."""
    shapes = expected_shapes(vision, text, train_form=False)
    if layout in ("native", "mlx") and text.tied:
        del shapes["lm_head.weight"]
    if layout != "native":
        shapes["vision.head.proj"] = (vision.out_dim, vision.out_dim // 4)
    if layout == "mlx":
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}
    return shapes


def stored_name(name: str, layout: str) -> str:
    """A canonical name as `layout` spells it."""
    part, _, rest = name.partition(".")
    if layout == "native":
        return {
            "vision": "model.vision_tower.timm_model.",
            "projector": "model.multi_modal_projector.",
            "llm": "model.language_model.",
            "lm_head": "lm_head.",
        }[part] + rest
    if layout == "mlx":
        if part == "vision":
            return "vision_tower.vision_model." + apple_vision_name(rest).replace("patch_embed.", "patch_embed.blocks.")
        if part == "projector":
            return "mm_projector." + rest.replace("linear_1", "0").replace("linear_2", "2")
        return f"language_model.model.{rest}" if part == "llm" else f"language_model.{name}"
    if part == "vision":
        return "model.vision_tower.vision_tower.model." + apple_vision_name(rest)
    if part == "projector":
        return "model.mm_projector." + rest.replace("linear_1", "0").replace("linear_2", "2")
    return f"model.{rest}" if part == "llm" else name


def apple_vision_name(name: str) -> str:
    """The inverse of the mapping in `convert.checkpoint.tensor_names`."""
    for apple, ours in sorted(APPLE_TOP.items(), key=lambda item: -len(item[1])):
        if name.startswith(f"{ours}."):
            name = apple + name[len(ours) :]
            break
    inner = {ours: apple for apple, ours in APPLE_INNER.items() if apple not in ("lkb_reparam", "reduce", "expand")}
    parts = [inner.get(part, part) for part in name.split(".")]
    if ".proj.0." in name and "reparam_conv" in parts:
        parts[parts.index("reparam_conv")] = "lkb_reparam"
    if "se" in parts:
        parts[parts.index("se") + 1] = {"fc1": "reduce", "fc2": "expand"}[parts[parts.index("se") + 1]]
    return ".".join(parts).removesuffix(".gamma")


class RandomWeights:
    """Random values for every tensor by canonical name, the same for the same seed and size whatever the layout or shard."""

    def __init__(self, seed: int, spec: Size, dtype: str, *, tied: bool) -> None:
        self.seed, self.spec, self.dtype, self.tied = seed, spec, NUMPY[dtype], tied
        self.pool = np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32)
        self.scaled: dict[float, npt.NDArray[Any]] = {}

    def blocks(self, name: str, shape: tuple[int, ...]) -> Iterator[npt.NDArray[Any]]:
        """The values of a tensor, flat, in order, in pieces."""
        if name.endswith("num_batches_tracked"):
            yield np.array(1000, np.int64)
        elif name in ("llm.embed_tokens.weight", "lm_head.weight"):
            yield from self._vocabulary("llm.embed_tokens.weight" if self.tied else name, shape)
        elif len(shape) == 2:
            yield from self._cut(name, math.prod(shape), self._gain(name) / math.sqrt(shape[1]))
        else:
            yield self._small(name, shape).astype(self.dtype).reshape(-1)

    def _cut(self, name: str, count: int, scale: float, offset: int = 0) -> Iterator[npt.NDArray[Any]]:
        """`count` normal values of deviation `scale`, from a place in the pool that the name decides."""
        if scale not in self.scaled:
            if len(self.scaled) > 16:
                self.scaled.clear()
            self.scaled[scale] = (self.pool * np.float32(scale)).astype(self.dtype)
        pool = self.scaled[scale]
        at = (zlib.crc32(f"{self.seed}/{name}".encode()) + offset) % POOL
        while count:
            block = pool[at : at + count]
            yield block
            count -= block.size
            at = 0

    def _vocabulary(self, name: str, shape: tuple[int, ...]) -> Iterator[npt.NDArray[Any]]:
        """Rows of nearly equal norm for ordinary tokens; special and padding rows are short, so that greedy search never picks them."""
        rows, hidden = shape
        scale = 2 / math.sqrt(hidden)
        yield from self._cut(name, self.spec.tokens * hidden, scale)
        yield from self._cut(name, (rows - self.spec.tokens) * hidden, scale / 8, offset=self.spec.tokens * hidden)

    def _gain(self, name: str) -> float:
        """Factor on 1/sqrt(inputs) of a matrix: sharp attention, and layers that outweigh the embedding they start from."""
        for part, gain in (("q_proj", 1.6), ("k_proj", 1.6), ("o_proj", 3.0), ("down_proj", 4.0), ("token_mixer.qkv", 1.5)):
            if part in name:
                return gain
        return 1.0

    def _small(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.floating[Any]]:
        """Convolutions, norms and biases."""
        noise = np.concatenate([block.astype(np.float32) for block in self._cut(name, math.prod(shape), 1.0)]).reshape(shape)
        for part, amount in IDENTITY.items():
            if name.endswith(part):
                out = noise * (amount / math.sqrt(shape[2] * shape[3]))
                out[:, 0, shape[2] // 2, shape[3] // 2] += 1.0
                return out
        if name.endswith("running_var"):
            return np.exp(0.3 * noise)
        if name.endswith("gamma"):
            return np.clip(0.3 + 0.08 * noise, 0.1, 0.5)
        if name.endswith(("norm.weight", "layernorm.weight", "bn.weight")) and len(shape) == 1:
            return (1.8 if name == "llm.norm.weight" else 1.0) + 0.1 * noise
        if len(shape) == 4:
            return noise * ((1.0 if ".mlp." in name else 1.7) / math.sqrt(math.prod(shape[1:])))
        return noise * (0.3 if "self_attn" in name else 0.05)


def write_safetensors(
    directory: Path,
    shapes: dict[str, tuple[int, ...]],
    values: Callable[[str], Iterator[npt.NDArray[Any]]] | None,
    *,
    layout: str,
    shards: int = 1,
    dtype: str = "bfloat16",
) -> None:
    """Write tensors by canonical name in as many files as asked. Without `values` the data is a hole in the file, which reads as zero."""
    sizes = {name: math.prod(shape) * _stored_type(name, dtype)[1] for name, shape in shapes.items()}
    total = sum(sizes.values())
    groups: list[list[str]] = [[] for _ in range(shards)]
    filled = 0
    for name, size in sizes.items():
        groups[min(shards - 1, filled * shards // total)].append(name)
        filled += size
    weight_map = {}
    for number, names in enumerate(groups, 1):
        path = directory / ("model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors")
        header: dict[str, Any] = {"__metadata__": {"format": "mlx" if layout == "mlx" else "pt"}}
        at = 0
        for name in names:
            stored = stored_name(name, layout)
            axes = _axes(name, shapes[name], layout)
            shape = [shapes[name][axis] for axis in axes]
            header[stored] = {"dtype": _stored_type(name, dtype)[0], "shape": shape, "data_offsets": [at, at + sizes[name]]}
            weight_map[stored] = path.name
            at += sizes[name]
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in names:
                axes = _axes(name, shapes[name], layout)
                turned = list(axes) != sorted(axes)
                for block in values(name) if values is not None else ():
                    if turned:  # convolutions come in one block
                        block = np.ascontiguousarray(block.reshape(shapes[name]).transpose(axes)).reshape(-1)
                    file.write(block.tobytes() if block.dtype == np.int64 else block.view(np.uint8).data)
            file.truncate(8 + len(encoded) + at)
    if shards > 1:
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _axes(name: str, shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The order in which a layout stores the axes of a tensor."""
    in_order = tuple(range(len(shape)))
    return CHANNELS_LAST.get(len(shape), in_order) if layout == "mlx" and name.startswith("vision.") else in_order


def _stored_type(name: str, dtype: str) -> tuple[str, int]:
    return ("I64", 8) if name.endswith("num_batches_tracked") else (STORED[dtype], NUMPY[dtype].itemsize)


def apple_config(spec: Size, text: TextConfig, image_size: int, dtype: str, *, hub: bool) -> dict[str, Any]:
    """The flat config of Apple's checkpoints; `hub` adds the code references of apple/FastVLM-*."""
    config: dict[str, Any] = {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        **_qwen2(spec, text),
        "torch_dtype": dtype,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": spec.vision.out_dim,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{image_size}",
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        "transformers_version": "4.39.3",
    }
    if hub:
        config["auto_map"] = {"AutoConfig": "llava_qwen.LlavaConfig", "AutoModelForCausalLM": "llava_qwen.LlavaQwen2ForCausalLM"}
    return config


def native_config(spec: Size, text: TextConfig, image_size: int, dtype: str) -> dict[str, Any]:
    """The nested config of transformers' `fast_vlm`; widths other than the released ones go to timm through `model_args`."""
    vision, released = spec.vision, FastViTHDConfig()
    arguments: dict[str, Any] = {"inference_mode": True}
    if vision != released:
        arguments |= {
            "layers": vision.depths,
            "embed_dims": vision.dims,
            "mlp_ratios": (vision.mlp_ratio,) * 5,
            "cls_ratio": vision.out_dim / vision.dims[-1],
        }
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "model_type": "fast_vlm",
        "dtype": dtype,
        "image_token_index": spec.tokens + 3,
        "image_seq_length": (image_size // 64) ** 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "tie_word_embeddings": text.tied,
        "text_config": {"model_type": "qwen2", **_qwen2(spec, text)},
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": vision.out_dim,
            "initializer_range": 0.02,
            "model_args": arguments,
        },
        "transformers_version": "5.0.0",
    }


def _qwen2(spec: Size, text: TextConfig) -> dict[str, Any]:
    return {
        "vocab_size": text.vocab,
        "hidden_size": text.hidden,
        "intermediate_size": text.intermediate,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "max_position_embeddings": text.max_positions,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tied,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": text.layers,
        "initializer_range": 0.02,
        "bos_token_id": spec.tokens,
        "eos_token_id": spec.tokens + 2,
    }


def write_preprocessor(directory: Path, image_size: int) -> None:
    """The image processor's file as both public layouts have it."""
    write_json(
        directory / "preprocessor_config.json",
        {
            "crop_size": {"height": image_size, "width": image_size},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.0, 0.0, 0.0],
            "image_processor_type": "CLIPImageProcessor",
            "image_std": [1.0, 1.0, 1.0],
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": image_size},
        },
    )


def small_tokenizer() -> Tokenizer:
    """A byte-level BPE of 512 tokens with Qwen2's rules, trained on a few sentences; no special tokens yet."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=BASE_TOKENS, initial_alphabet=alphabet, show_progress=False))
    assert tokenizer.get_vocab_size() == BASE_TOKENS, tokenizer.get_vocab_size()
    return tokenizer


def write_tokenizer(directory: Path, tokens: int, *, native: bool, form: str) -> None:
    """The small tokenizer filled up to `tokens` ordinary ids (made-up words that no text yields), then the special ones."""
    document = json.loads(small_tokenizer().to_str())
    vocab: dict[str, int] = document["model"]["vocab"]
    for number in range(len(vocab), tokens):
        vocab[f"Ġ~{number:x}"] = number
    special = [*SPECIAL_TOKENS, *([IMAGE_TOKEN] if native else [])]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added: dict[int, dict[str, Any]] = {tokens + offset: {"content": content, **flags} for offset, content in enumerate(special)}
    write_json(
        directory / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(number): token for number, token in added.items()},
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 8192,
            "tokenizer_class": "Qwen2Tokenizer",
        },
    )
    if form == "json":
        tokenizer = Tokenizer.from_str(json.dumps(document))
        tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in special])
        tokenizer.save(str(directory / "tokenizer.json"))
        return
    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    write_json(directory / "added_tokens.json", {token["content"]: number for number, token in added.items()})


def write_json(path: Path, document: dict[str, Any]) -> None:
    """One json file, readable."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write one checkpoint from the command line."""
    parser = argparse.ArgumentParser(description="Write a FastVLM checkpoint of random weights.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, default="apple")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--tied", choices=("yes", "no"), help="default: as released")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--dtype", choices=NUMPY, default="bfloat16")
    parser.add_argument("--tokenizer", choices=("json", "vocab"), default="json")
    options = parser.parse_args()
    write_checkpoint(
        options.directory,
        layout=options.layout,
        size=options.size,
        seed=options.seed,
        shards=options.shards,
        tied=None if options.tied is None else options.tied == "yes",
        image_size=options.image_size,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
    )


if __name__ == "__main__":
    main()
