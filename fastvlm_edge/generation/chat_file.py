"""A conversation as a JSON file: its turns, with the pictures as the model saw them, and the model that they belong to."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.images import AnyImage, EncodedImage, SizedImage, image_key
from fastvlm_edge.inputs.detokenize import Detokenizer
from fastvlm_edge.inputs.image_input import ImageInput, load_rgb, rewound
from fastvlm_edge.inputs.preprocess import to_pixel_values
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.atomic import whole_file
from fastvlm_edge.model_dir.json_record import from_json, parse_json
from fastvlm_edge.model_dir.manifest import Manifest

FORMAT = "fastvlm-edge chat"
VERSION = 1
PICTURES = ("embed", "hash")
CONTEXTS = ("error", "slide")
"""What a chat does when its context is full."""
MAX_BYTES = 1 << 29
_HEAD = f'{{\n "format": "{FORMAT}"'


@dataclass(frozen=True)
class Turn:
    """A question of a conversation, and its reply."""

    prompt: str
    images: tuple[EncodedImage, ...]
    special_tokens: bool
    """Whether those in the prompt were read as tokens."""
    reply: str
    """As far as it was read."""
    reply_ids: tuple[int, ...]


@dataclass(frozen=True)
class ChatTurn:
    """A question that was asked elsewhere, and its reply as text: what `history` of `FastVLM.chat` takes."""

    prompt: str
    reply: str
    images: Sequence[EncodedImage] = ()
    """Made by `encode_image`."""
    special_tokens: bool = False
    """Whether those in the prompt and in the reply are read as tokens."""


@dataclass(frozen=True)
class Model:
    """What a file is compared with and read by."""

    manifest: Manifest
    digest: bytes
    """`images.model_digest`."""
    tokenizer: TextTokenizer
    template: ChatTemplate
    preprocess: Callable[[ImageInput, int], NDArray[np.float32]]
    """An image as pixel_values of a size."""
    encode: Callable[[NDArray[np.float32]], EncodedImage]
    """Runs the vision encoder on pixel_values."""


@dataclass(frozen=True)
class SavedTurn:
    """A `Turn` in the file. `pictures` are their sha256 (`images.image_key`)."""

    prompt: str
    pictures: list[str]
    special_tokens: bool
    reply: str
    reply_ids: list[int]


@dataclass(frozen=True)
class SavedChat:
    """The whole file. `pictures` maps the sha256 of a picture to a PNG file in base64, or to null if it is not embedded.

    `image_sizes` maps it to its size, if that is not the default one of the model. Older files lack this field.
    """

    format: str
    version: int
    model: str
    model_sha256: str
    system: str
    context: str
    turns: list[SavedTurn]
    pictures: dict[str, str | None]
    image_sizes: dict[str, int] = field(default_factory=dict)


def write_chat(path: str | os.PathLike[str], turns: Sequence[Turn], model: Model, *, system: str, context: str, pictures: str) -> None:
    """Write a file that appears complete or not at all. Raises FastVLMError as `Chat.save` does."""
    if pictures not in PICTURES:
        raise FastVLMError(f"pictures is {pictures!r}", f"use one of: {', '.join(PICTURES)}")
    target = _path(path)
    images = [image for turn in turns for image in turn.images]
    default = model.manifest.vision.image_size
    saved = SavedChat(
        format=FORMAT,
        version=VERSION,
        model=model.manifest.name,
        model_sha256=model.digest.hex(),
        system=system,
        context=context,
        turns=[
            SavedTurn(turn.prompt, [image.key.hex() for image in turn.images], turn.special_tokens, turn.reply, list(turn.reply_ids))
            for turn in turns
        ],
        pictures={image.key.hex(): _png(image) if pictures == "embed" else None for image in images},
        image_sizes={image.key.hex(): image.image_size for image in images if image.image_size != default},
    )
    try:
        if target.is_file() and not _is_chat(target):
            raise FastVLMError(f"{target} exists and is not a saved conversation", "choose another name")
        with whole_file(target) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(saved), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FastVLMError(f"the conversation cannot be written to {target} ({reason})", "choose another place") from None


def read_chat(path: str | os.PathLike[str], model: Model, images: Sequence[AnyImage]) -> tuple[SavedChat, list[Turn]]:
    """The file, and its turns with encoded pictures; those that are not embedded are found among `images`, by key.

    Raises FastVLMError as `FastVLM.load_chat` does.
    """
    source = _path(path)
    saved = _read(source)
    if saved.model_sha256 != model.digest.hex():
        what = f"{source} is a conversation with another model: {saved.model} ({saved.model_sha256[:12]})"
        here = f"this one is {model.manifest.name} ({model.digest.hex()[:12]})"
        raise FastVLMError(f"{what}, and {here}", "load the model that it was saved with")
    try:
        _check(saved, model)
    except FastVLMError as error:
        raise _damaged(source, error.what) from None
    except ValueError as error:
        raise _damaged(source, error) from None
    given = _find(source, saved, model, images)
    lacking = [key for key, png in saved.pictures.items() if png is None and key not in given]
    if lacking:
        raise FastVLMError(f"{source} has only the sha256 of {len(lacking)} of its pictures", "give them to load_chat, as images=[...]")
    try:
        known = {key: given[key] if png is None else _decode(key, png, saved, model) for key, png in saved.pictures.items()}
    except ValueError as error:
        raise _damaged(source, error) from None
    turns = [
        Turn(turn.prompt, tuple(known[key] for key in turn.pictures), turn.special_tokens, turn.reply, tuple(turn.reply_ids))
        for turn in saved.turns
    ]
    return saved, turns


def conversation_ids(
    template: ChatTemplate, opening: Sequence[int], turns: Iterable[tuple[str, Sequence[int], bool, Sequence[int]]]
) -> list[int]:
    """Ids of a conversation, up to the end of its last reply.

    A turn is its prompt, the number of rows of each image, whether special tokens are read, and the ids of the reply.
    """
    ids, row = list(opening), 0
    for number, (prompt, rows, special_tokens, reply_ids) in enumerate(turns):
        ids += template.closing() if number else []
        ids += [*template.turn(prompt, rows, first_row=row, special_tokens=special_tokens), *reply_ids]
        row += sum(rows)
    return ids


def turns_of(history: Iterable[Turn | ChatTurn], model: Model) -> list[Turn]:
    """The turns of a conversation that was held elsewhere. The reply of a `ChatTurn` gets the ids that the tokenizer gives its text.

    Raises FastVLMError for what is not a turn, or not text.
    """
    turns = []
    for number, said in enumerate(history, 1):
        if isinstance(said, Turn):
            turns.append(said)
            continue
        if not isinstance(said, ChatTurn):
            raise FastVLMError(
                f"turn {number} of the history is a {type(said).__name__}", "give objects of ChatTurn, or those of chat.turns"
            )
        if not isinstance(said.reply, str):
            raise FastVLMError(
                f"the reply of turn {number} of the history is of type {type(said.reply).__name__}, not str", "give a string"
            )
        for image in said.images:
            if not isinstance(image, EncodedImage):
                what = f"turn {number} of the history has an image of type {type(image).__name__}, not an EncodedImage"
                raise FastVLMError(what, "encode it first, with encode_image")
        ids = model.tokenizer.encode(said.reply, special_tokens=said.special_tokens)
        reply = text_of(ids, model.tokenizer, special_tokens=said.special_tokens)  # in Unicode's NFC
        turns.append(Turn(said.prompt, tuple(said.images), said.special_tokens, reply, tuple(ids)))
    return turns


def text_of(ids: Sequence[int], tokenizer: TextTokenizer, *, special_tokens: bool) -> str:
    """The text that the ids of a reply show."""
    detokenizer = Detokenizer(tokenizer, special_tokens=special_tokens)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


def _path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise FastVLMError(f"the file of a conversation is of type {type(path).__name__}", "give its path as a str or a pathlib.Path")
    if not os.fspath(path):
        raise FastVLMError("the name of the file of a conversation is empty", "give the path of a file")
    return Path(path)


def _is_chat(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_HEAD)) == _HEAD.encode()


def _png(image: EncodedImage) -> str:
    if image.pixels is None:
        raise FastVLMError("a picture of this conversation has no pixels", 'save it with pictures="hash"')
    file = io.BytesIO()
    Image.fromarray(image.pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _damaged(path: Path, reason: object) -> FastVLMError:
    return FastVLMError(f"{path} is not a saved conversation, or is damaged ({reason})", "give a file that chat.save or /save wrote")


def _read(path: Path) -> SavedChat:
    try:
        if not path.exists():
            raise FastVLMError(f"{path} does not exist", "check the path of the conversation")
        if not path.is_file():
            raise _damaged(path, "it is not a regular file")
        if path.stat().st_size > MAX_BYTES:
            raise _damaged(path, f"it has more than {MAX_BYTES >> 20} MiB")
        document = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FastVLMError(f"{path} cannot be read ({error.strerror})", "check the path of the conversation") from None
    except ValueError as error:
        raise _damaged(path, error) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _damaged(path, f"its format is not {FORMAT!r}")
    if document.get("version") != VERSION:
        what = f"{path} has version {document.get('version')!r}, and this toolkit reads version {VERSION}"
        raise FastVLMError(what, "load it with the version of the toolkit that saved it")
    try:
        saved: SavedChat = from_json(SavedChat, document)
    except ValueError as error:
        raise _damaged(path, error) from None
    return saved


def _check(saved: SavedChat, model: Model) -> None:
    """Raise ValueError or FastVLMError for what no chat writes."""
    manifest = model.manifest
    if saved.context not in CONTEXTS:
        raise ValueError(f"context is {saved.context!r}, not one of {', '.join(CONTEXTS)}")
    used = [key for turn in saved.turns for key in turn.pictures]
    if set(used) != set(saved.pictures):
        raise ValueError("pictures are not those of the turns")
    if not set(saved.image_sizes) <= set(used):
        raise ValueError("image_sizes has a picture that is not one of the turns")
    rows = {bytes.fromhex(key).hex(): manifest.vision.at(size).tokens for key, size in _sizes(saved, model).items()}
    pieces = [(turn.prompt, [rows[key] for key in turn.pictures], turn.special_tokens, turn.reply_ids) for turn in saved.turns]
    if len(conversation_ids(model.template, model.template.opening(saved.system), pieces)) > manifest.decoder.context:
        raise ValueError(f"it is longer than the context of {manifest.decoder.context}")
    for number, turn in enumerate(saved.turns, 1):
        if any(not 0 <= token_id < manifest.text.token_count for token_id in turn.reply_ids):
            raise ValueError(f"reply_ids of turn {number} has an id that is not text")
        if turn.reply != text_of(turn.reply_ids, model.tokenizer, special_tokens=turn.special_tokens):
            raise ValueError(f"the reply of turn {number} is not the text of its reply_ids")


def _sizes(saved: SavedChat, model: Model) -> dict[str, int]:
    """The size of each picture."""
    return {key: saved.image_sizes.get(key, model.manifest.vision.image_size) for key in saved.pictures}


def _find(source: Path, saved: SavedChat, model: Model, images: Sequence[AnyImage]) -> dict[str, EncodedImage]:
    """Which pictures these images are, at the sizes that the conversation has. Raises FastVLMError for one that is none of them."""
    found: dict[str, EncodedImage] = {}
    sizes = sorted(set(_sizes(saved, model).values()))
    for number, image in enumerate(images, 1):
        mine: dict[str, EncodedImage] = {}
        if isinstance(image, EncodedImage):
            mine = {image.key.hex(): image}
        else:
            assert not isinstance(image, SizedImage)  # only the server has these
            for size in sizes:
                image = rewound(image)
                pixel_values = model.preprocess(image, size)
                if (key := image_key(pixel_values, model.digest).hex()) in saved.pictures:
                    mine[key] = model.encode(pixel_values)
        if not mine or not set(mine) <= set(saved.pictures):
            raise FastVLMError(
                f"image {number} is not a picture of the conversation in {source}: its sha256 after preprocessing differs",
                "give the original picture, and load the model with the same geometry and background",
            )
        found |= mine
    return found


def _decode(key: str, png: str, saved: SavedChat, model: Model) -> EncodedImage:
    """An embedded picture. Raises ValueError if it is not the one with this key."""
    size = _sizes(saved, model)[key]
    try:
        pixels = np.asarray(load_rgb(base64.b64decode(png, validate=True)))
    except FastVLMError as error:
        raise ValueError(f"picture {key[:12]}: {error.what}") from None
    if pixels.shape != (size, size, 3) or image_key(pixel_values := to_pixel_values(pixels), model.digest).hex() != key:
        raise ValueError(f"picture {key[:12]} is not the one with this sha256")
    return model.encode(pixel_values)
