"""Pictures, with questions or without, from wherever they lie -> `Dataset`: what calibration looks at and what `eval` asks.

Pictures are opened one at a time, when they are needed. What cannot be used is counted, named and skipped.
"""

from __future__ import annotations

import functools
import hashlib
import json
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

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class LazyPicture:
    """A picture that is no file of its own."""

    name: str
    load: Callable[[], ImageInput]


@dataclass(frozen=True)
class Example:
    """A picture, and the question about it where there is one. `kind` groups results and may be empty."""

    id: str
    image: Path | LazyPicture
    prompt: str | None
    answers: tuple[str, ...]
    kind: str = ""

    @property
    def picture(self) -> str:
        """What to call the picture."""
        return self.image.name if isinstance(self.image, LazyPicture) else str(self.image)

    def load_image(self) -> Image.Image:
        """Open and decode the picture: mode RGB, upright. Raises FastVLMError that names it."""
        if isinstance(self.image, Path):
            return load_rgb(self.image)
        try:
            return load_rgb(self.image.load())
        except FastVLMError as error:
            raise FastVLMError(f"{self.image.name}: {error}") from None


class Dataset:
    """The chosen examples of a source, in its order. `skipped` grows while they are read."""

    def __init__(self, source: str, format: str, items: Sequence[Example | Unusable], *, limit: int | None = None, seed: int = 0) -> None:
        """Use `open_data`."""
        self.source = source
        self.format = format
        """`pictures`, `jsonl`, `json`, `llava`, `webdataset`, `textvqa`, `docvqa`, `chartqa` or `vqav2`."""
        self.total = len(items)
        """How many the source has, chosen or not."""
        self.skipped: list[Unusable] = []
        self._items = items
        self._order = choose(len(items), limit, seed)

    def __len__(self) -> int:
        """How many were chosen."""
        return len(self._order)

    def examples(self) -> Iterator[Example | Unusable]:
        """The chosen ones, without opening a picture."""
        return (self._items[index] for index in self._order)

    def read(self, *, minimum: int = 1) -> Iterator[tuple[Example, Image.Image]]:
        """Each usable example with its picture.

        Raises FastVLMError as soon as it is certain that fewer than `minimum` are left, or that more than half cannot be used.
        """
        self.skipped.clear()
        if len(self) < minimum:
            raise FastVLMError(f"{self.source} has {len(self)} examples and at least {minimum} are needed; add more, or raise the limit")
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
        """Count an example as unusable. Raises FastVLMError when that is one too many."""
        self.skipped.append(Unusable(name, reason))
        bad, first = len(self.skipped), self.skipped[0]
        shown = f"the first is {first.id} ({first.reason})"
        if 2 * bad > len(self):
            raise FastVLMError(f"more than half of the {len(self)} examples of {self.source} cannot be used; {shown}")
        if len(self) - bad < minimum:
            raise FastVLMError(f"{bad} of the {len(self)} examples of {self.source} cannot be used and {minimum} are needed; {shown}")

    def describe(self) -> str:
        """How many of how many, of what."""
        count = str(len(self)) if len(self) == self.total else f"{len(self)} of {self.total}"
        return f"{count} examples of {self.source} ({self.format})"

    def summary(self) -> str:
        """`describe`, and after reading also how many were used and which were not."""
        if not self.skipped:
            return self.describe()
        named = "; ".join(f"{item.id}: {item.reason}" for item in self.skipped[:3])
        more = f"; and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
        return f"{self.describe()}, {len(self) - len(self.skipped)} used, {len(self.skipped)} skipped ({named}{more})"


def open_data(source: str | os.PathLike[str], *, images: Path | None = None, limit: int | None = None, seed: int = 0) -> Dataset:
    """Recognise a source of pictures and questions.

    `images` is the folder of the pictures where they do not lie beside the file. `limit` chooses that many, the same for the same `seed`;
    a larger limit chooses those of a smaller one and more.
    Raises FastVLMError for what is missing, damaged or of an unknown format.
    """
    source = os.fspath(source)
    if limit is not None and limit < 1:
        raise FastVLMError(f"the limit is {limit}; give a whole number of at least 1")
    if images is not None and not images.is_dir():
        raise FastVLMError(f"{images} is not a folder; give the folder of the pictures with --images DIR")
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
    """`limit` of `count` indices, ascending. By hash, so the choice is the same on every machine and with every version of Python."""
    if limit is None or limit >= count:
        return range(count)

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{index}".encode()).digest()

    return sorted(sorted(range(count), key=rank)[:limit])


def _folder(folder: Path) -> list[Example | Unusable]:
    """Every picture below a folder, sorted by path; what begins with a dot is left out."""
    paths: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root) / name for name in files if not name.startswith(".") and name.lower().endswith(PICTURES)]
    if not paths:
        raise FastVLMError(f"{folder} has no pictures ({', '.join(PICTURES)}); --data takes {ACCEPTED}")
    return [Example(str(path.relative_to(folder)), path, None, ()) for path in sorted(paths)]


def _find_pictures(path: Path, parsed: Parsed, images: Path | None) -> list[Example | Unusable]:
    """Names become paths. Where the pictures lie is settled by the first layout under which any of the first thousand exists."""
    names = [row.picture for row in parsed.rows if isinstance(row, Row)][:1000]
    if not names:
        return [row for row in parsed.rows if isinstance(row, Unusable)]
    folder = path.parent if images is None else images
    layouts = [functools.partial(_place, folder / below, flat) for flat in (False, True) for below in ("", *parsed.folders)]
    place = next((layout for layout in layouts if any(layout(name).is_file() for name in names)), None)
    if place is None:
        remedy = "give their folder with --images DIR" if images is None else "give another folder with --images DIR"
        raise FastVLMError(f"none of the pictures of {path}, such as {names[0]}, is in {folder}; {remedy}")
    return [
        row if isinstance(row, Unusable) else Example(row.id, place(row.picture), row.prompt, row.answers, row.kind) for row in parsed.rows
    ]


def _place(folder: Path, flat: bool, name: str) -> Path:
    return folder / (Path(name).name if flat else name)


def _webdataset(path: Path) -> list[Example | Unusable]:
    """Samples of an uncompressed tar: consecutive members whose names agree up to the first dot after the last slash.

    https://github.com/webdataset/webdataset (README, "The WebDataset Format"). A `json` member is read as a line of our JSON lines would
    be; a `txt` member is the answer, as it is the caption in published sets.
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
        raise FastVLMError(f"{path} is not a readable, uncompressed tar ({error}); copy it again, or unpack the compression") from None
    if not any(isinstance(item, Example) for item in items):
        raise FastVLMError(f"{path} has no pictures ({', '.join(PICTURES)}); --data takes {ACCEPTED}")
    return items


def _sample(path: Path, archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> Example | Unusable:
    first = next(iter(members.values())).name
    picture = next((member for extension, member in members.items() if f".{extension}".endswith(PICTURES)), None)
    if picture is None:
        return Unusable(first, "no picture")
    fields: Any = {}
    try:
        if "json" in members:
            fields = json.loads(_text_of(archive, members["json"]))
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
    return Example(row.id, LazyPicture(f"{path.name}/{picture.name}", load), row.prompt, row.answers, row.kind)


def _text_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    return "" if file is None else file.read().decode("utf-8-sig")


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
