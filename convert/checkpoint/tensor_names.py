"""The tensor names of a checkpoint: the names of each layout become one canonical set.

Canonical names are `vision.<FastViTHD state dict>`, `projector.linear_{1,2}.*`, `llm.{embed_tokens,layers.N,norm}.*` and `lm_head.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fastvlm_edge.errors import FastVLMError

EMBEDDING, HEAD = "llm.embed_tokens.weight", "lm_head.weight"
APPLE_PARTS = (
    ("model.vision_tower.vision_tower.model.", "vision."),
    ("model.mm_projector.0.", "projector.linear_1."),
    ("model.mm_projector.2.", "projector.linear_2."),
    ("lm_head.", "lm_head."),
    ("model.embed_tokens.", "llm.embed_tokens."),
    ("model.layers.", "llm.layers."),
    ("model.norm.", "llm.norm."),
)
NATIVE_PARTS = (
    ("model.vision_tower.timm_model.", "vision."),
    ("vision_tower.timm_model.", "vision."),
    ("model.multi_modal_projector.", "projector."),
    ("multi_modal_projector.", "projector."),
    ("lm_head.", "lm_head."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "llm."),
    ("language_model.model.", "llm."),
)
MLX_PARTS = (
    ("vision_tower.vision_model.", "vision."),
    ("mm_projector.0.", "projector.linear_1."),
    ("mm_projector.2.", "projector.linear_2."),
    ("lm_head.", "lm_head."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "llm."),
)
PARTS = {"apple": APPLE_PARTS, "hub": APPLE_PARTS, "native": NATIVE_PARTS, "mlx": MLX_PARTS}
"""Layout -> beginnings of stored names, with what they are in the canonical ones."""
APPLE_TOP = {
    "patch_embed": "stem",
    "conv_exp": "final_conv",
    "network.0": "stages.0.blocks",
    "network.1": "stages.1.downsample",
    "network.2": "stages.1.blocks",
    "network.3": "stages.2.downsample",
    "network.4": "stages.2.blocks",
    "network.5": "stages.3.downsample",
    "network.6": "stages.3.pos_emb",
    "network.7": "stages.3.blocks",
    "network.8": "stages.4.downsample",
    "network.9": "stages.4.pos_emb",
    "network.10": "stages.4.blocks",
}
APPLE_INNER = {
    "convffn": "mlp",
    "lkb_reparam": "reparam_conv",
    "lkb_origin": "large_conv",
    "rbr_conv": "conv_kxk",
    "rbr_scale": "conv_scale",
    "rbr_skip": "identity",
    "reduce": "fc1",
    "expand": "fc2",
}
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into the names of the modules that they wrap, and nothing else does."""
PARALLEL = "module."
"""What DataParallel, DistributedDataParallel and DeepSpeed put before every name."""
ADAPTER = re.compile(r".*(?:\.|^)(?:lora_\w+|base_layer|modules_to_save|original_module|ia3_l|oft_\w+|hada_w\w+|vera_\w+)(?:\.|$).*")
"""Tensors of PEFT: of an adapter, and of the layers that it wraps."""
LAYOUT_NAMES = {"apple": "Apple's layout", "hub": "Apple's layout", "native": "transformers' layout", "mlx": "conversions for MLX"}
LAYER_SCALE = re.compile(r"(.*\.layer_scale(?:_[12])?)")
HARMLESS = re.compile(r".*(rotary_emb\.inv_freq|position_ids|image_newline)|vision\.head\..*")
"""Tensors that FastVLM does not use: buffers that follow from the config, LLaVA's newline token, and the head of CLIP."""


def canonical_name(name: str, layout: str) -> str | None:
    """The canonical form of a stored name; None if the name does not belong to a FastVLM checkpoint."""
    for stored, canonical in PARTS[layout]:
        if name.startswith(stored):
            rest = name[len(stored) :]
            if canonical == "vision.":
                if layout == "mlx":
                    rest = rest.replace("patch_embed.blocks.", "patch_embed.", 1)
                rest = re.sub(r"\.pos_enc\.", ".pe.", rest) if layout == "native" else _apple_vision_name(rest)
            return canonical + rest
    return None


def _apple_vision_name(name: str) -> str:
    parts = name.split(".")
    depth = 2 if parts[0] == "network" else 1
    top = ".".join(parts[:depth])
    inner = [APPLE_INNER.get(part, part) for part in parts[depth:]]
    renamed = ".".join([APPLE_TOP.get(top, top), *inner])
    return f"{renamed}.gamma" if LAYER_SCALE.fullmatch(renamed) else renamed


def canonical_names(stored: Iterable[str], layout: str, where: str, notes: list[str] | None = None) -> dict[str, str]:
    """Canonical name -> stored name, without the tensors that FastVLM does not use.

    `where` names the checkpoint in errors. What wrappers of a model put into its names is taken off, and said in `notes`. Raises
    FastVLMError for unknown names, two names of the same tensor, or a missing part of the model.
    """
    plain = _without_wrappers(list(stored), where, [] if notes is None else notes)
    names: dict[str, str] = {}
    unknown = []
    for name, full in plain.items():
        canonical = canonical_name(name, layout)
        if HARMLESS.fullmatch(canonical or name):
            continue
        if canonical is None:
            unknown.append(name)
        elif canonical in names:
            raise FastVLMError(f"{where} contains the same tensor twice, as {names[canonical]} and as {full}", "remove one of them")
        else:
            names[canonical] = full
    adapter = [full for name, full in plain.items() if ADAPTER.fullmatch(name)]
    if adapter:
        raise FastVLMError(
            f"{where} contains tensors of an adapter that is not merged, LoRA or another ({listing(adapter)})",
            "save the adapter alone (PEFT: save_pretrained), and give its base model, and that directory with --adapter",
        )
    _refuse_foreign_names(unknown, layout, where)
    parts = {name.partition(".")[0] for name in names}
    if "vision" not in parts:
        raise FastVLMError(
            f"{where} contains no vision tower, only {listing(sorted(parts) or unknown)}",
            "give a checkpoint with encoder, projector and language model",
        )
    if "llm" not in parts:
        raise FastVLMError(f"{where} contains no language model, only {listing(sorted(parts))}", "give the whole FastVLM checkpoint")
    if unknown:
        raise FastVLMError(
            f"{where} contains tensors that do not belong to FastVLM: {listing(unknown)}", "give a checkpoint as it was released or saved"
        )
    return names


def _without_wrappers(stored: list[str], where: str, notes: list[str]) -> dict[str, str]:
    """Name without what wrappers put into it -> stored name. Raises FastVLMError if two stored names become the same."""
    names = {name: WRAPPERS.sub("", name) for name in stored}
    while names and all(name.startswith(PARALLEL) for name in names.values()):
        names = {full: name[len(PARALLEL) :] for full, name in names.items()}
    changed = [full for full, name in names.items() if name != full]
    if changed:
        notes.append(
            f"{len(changed)} of {len(names)} tensor names have the prefix of a wrapper: took it off, {changed[0]} is {names[changed[0]]}"
        )
    plain: dict[str, str] = {}
    for full, name in names.items():
        if name in plain:
            raise FastVLMError(f"{where} contains the same tensor twice, as {plain[name]} and as {full}", "remove one of them")
        plain[name] = full
    return plain


def _refuse_foreign_names(unknown: list[str], layout: str, where: str) -> None:
    """Raise FastVLMError if all unknown names are those of the other layout, or known ones behind one prefix."""
    if not unknown:
        return
    other = "apple" if layout == "native" else "native"
    if all(canonical_name(name, other) for name in unknown):
        raise FastVLMError(
            f"{where} has tensors with the names of {LAYOUT_NAMES[other]} ({listing(unknown, 2)}), "
            f"but config.json is that of {LAYOUT_NAMES[layout]}",
            "use the config.json that was saved with these weights",
        )
    prefixes = {_foreign_prefix(name, layout) for name in unknown}
    prefix = prefixes.pop()
    if prefix and not prefixes:
        raise FastVLMError(
            f"{where} has {len(unknown)} tensors whose names begin with {prefix!r}, which does not belong to FastVLM ({unknown[0]})",
            "save the model itself, not what wraps it, with save_pretrained",
        )


def _foreign_prefix(name: str, layout: str) -> str | None:
    """The shortest beginning of an unknown name after which a known one follows."""
    for dot in (place for place, character in enumerate(name) if character == "."):
        if canonical_name(name[dot + 1 :], layout):
            return name[: dot + 1]
    return None


def listing(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
