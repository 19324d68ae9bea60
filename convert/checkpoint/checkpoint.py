"""A FastVLM checkpoint in any of its layouts, with or without an adapter, opened for reading: where every conversion begins.

Opening reads headers and json only. Weights are read one tensor at a time, under the same canonical names in every layout.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastvlm_edge.convert.checkpoint.adapter import Adapter, merge, open_adapter
from fastvlm_edge.convert.checkpoint.configs import Settings, read_settings, with_pictures_of
from fastvlm_edge.convert.checkpoint.entries import DTYPES, Entry
from fastvlm_edge.convert.checkpoint.folder import find_weights, unused_weights
from fastvlm_edge.convert.checkpoint.hub import locate
from fastvlm_edge.convert.checkpoint.mlx import channels_first, is_mlx, refuse_exports
from fastvlm_edge.convert.checkpoint.model_name import name_of
from fastvlm_edge.convert.checkpoint.shards import first_non_finite, read_shards
from fastvlm_edge.convert.checkpoint.structure import (
    NOT_WHOLE,
    OPTIONAL,
    TextConfig,
    check_shapes,
    expected_shapes,
    is_train_form,
    text_structure,
    vision_structure,
)
from fastvlm_edge.convert.checkpoint.tensor_names import EMBEDDING, HEAD, canonical_names, listing
from fastvlm_edge.convert.fastvithd import FastViTHD, FastViTHDConfig, MobileOneConv
from fastvlm_edge.errors import FastVLMError

__all__ = ["Checkpoint", "TextConfig", "load_projector", "load_vision", "open_checkpoint"]

BytesRead = Callable[[int, int], None]
"""Called with the number of bytes read so far and the total."""

COMPARE_ROWS = 4096
HASH_BLOCK = 1 << 24
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Factors:
    """Factors on a tensor, all powers of two."""

    rows: npt.NDArray[np.float32] | None = None
    """[first axis]"""
    columns: npt.NDArray[np.float32] | None = None
    """[second axis]"""


@dataclass
class Checkpoint:
    """An open checkpoint. Make one with `open_checkpoint`."""

    location: str
    """As the user gave it: a directory or a hub id."""
    name: str
    directory: Path
    layout: str
    """`apple`, `hub`, `native` or `mlx`."""
    vision: FastViTHDConfig
    text: TextConfig
    image_size: int
    """Pixels on a side of the pictures that the checkpoint was trained with."""
    geometry: str
    """How the checkpoint's own code makes a picture square: `pad` or `crop`; `pad` in the native layout."""
    image_token_id: int | None
    """The id of a visual token; None if the layout has no such id."""
    eos_ids: tuple[int, ...]
    """End-of-sequence ids of config.json and generation_config.json, sorted."""
    train_form: bool
    """Whether the encoder still has its train-time branches (`load_vision` merges them)."""
    notes: list[str]
    """What the checkpoint contradicts, lacks, or has in vain, and what was used: `convert` prints it and writes it into the manifest."""
    weights: list[Path]
    adapter: Adapter | None
    """The fine-tune that the tensors are merged with."""
    _entries: dict[str, Entry] = field(repr=False)
    _hashes: dict[str, str] = field(default_factory=dict, repr=False)
    _factors: dict[str, Factors] = field(default_factory=dict, repr=False)

    @property
    def head_name(self) -> str:
        """The tensor that turns hidden states into logits: the embedding if the head is tied to it."""
        return EMBEDDING if self.text.tied else HEAD

    def names(self) -> tuple[str, ...]:
        """Canonical names in the order of the data path. `lm_head.weight` is among them only if the head is not tied."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises KeyError for an unknown name."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Type that a tensor is stored in: float32, float16, ml_dtypes.bfloat16, int64 for a BatchNorm counter; float32 if merged."""
        return self._entries[name].dtype

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor in its type, or in float32 if `rescaled` has given it factors.

        Raises KeyError for an unknown name, and FastVLMError that names tensor and position if a value is NaN or infinite.
        """
        return self._scaled(name, self._finite(name, self._entries[name].read(name), 0), 0)

    def tensor_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Read rows [start, stop) along the first axis, checked like `tensor`. Raises IndexError if they are out of range."""
        return self._scaled(name, self._finite(name, self._entries[name].read(name, (start, stop)), start), start)

    def rescaled(self, factors: dict[str, Factors]) -> Checkpoint:
        """The same checkpoint with factors on its tensors. A tied head that gets factors is no longer tied.

        Raises ValueError for a tensor that has factors already.
        """
        if twice := factors.keys() & self._factors.keys():
            raise ValueError(f"{', '.join(sorted(twice))}: has factors already")
        entries, text = self._entries, self.text
        if HEAD in factors and text.tied:
            entries, text = {**entries, HEAD: entries[EMBEDDING]}, dataclasses.replace(text, tied=False)
        return dataclasses.replace(self, text=text, _entries=entries, _factors={**self._factors, **factors})

    def _scaled(self, name: str, array: npt.NDArray[Any], first_row: int) -> npt.NDArray[Any]:
        factors = self._factors.get(name)
        if factors is None:
            return array
        scaled: npt.NDArray[np.float32] = array.astype(np.float32)
        if factors.rows is not None:
            rows = factors.rows[first_row : first_row + len(array)]
            scaled *= rows.reshape(-1, *[1] * (array.ndim - 1))
        if factors.columns is not None:
            scaled *= factors.columns
        return scaled

    def _finite(self, name: str, array: npt.NDArray[Any], first_row: int) -> npt.NDArray[Any]:
        flat = first_non_finite(array)
        if flat is not None:
            index = [int(part) for part in np.unravel_index(flat, array.shape)]
            value = float(array[tuple(index)])
            if index:
                index[0] += first_row
            raise FastVLMError(
                f"tensor {name} of {self._entries[name].origin} contains {value} at {index}: the weights are damaged",
                "use another training step, or copy or download the file again if it was whole elsewhere",
            )
        return array

    def hash_files(self, progress: BytesRead | None = None) -> dict[str, str]:
        """File name -> sha256 of every file that the conversion reads (weights, config, tokenizer); the second call repeats the result.

        The names of an adapter's files begin with `adapter/`. Reading 15 GB takes a while, so call this in a thread (see hashes.py):
        hashing does not hold the interpreter lock.
        Raises FastVLMError if a file cannot be read.
        """
        if not self._hashes:
            paths = {path.name: path for path in sorted({*self.weights, *(self.directory / name for name in SIDE_FILES)}) if path.is_file()}
            if self.adapter is not None:
                paths |= {f"adapter/{path.name}": path for path in self.adapter.files}
            hashes: dict[str, str] = {}
            buffer = bytearray(HASH_BLOCK)
            view = memoryview(buffer)
            done = 0
            try:
                total = sum(path.stat().st_size for path in paths.values())
                for name, path in paths.items():
                    digest = hashlib.sha256()
                    with path.open("rb", buffering=0) as file:
                        while count := file.readinto(buffer):
                            digest.update(view[:count])
                            done += count
                            if progress is not None:
                                progress(done, total)
                    hashes[name] = digest.hexdigest()
            except OSError as error:
                raise FastVLMError(f"a file of {self.location} cannot be read ({error})", "check its permissions and the disk") from None
            self._hashes = hashes
        return dict(self._hashes)


def open_checkpoint(location: str, *, revision: str | None = None, adapter: str | None = None) -> Checkpoint:
    """Open a directory or a hub id (`org/name`, at `revision`) in any of the layouts, and check everything except the values.

    With `adapter`, another directory or hub id, its tensors are those of the fine-tune. Raises FastVLMError that names what is unsupported,
    missing, unknown, damaged or of the wrong shape.
    """
    directory = locate(location, revision=revision)
    try:
        weights = find_weights(directory)
        settings = read_settings(directory)
        entries = read_shards(directory, weights)
    except OSError as error:
        raise FastVLMError(f"{directory} cannot be read ({error})", "check its permissions and the disk") from None
    where = str(directory)
    refuse_exports(directory, entries)
    layout = settings.layout
    if is_mlx(entries):
        layout, entries = "mlx", channels_first(entries)
    _check_types(entries, where)
    _check_sizes(entries, where)
    notes = list(settings.notes)
    if unused := unused_weights(directory, weights):
        notes.append(f"not used: {listing(unused)}; the weights are those in {listing([path.name for path in weights], 1)}")
    stored = canonical_names(entries, layout, where, notes)
    found = {name: entries[key] for name, key in stored.items()}
    if settings.tied and HEAD in found and EMBEDDING not in found:
        found[EMBEDDING], stored[EMBEDDING] = found.pop(HEAD), stored.pop(HEAD)
        notes.append(f"there is no embedding, only {HEAD}, and config.json says that they are tied: used it for both")
    shapes = {name: entry.shape for name, entry in found.items()}
    vision = vision_structure(shapes, where)
    _check_encoder(settings, vision, where)
    train_form = is_train_form(shapes)
    text = text_structure(shapes, settings, where)
    expected = expected_shapes(vision, text, train_form=train_form)
    check_shapes(shapes, expected, stored, where)
    _check_claims(settings, vision, text, where)
    if settings.claims.get("vocab", text.vocab) != text.vocab:
        notes.append(f"config.json gives {settings.claims['vocab']} for vocab, but the tensors have {text.vocab}: used {text.vocab}")
    tied = _is_tied(found, settings, where, notes)
    if tied:
        found.pop(HEAD, None)
    fine_tune = None
    if adapter is not None:
        fine_tune = open_adapter(adapter)
        tied = merge(fine_tune, found, directory, notes, tied=tied)
        settings = with_pictures_of(fine_tune.directory, settings, notes)
    text = dataclasses.replace(text, tied=tied)
    if settings.image_token_id is not None and not 0 <= settings.image_token_id < text.vocab:
        raise FastVLMError(
            f"{where} has image token {settings.image_token_id}, but the embedding has only {text.vocab} rows", "correct config.json"
        )
    name = name_of(directory) if Path(location).expanduser().is_dir() else location.rpartition("/")[2]
    return Checkpoint(
        location=location,
        name=name if fine_tune is None else f"{name}+{fine_tune.name}",
        directory=directory,
        layout=layout,
        vision=vision,
        text=text,
        image_size=settings.image_size,
        geometry=settings.geometry,
        image_token_id=settings.image_token_id,
        eos_ids=settings.eos_ids,
        train_form=train_form,
        notes=notes,
        weights=weights,
        adapter=fine_tune,
        _entries={name: found[name] for name in expected if name in found},
    )


def _check_types(entries: dict[str, Entry], where: str) -> None:
    """Raise FastVLMError for quantised and other unsupported types; int64 is allowed for BatchNorm counters and buffers only."""
    bad = [
        f"{name} ({entry.kind})"
        for name, entry in entries.items()
        if entry.kind not in DTYPES or (entry.kind == "I64" and not name.endswith(("num_batches_tracked", "position_ids")))
    ]
    if bad:
        raise FastVLMError(
            f"{where} contains tensors of unsupported types: {listing(bad)}", "start from a checkpoint in bfloat16, float16 or float32"
        )


def _check_sizes(entries: dict[str, Entry], where: str) -> None:
    """Raise FastVLMError for tensors without elements."""
    empty = [f"{name} {list(entry.shape)}" for name, entry in entries.items() if 0 in entry.shape]
    if empty:
        raise FastVLMError(
            f"{where} has {len(empty)} tensors without values ({listing(empty, 2)}), as DeepSpeed ZeRO-3 saves them without gathering",
            "gather the weights with the zero_to_fp32.py of the training, or save with stage3_gather_16bit_weights_on_model_save",
        )


def _check_encoder(settings: Settings, vision: FastViTHDConfig, where: str) -> None:
    """Raise FastVLMError if blocks of the encoder are missing: config.json says how many there are, or the widths are the released ones."""
    released = FastViTHDConfig()
    claimed = settings.encoder or ((released.depths, released.dims) if vision.dims == released.dims else None)
    if claimed is not None and (vision.depths, vision.dims) != claimed:
        raise FastVLMError(
            f"the encoder of {where} has {vision.depths} blocks of {vision.dims} channels in its stages, "
            f"but its config.json means {claimed[0]} blocks of {claimed[1]} channels",
            NOT_WHOLE,
        )


def _check_claims(settings: Settings, vision: FastViTHDConfig, text: TextConfig, where: str) -> None:
    """Raise FastVLMError if config.json gives other sizes than the tensors have: part of the model is missing, or the file is another's."""
    actual = {
        "num_hidden_layers": ("layers", text.layers),
        "hidden_size": ("hidden", text.hidden),
        "intermediate_size": ("intermediate", text.intermediate),
        "hidden size of the encoder": ("out_dim", vision.out_dim),
    }
    wrong = [
        f"{settings.claims[key]} for {name}, but the tensors have {size}"
        for name, (key, size) in actual.items()
        if settings.claims.get(key, size) != size
    ]
    if wrong:
        raise FastVLMError(
            f"config.json of {where} gives {'; '.join(wrong)}: part of the model is missing, or the file belongs to another model",
            "save or copy weights and config.json together again; if the weights are whole, correct config.json",
        )


def _is_tied(found: dict[str, Entry], settings: Settings, where: str, notes: list[str]) -> bool:
    """Whether the head is tied to the embedding: it is bit-equal, or absent. Adds a note if config.json contradicts the tensors.

    Raises FastVLMError if the head is absent although config.json says that it is not tied.
    """
    head = found.get(HEAD)
    if head is None:
        if settings.tied is False:
            raise FastVLMError(
                f"{where} lacks tensor {HEAD}, and config.json says that the head is not tied to the embedding",
                "save the whole model again, or correct tie_word_embeddings if the head is tied",
            )
        if settings.tied is None:
            notes.append(f"there is neither a tensor {HEAD} nor tie_word_embeddings in config.json: used the embedding as the head")
        return True
    embedding = found[EMBEDDING]
    equal = head.kind == embedding.kind
    for start in range(0, head.shape[0], COMPARE_ROWS) if equal else ():
        rows = (start, min(start + COMPARE_ROWS, head.shape[0]))
        if head.read(HEAD, rows).tobytes() != embedding.read(EMBEDDING, rows).tobytes():
            equal = False
            break
    if settings.tied is not None and settings.tied != equal:
        notes.append(
            f"config.json has tie_word_embeddings {str(settings.tied).lower()}, but {HEAD} is "
            f"{'equal to' if equal else 'different from'} the embedding: used the tensors"
        )
    return equal


def load_vision(checkpoint: Checkpoint) -> FastViTHD:
    """The encoder with its weights in float32: inference form (train-time branches merged), eval mode, no gradients.

    Raises FastVLMError if a weight is not finite.
    """
    with torch.device("meta"):
        encoder = FastViTHD(checkpoint.vision, train_form=checkpoint.train_form)
    present = set(checkpoint.names())
    if checkpoint.train_form:
        for index, conv in enumerate(encoder.stem):
            if isinstance(conv, MobileOneConv) and not any(name.startswith(f"vision.stem.{index}.conv_scale.") for name in present):
                conv.conv_scale = None
    state = {}
    for name, blank in encoder.state_dict().items():
        canonical = f"vision.{name}"
        if canonical in present:
            array = checkpoint.tensor(canonical)
            state[name] = torch.from_numpy(array.astype(np.int64 if array.dtype == np.int64 else np.float32, copy=False))
        elif OPTIONAL.fullmatch(canonical):
            state[name] = torch.zeros(blank.shape, dtype=blank.dtype)
    encoder.load_state_dict(state, assign=True)
    return encoder.eval().requires_grad_(False).reparameterize()


def load_projector(checkpoint: Checkpoint) -> torch.nn.Sequential:
    """The projector in float32, [..., out_dim] -> [..., hidden]: linear, exact GELU, linear. Raises FastVLMError like `load_vision`."""
    hidden = checkpoint.text.hidden
    with torch.device("meta"):
        layers = torch.nn.Sequential(torch.nn.Linear(checkpoint.vision.out_dim, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden))
    state = {
        f"{position}.{part}": torch.from_numpy(checkpoint.tensor(f"projector.linear_{index}.{part}").astype(np.float32, copy=False))
        for index, position in ((1, 0), (2, 2))
        for part in ("weight", "bias")
    }
    layers.load_state_dict(state, assign=True)
    return layers.eval().requires_grad_(False)
