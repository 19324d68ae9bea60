"""Reads and writes the demo checkpoint: the native `fast_vlm` layout of transformers, in bfloat16."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from examples.demo_training.language import save_tokenizer
from examples.demo_training.model import DemoConfig, DemoModel, fold

PREFIXES = {
    "vision.vision_tower.": "model.vision_tower.timm_model.",
    "vision.multi_modal_projector.": "model.multi_modal_projector.",
    "language_model.": "model.language_model.",
}
AUXILIARY = ("vision.dense_head.", "vision.summary_head.", "vision.place_head.")


def native_config(config: DemoConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """`config.json` of the checkpoint. Vision widths and depths go to timm through `model_args`."""
    end, pad, image = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>", "<image>"))
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "model_type": "fast_vlm",
        "dtype": "bfloat16",
        "image_token_id": image,
        "image_seq_length": config.visual_tokens,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": True,
        "eos_token_id": end,
        "pad_token_id": pad,
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": config.vocab,
            "hidden_size": config.hidden,
            "intermediate_size": config.intermediate,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "max_position_embeddings": config.max_positions,
            "rope_theta": config.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "bos_token_id": None,
            "eos_token_id": end,
            "pad_token_id": pad,
        },
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": config.vision().out_dim,
            "model_args": {"inference_mode": True, "layers": list(config.depths), "embed_dims": list(config.dims)},
        },
    }


def preprocessor_config(config: DemoConfig) -> dict[str, Any]:
    """`preprocessor_config.json`: bicubic, 1/255 and nothing else (mean 0, std 1)."""
    size = config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "FastVlmProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    }


def native_tensors(model: DemoModel) -> dict[str, Tensor]:
    """Weights by native name in bfloat16, BatchNorms of training folded, auxiliary heads left out. `model` is not changed."""
    model = copy.deepcopy(model).float().eval()
    fold(model.vision.vision_tower)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(AUXILIARY):
            continue
        prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        stored = tensor if tensor.dtype == torch.int64 else tensor.to(torch.bfloat16)
        tensors[PREFIXES[prefix] + name.removeprefix(prefix)] = stored.contiguous()
    return tensors


def export_checkpoint(model: DemoModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the whole checkpoint into `folder`: into a temporary folder first, then file by file to its place."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    end, pad = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as name:
        new = Path(name)
        save_file(native_tensors(model), new / "model.safetensors", metadata={"format": "pt"})
        os.chmod(new / "model.safetensors", 0o644)
        _write_json(new / "config.json", native_config(config, tokenizer))
        _write_json(new / "preprocessor_config.json", preprocessor_config(config))
        _write_json(
            new / "processor_config.json",
            {
                "processor_class": "FastVlmProcessor",
                "image_token": "<image>",
                "patch_size": 64,
                "num_additional_image_tokens": 0,
                "vision_feature_select_strategy": "full",
            },
        )
        _write_json(new / "generation_config.json", {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad})
        save_tokenizer(tokenizer, new, context=config.max_positions)
        for path in sorted(new.iterdir()):
            os.replace(path, folder / path.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(folder: Path) -> tuple[DemoModel, Tokenizer]:
    """The exported model in float32 and eval mode, with untrained auxiliary heads, and its tokenizer.

    Raises FileNotFoundError when a file is missing and RuntimeError when tensors do not fit the configuration.
    """
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text, vision = written["text_config"], written["vision_config"]["model_args"]
    size = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))["crop_size"]["width"]
    config = DemoConfig(
        image_size=size,
        depths=tuple(vision["layers"]),
        dims=tuple(vision["embed_dims"]),
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        intermediate=text["intermediate_size"],
        vocab=text["vocab_size"],
        rope_theta=text["rope_theta"],
        max_positions=text["max_position_embeddings"],
    )
    model = DemoModel(config)
    fold(model.vision.vision_tower)
    back = {native: ours for ours, native in PREFIXES.items()}
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        prefix = next(prefix for prefix in back if name.startswith(prefix))
        tensors[back[prefix] + name.removeprefix(prefix)] = tensor if tensor.dtype == torch.int64 else tensor.float()
    missing, unknown = model.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.startswith(AUXILIARY)]
    if missing or unknown:
        raise RuntimeError(f"{folder / 'model.safetensors'} does not fit its config.json: missing {missing}, unknown {unknown}")
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the training state atomically: a kill at any moment leaves the old or the new one."""
    beside = path.with_suffix(".new")
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def config_dict(config: DemoConfig) -> dict[str, Any]:
    """Sizes as JSON values."""
    return asdict(config)
