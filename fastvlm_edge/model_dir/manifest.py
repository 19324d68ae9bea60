"""`fastvlm.json`, the manifest of a model directory: everything that the runtime needs to know about the graphs in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.json_record import from_json, parse_json
from fastvlm_edge.model_dir.mistaken import is_regular_file, not_a_model_directory

MANIFEST_NAME = "fastvlm.json"
SCHEMA = 3
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
GEOMETRIES = ("pad", "crop")
DTYPES = ("float32", "float16", "bfloat16")
NEEDED = ("vision.onnx", "decoder.onnx", "tokenizer.json")
"""Files that every model directory has."""
_SIZES = ("layers", "kv_heads", "head_dim", "hidden", "vocab", "context", "candidates")
STRIDE = 64
"""A visual token covers 64 x 64 pixels: FastViTHD halves the resolution six times."""


@dataclass(frozen=True)
class Source:
    """Where the weights came from. `files` maps each file that was read to its sha256; those of an adapter begin with `adapter/`."""

    checkpoint: str
    layout: str
    files: dict[str, str]
    adapter: str = ""
    """The fine-tune that was merged into the checkpoint, if there is one."""


@dataclass(frozen=True)
class VisionSpec:
    """`vision.onnx`: pixel_values [batch, 3, image_size, image_size], float32 in 0..1 -> image_features [batch, tokens, hidden].

    image_features have the type `DecoderSpec.dtype`. With `other_sizes`, the graph takes pictures of any size.
    """

    image_size: int
    geometry: str
    """`pad` (pad the image to a black square) or `crop` (cut out the centre square)."""
    tokens: int
    hidden: int
    dims: list[int] = field(default_factory=list)
    """Channels of each stage. Only `plan` needs this field and those below; older manifests lack them."""
    depths: list[int] = field(default_factory=list)
    out_dim: int = 0
    se_dim: int = 0
    other_sizes: list[int] = field(default_factory=list)
    """Further sizes of pictures, in pixels of a side; `image_size` is the default one. Older manifests lack this field."""

    @property
    def sizes(self) -> list[int]:
        """All sizes, the smallest first."""
        return sorted({self.image_size, *self.other_sizes})

    def at(self, size: int) -> VisionSpec:
        """The encoder for pictures of another size. Raises FastVLMError if the model directory has none."""
        if size == self.image_size:
            return self
        if size not in self.other_sizes:
            had = ", ".join(map(str, self.sizes))
            raise FastVLMError(f"this model takes pictures of {had} px, not {size}", f"use one of these, or convert with {size} as well")
        return dataclasses.replace(self, image_size=size, tokens=visual_tokens(size))

    @property
    def every_size(self) -> list[int]:
        """All sizes, the default one first. Engines of TensorRT have their optimization profiles in this order."""
        return [self.image_size, *self.other_sizes]

    def suffix(self, size: int) -> str:
        """What tells figures for one of `other_sizes` from those for the default size, which have none: `.512`."""
        return "" if size == self.image_size else f".{size}"


def visual_tokens(size: int) -> int:
    """Number of visual tokens of a picture of `size` pixels on a side."""
    return (size // STRIDE) ** 2


@dataclass(frozen=True)
class DecoderSpec:
    """`decoder.onnx`, the graph of the Qwen2 LLM. The id `vocab + k` stands for row k of image_features."""

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    context: int
    """Largest number of positions of a conversation, visual tokens included."""
    candidates: int
    """Length of top_values and top_ids."""
    dtype: str
    """Type of image_features, of the KV cache and of kv_new: `float32`, `float16` or `bfloat16`."""
    heads: int = 0
    """Only `plan` needs this field and those below; older manifests lack them."""
    intermediate: int = 0
    max_positions: int = 0
    """Positions that the LLM was trained for."""


@dataclass(frozen=True)
class TextSpec:
    """The text around a question."""

    system_prompt: str
    stop_ids: list[int]
    token_count: int
    """Ids from `token_count` on are padding rows of the embedding and are never sampled."""


@dataclass(frozen=True)
class Cascade:
    """How `image_size="auto"` answers: at the smallest size first, and at the next one while the answer is not confident enough.

    `fastvlm-edge eval --image-size auto` fits it to the data of the user and writes it.
    """

    sizes: list[int]
    """The sizes to try, in this order."""
    threshold: float
    """An answer stands if its confidence is at least this, a probability."""
    confidence: Literal["mean", "least"]
    """Which of the two of `Confidence`."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What it was fitted to, and what it gave there."""


@dataclass(frozen=True)
class FileRecord:
    """A file of the model directory."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. `plan` names the type of every stage, `parity` the figures of the check against PyTorch."""

    name: str
    toolkit_version: str
    source: Source
    precision: str
    plan: dict[str, str]
    vision: VisionSpec
    decoder: DecoderSpec
    text: TextSpec
    files: dict[str, FileRecord]
    parity: dict[str, Any] = field(default_factory=dict)
    activations: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Contradictions in the checkpoint (config.json against the tensors, for example) and how the conversion resolved them."""
    cascade: Optional[Cascade] = None  # noqa: UP045 - `X | None` is no type on Python 3.8, where doctor runs
    schema: int = SCHEMA

    def write(self, directory: Path) -> None:
        """Write `fastvlm.json` into `directory`."""
        (directory / MANIFEST_NAME).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Read and check `fastvlm.json`.

    Raises FastVLMError if the directory is not a model directory, or the manifest is damaged or has another schema.
    """
    path = directory / MANIFEST_NAME
    if not is_regular_file(path):
        raise not_a_model_directory(directory, MANIFEST_NAME)
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        schema = document["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise FastVLMError(f"{path} is damaged ({error})", "convert the checkpoint again") from None
    if schema != SCHEMA:
        raise FastVLMError(
            f"{path} has schema {schema}, but this toolkit reads schema {SCHEMA}", "convert the checkpoint again with this version"
        )
    try:
        manifest: Manifest = from_json(Manifest, document)
        _check_values(manifest)
    except ValueError as error:
        raise FastVLMError(f"{path} is damaged ({error})", "convert the checkpoint again") from None
    return manifest


def _check_values(manifest: Manifest) -> None:
    """Raise ValueError for the first value that no conversion writes."""
    vision, decoder, text = manifest.vision, manifest.decoder, manifest.text
    for place, names in ((vision, ("image_size", "tokens", "hidden")), (decoder, _SIZES), (text, ("token_count",))):
        for name in names:
            if not 1 <= (value := getattr(place, name)) < 1 << 31:
                raise ValueError(f"{name} is {value}, not a positive integer")
    for name in ("heads", "intermediate", "max_positions"):
        if not 0 <= (value := getattr(decoder, name)) < 1 << 31:
            raise ValueError(f"{name} is {value}, not 0 or a positive integer")
    side = vision.image_size // STRIDE
    checks = (
        (manifest.precision in PRECISIONS, f"precision is {manifest.precision!r}, not one of {', '.join(PRECISIONS)}"),
        (vision.geometry in GEOMETRIES, f"geometry is {vision.geometry!r}, not one of {', '.join(GEOMETRIES)}"),
        (decoder.dtype in DTYPES, f"dtype is {decoder.dtype!r}, not one of {', '.join(DTYPES)}"),
        (vision.image_size == side * STRIDE, f"image_size is {vision.image_size}, not a multiple of {STRIDE}"),
        (
            all(size > 0 and size % STRIDE == 0 for size in vision.other_sizes) and len(vision.sizes) == 1 + len(vision.other_sizes),
            f"other_sizes is {vision.other_sizes}, beside {vision.image_size}",
        ),
        (vision.tokens == side * side, f"tokens is {vision.tokens}, but an image of {vision.image_size} px has {side * side}"),
        (vision.hidden == decoder.hidden, f"hidden is {vision.hidden} for vision and {decoder.hidden} for the decoder"),
        (decoder.heads % decoder.kv_heads == 0, f"heads is {decoder.heads}, not a multiple of kv_heads, {decoder.kv_heads}"),
        (decoder.candidates <= decoder.vocab, f"candidates is {decoder.candidates}, but vocab only {decoder.vocab}"),
        (text.token_count <= decoder.vocab, f"token_count is {text.token_count}, but vocab only {decoder.vocab}"),
        (all(0 <= each < decoder.vocab for each in text.stop_ids), f"stop_ids is {text.stop_ids}, but vocab only {decoder.vocab}"),
        (all(number > 0 for number in (*vision.dims, *vision.depths)), f"dims is {vision.dims} and depths is {vision.depths}"),
        (vision.out_dim >= 0 and vision.se_dim >= 0, f"out_dim is {vision.out_dim} and se_dim is {vision.se_dim}"),
    )
    for holds, what in checks:
        if not holds:
            raise ValueError(what)
    if (cascade := manifest.cascade) is not None:
        if sorted(set(cascade.sizes)) != cascade.sizes or not set(cascade.sizes) <= set(vision.sizes) or not cascade.sizes:
            raise ValueError(f"cascade has the sizes {cascade.sizes}, of {vision.sizes}")
        if not 0 <= cascade.threshold <= 1:
            raise ValueError(f"cascade has the threshold {cascade.threshold}, not a probability")
    for name in NEEDED:
        if name not in manifest.files:
            raise ValueError(f"files lacks {name!r}")
    check_file_records(manifest.files)


def check_file_records(files: dict[str, FileRecord]) -> None:
    """Raise ValueError for a name that leads out of the directory, a size below 0, or a sha256 that is not one."""
    for name, record in files.items():
        if Path(name).name != name:
            raise ValueError(f"files has {name!r}, which is not the name of a file")
        if record.bytes < 0 or not re.fullmatch("[0-9a-f]{64}", record.sha256):
            raise ValueError(f"{name} has sha256 {record.sha256[:80]!r} and {record.bytes} bytes")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def verify_files(directory: Path, manifest: Manifest, *, hashes: bool = False) -> None:
    """Check that every file of the manifest exists and has its recorded size, and with `hashes` also its recorded sha256.

    Raises FastVLMError that names the first file that differs.
    """
    for name, record in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise FastVLMError(f"{path} is missing", "copy the whole model directory again, or convert the checkpoint again")
        size = path.stat().st_size
        if size != record.bytes:
            raise FastVLMError(
                f"{path} has {size} bytes, but the manifest says {record.bytes}", "copy it again, or convert the checkpoint again"
            )
        if hashes:
            check_sha256(path, record)


def links_outside(directory: Path) -> list[Path]:
    """Files of a model directory that are links to files outside it, as in the cache of a hub. onnxruntime may refuse such weights."""
    home = directory.resolve()
    return [path for path in sorted(directory.glob("*")) if path.is_symlink() and path.resolve().parent != home]


def check_sha256(path: Path, record: FileRecord) -> None:
    """Raise FastVLMError if the content of a file is not the recorded one."""
    if sha256(path) != record.sha256:
        raise FastVLMError(f"{path} is not the file that was converted (sha256 differs)", "copy it again, or convert the checkpoint again")
