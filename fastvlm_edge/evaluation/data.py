"""A source of pictures, with or without questions -> `Dataset`: what calibration reads and what `eval` asks.

Pictures are opened one at a time, when they are needed. Examples that cannot be used are counted, named and skipped.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.formats import ACCEPTED, Parsed, Row, Unusable, from_fields, parse_file
from fastvlm_edge.inputs.image_input import ImageInput, load_rgb
from fastvlm_edge.model_dir.json_record import parse_json

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif")


@dataclass(frozen=True)
class ArchivedPicture:
    """A picture inside an archive; `load` reads its bytes."""

    name: str
    load: Callable[[], ImageInput]


@dataclass(frozen=True)
class Example:
    """A picture, and a question about it if the source has one. `kind` groups results and may be empty."""

    id: str
    image: Path | ArchivedPicture
    prompt: str | None
    answers: tuple[str, ...]
    kind: str = ""

    @property
    def picture(self) -> str:
        """Path of the picture, or its name inside the archive."""
        return self.image.name if isinstance(self.image, ArchivedPicture) else str(self.image)

    def load_image(self) -> Image.Image:
        """Open and decode the picture: mode RGB, upright. Raises FastVLMError, which names the picture."""
        if isinstance(self.image, Path):
            if os.path.exists(self.image) and not os.path.isfile(self.image):  # a named pipe would be waited for
                raise FastVLMError(f"{self.image} is not a file", "give the path of a picture")
            return load_rgb(self.image)
        try:
            return load_rgb(self.image.load())
        except FastVLMError as error:
            raise FastVLMError(f"{self.image.name}: {error.what}", error.mend) from None
        except OSError as error:
            raise FastVLMError(f"{self.image.name} cannot be read ({error})", "check the archive") from None


class Dataset:
    """The chosen examples of a source, in the order of the source. `skipped` grows while they are read."""

    def __init__(self, source: str, format: str, items: Sequence[Example | Unusable], *, limit: int | None = None, seed: int = 0) -> None:
        """Use `open_data`."""
        self.source = source
        self.format = format
        """`pictures`, `jsonl`, `json`, `llava`, `webdataset`, `textvqa`, `docvqa`, `chartqa` or `vqav2`."""
        self.total = len(items)
        """Number of examples in the source, chosen or not."""
        self.skipped: list[Unusable] = []
        self._items = items
        self._order = choose(len(items), limit, seed)

    def __len__(self) -> int:
        """Number of chosen examples."""
        return len(self._order)

    def examples(self) -> Iterator[Example | Unusable]:
        """The chosen examples, without opening a picture."""
        return (self._items[index] for index in self._order)

    def read(self, *, minimum: int = 1) -> Iterator[tuple[Example, Image.Image]]:
        """Each usable example with its picture.

        Raises FastVLMError as soon as fewer than `minimum` can be left, or more than half cannot be used.
        """
        self.skipped.clear()
        if len(self) < minimum:
            raise FastVLMError(f"{self.source} has {len(self)} examples, but at least {minimum} are needed", "add more, or raise the limit")
        for item in self.examples():
            if isinstance(item, Unusable):
                self.skip(item.id, item.reason, minimum=minimum)
                continue
            try:
                image = item.load_image()
            except FastVLMError as error:
                self.skip(item.id, str(error), minimum=minimum)
                continue
            yield item, image

    def skip(self, name: str, reason: str, *, minimum: int = 1) -> None:
        """Count an example as unusable. Raises FastVLMError as `read` does."""
        self.skipped.append(Unusable(name, reason))
        bad, first = len(self.skipped), self.skipped[0]
        shown, mend = f"the first is {first.id} ({first.reason})", "correct the data, or choose other data"
        if 2 * bad > len(self):
            raise FastVLMError(f"more than half of the {len(self)} examples of {self.source} cannot be used: {shown}", mend)
        if len(self) - bad < minimum:
            few = f"{bad} of the {len(self)} examples of {self.source} cannot be used, but {minimum} are needed"
            raise FastVLMError(f"{few}: {shown}", mend)

    def describe(self) -> str:
        """Such as `4 of 50 examples of questions.jsonl (jsonl)`."""
        count = str(len(self)) if len(self) == self.total else f"{len(self)} of {self.total}"
        return f"{count} examples of {self.source} ({self.format})"


def open_data(source: str | os.PathLike[str], *, images: Path | None = None, limit: int | None = None, seed: int = 0) -> Dataset:
    """Open a file or a folder of pictures and questions; its content tells the format.

    `images` is the folder of the pictures if they are not beside the file. `limit` chooses that many examples at random, always the same
    ones for the same `seed`; a larger limit chooses these and more.
    Raises FastVLMError if something is missing, damaged or of an unknown format.
    """
    source = os.fspath(source)
    if limit is not None and limit < 1:
        raise FastVLMError(f"the limit is {limit} examples, but must be at least 1", "give a larger limit, or none")
    if images is not None and not images.is_dir():
        raise FastVLMError(f"{images} is not a folder", "give the folder of the pictures with --images DIR")
    path = Path(source)
    if path.is_dir():
        format, items = "pictures", _folder(path)
    elif not path.is_file():
        raise FastVLMError(f"{path} does not exist", f"give {ACCEPTED}")
    elif tarfile.is_tarfile(path):
        format, items = "webdataset", _webdataset(path)
    else:
        parsed = parse_file(path)
        format, items = parsed.format, _find_pictures(path, parsed, images)
    return Dataset(source, format, items, limit=limit, seed=seed)


def choose(count: int, limit: int | None, seed: int) -> Sequence[int]:
    """`limit` of `count` indices, ascending. Hashes decide, so every machine and every version of Python chooses the same."""
    if limit is None or limit >= count:
        return range(count)

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{index}".encode()).digest()

    return sorted(sorted(range(count), key=rank)[:limit])


def _folder(folder: Path) -> list[Example | Unusable]:
    """Every picture below a folder, sorted by path; names that begin with a dot are left out."""
    paths: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root) / name for name in files if not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES)]
    if not paths:
        raise FastVLMError(f"{folder} has no pictures ({', '.join(PICTURE_SUFFIXES)})", f"give {ACCEPTED}")
    return [Example(str(path.relative_to(folder)), path, None, ()) for path in sorted(paths)]


def _find_pictures(path: Path, parsed: Parsed, images: Path | None) -> list[Example | Unusable]:
    """Turn names into paths: by the first layout in which any of the first thousand pictures exists."""
    names = [row.picture for row in parsed.rows if isinstance(row, Row)][:1000]
    if not names:
        return [row for row in parsed.rows if isinstance(row, Unusable)]
    folder = path.parent if images is None else images
    layouts = [functools.partial(_place, folder / below, flat) for flat in (False, True) for below in ("", *parsed.folders)]
    place = next((layout for layout in layouts if any(os.path.isfile(layout(name)) for name in names)), None)
    if place is None:
        mend = "give their folder with --images DIR" if images is None else "give another folder with --images DIR"
        raise FastVLMError(f"none of the pictures of {path}, such as {names[0]}, is in {folder}", mend)
    return [
        row if isinstance(row, Unusable) else Example(row.id, place(row.picture), row.prompt, row.answers, row.kind) for row in parsed.rows
    ]


def _place(folder: Path, flat: bool, name: str) -> Path:
    return folder / (Path(name).name if flat else name)


def _webdataset(path: Path) -> list[Example | Unusable]:
    """Samples of an uncompressed tar: consecutive members whose names agree up to the first dot after the last slash.

    https://github.com/webdataset/webdataset (README, "The WebDataset Format"). A `json` member has the fields of a line of JSON lines; a
    `txt` member is the answer, because published sets put the caption there.
    """
    items: list[Example | Unusable] = []
    key = ("", "")
    members: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                base, dot, extension = name.partition(".")
                if not member.isfile() or not dot or not base:
                    continue
                if (folder, base) != key:
                    if members:
                        items.append(_sample(path, archive, members))
                    key, members = (folder, base), {}
                members[extension.lower()] = member
            if members:
                items.append(_sample(path, archive, members))
    except (tarfile.TarError, EOFError) as error:
        raise FastVLMError(f"{path} is not a readable, uncompressed tar ({error})", "copy it again, or uncompress it") from None
    if not any(isinstance(item, Example) for item in items):
        raise FastVLMError(f"{path} has no pictures ({', '.join(PICTURE_SUFFIXES)})", f"give {ACCEPTED}")
    return items


def _sample(path: Path, archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> Example | Unusable:
    first = next(iter(members.values())).name
    picture = next((member for extension, member in members.items() if f".{extension}".endswith(PICTURE_SUFFIXES)), None)
    if picture is None:
        return Unusable(first, "no picture")
    fields: Any = {}
    try:
        if "json" in members:
            fields = parse_json(_text_of(archive, members["json"]))
        if "txt" in members and isinstance(fields, dict) and not {"answer", "answers", "conversations"} & set(fields):
            fields["answer"] = _text_of(archive, members["txt"]).strip()
    except ValueError as error:
        return Unusable(first, f"its text cannot be read: {error}")
    if isinstance(fields, dict):
        fields["image"] = picture.name  # the picture of a sample is the one beside it
    row = from_fields(fields, picture.name.rpartition(".")[0])
    if isinstance(row, Unusable):
        return row
    load = functools.partial(_read_part, path, picture.offset_data, picture.size)
    return Example(row.id, ArchivedPicture(f"{path.name}/{picture.name}", load), row.prompt, row.answers, row.kind)


def _text_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    return "" if file is None else file.read().decode("utf-8-sig")


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
