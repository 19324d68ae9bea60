"""The input of a batch -> rows: a picture and a question each, with an id that is unique in the input.

Nothing is opened before it is needed, and neither pictures nor all rows are ever in memory together. `answering.py` answers the rows.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.data import PICTURE_SUFFIXES, ArchivedPicture
from fastvlm_edge.evaluation.formats import Unusable, from_fields
from fastvlm_edge.extras import package_errors
from fastvlm_edge.model_dir.json_record import parse_json
from fastvlm_edge.model_dir.mistaken import is_address, shortened

ACCEPTED = "a folder of pictures, JSON lines (.jsonl), Parquet files (.parquet) or WebDataset shards (.tar)"
_LINES, _PARQUET, _TAR = (".jsonl", ".ndjson"), (".parquet",), (".tar",)
_SHARDS = (*_PARQUET, *_TAR)
_AT_A_TIME = 16
"""Rows of a Parquet file that are in memory together, with their pictures."""
_END = 64 << 10
"""Largest end of a tar in bytes: tar fills its last record with zeros."""
_LOOKED_FOR = 100
"""Rows of which one must have a picture that exists."""
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True)
class Row:
    """A question about a picture."""

    id: str
    image: Path | bytes | ArchivedPicture | None
    """A file, an encoded picture, or a picture in an archive. None only with a `reason`."""
    prompt: str | None
    """Its own question, or that of all rows. None only with a `reason`."""
    reason: str | None = None
    """Why a part of the input cannot be asked. It becomes an error in the results."""
    named: str | None = None
    """The file of the picture as the input names it. It stays the same where the input moves as a whole."""

    def asked(self) -> str:
        """A digest of the picture, by the name that the input gives it or by its bytes, and of the prompt: 16 hexadecimal digits."""
        if isinstance(self.image, bytes):
            picture = hashlib.sha256(self.image).hexdigest()
        else:
            picture = self.image.name if isinstance(self.image, ArchivedPicture) else self.named or str(self.image)
        return hashlib.sha256(json.dumps([picture, self.prompt]).encode()).hexdigest()[:16]


class Reader(Protocol):
    """One file or folder of the input."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def name(self) -> str:
        """What ids say of it. No other reader of the input has it."""

    def rows(self) -> Iterator[Row]:
        """Its rows, in its order."""

    def count(self) -> int | None:
        """Number of its rows, or None if that would take as long as reading it."""


@dataclass(frozen=True)
class Rows:
    """The rows of an input. May be iterated again."""

    source: str
    readers: Sequence[Reader]
    part: tuple[int, int] = (1, 1)
    """Of `shard`."""
    most: int | None = None
    """Of `first`."""

    def __iter__(self) -> Iterator[Row]:
        return itertools.islice(itertools.chain.from_iterable(self._of(reader) for reader in self.readers), self.most)

    def _of(self, reader: Reader) -> Iterator[Row]:
        """The rows of a reader. If it is one of several and fails, the last one says so, in each shard, and the others go on."""
        index, count = self.part
        try:
            for row in reader.rows():
                if count == 1 or shard_of(row.id, count) == index:
                    yield row
        except (FastVLMError, OSError) as error:
            if isinstance(error, OSError):
                error = FastVLMError(f"{reader.path} cannot be read ({error.strerror or error})", "check the disk and the file")
            if len(self.readers) == 1:
                raise error from None
            yield Row(reader.name, None, None, str(error))

    def shard(self, index: int, count: int) -> Rows:
        """The rows of part `index`, 1 to `count`. The id alone decides, so it depends neither on the order nor on the other rows."""
        if not 1 <= index <= count:
            raise FastVLMError(f"the shard is {index}/{count}", f"give 1/{max(count, 1)} to {max(count, 1)}/{max(count, 1)}")
        return replace(self, part=(index, count))

    def first(self, count: int | None) -> Rows:
        """Its first rows, after `shard`; None means all."""
        return replace(self, most=count)

    @cached_property
    def total(self) -> int | None:
        """Number of rows, or None if it is not known without reading all. Of a shard, the number to expect."""
        try:
            counts = [reader.count() for reader in self.readers]
        except (FastVLMError, OSError):
            if len(self.readers) == 1:
                raise
            return None  # `__iter__` makes a row of it
        known = [count for count in counts if count is not None]
        if len(known) < len(counts):
            return None
        expected = round(sum(known) / self.part[1])
        return expected if self.most is None else min(expected, self.most)


def check_askable(rows: Iterator[Row], source: str, *, look: bool = True) -> Iterator[Row]:
    """The same rows. Raises FastVLMError if none of the first can be asked: with a wrong folder or no prompt, all rows would be errors.

    With `look`, the picture of one of them must exist on this machine.
    """
    first = list[Row]()
    gone: Path | None = None
    for row in itertools.islice(rows, _LOOKED_FOR):
        first.append(row if row.reason is None else replace(row, image=None))  # a picture that is not needed takes memory
        if row.reason is None and (not look or not isinstance(row.image, Path) or os.path.exists(row.image)):
            return itertools.chain(first, rows)
        if row.reason is None and isinstance(row.image, Path):
            gone = gone or row.image
    if gone is not None:
        raise FastVLMError(f"none of the first pictures of {source}, such as {gone}, exists", "give their folder with --images DIR")
    if first:
        what = f"none of the first rows of {source} can be asked; the reason of {first[0].id} is: {first[0].reason}"
        raise FastVLMError(what, "give the question with --prompt, or correct the input")
    return iter(first)


def shard_of(id: str, count: int) -> int:
    """The shard, 1 to `count`, of a row: 1 + sha256 of its id in UTF-8, modulo `count`."""
    return 1 + int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest(), "big") % count


def open_rows(source: str | os.PathLike[str], *, prompt: str | None = None, images: Path | None = None) -> Rows:
    """Open the input of a batch.

    `source` is a folder of pictures or of shards, a file, or several files as a pattern (`*`, `?`, `[...]`, `{000..127}`, `{a,b}`).
    `prompt` is the question of all rows that have none. `images` is the folder of the pictures that a file names, if they are not relative
    to the file. Raises FastVLMError if something is missing, or of an unknown format.
    """
    source = os.fspath(source)
    if images is not None and not images.is_dir():
        raise FastVLMError(f"{images} is not a folder", "give the folder of the pictures with --images DIR")
    paths = _paths(source)
    names = [""] if os.path.isdir(source) and paths == [Path(source)] else _names(paths)
    return Rows(source, [_reader(path, name, prompt, images) for path, name in zip(paths, names, strict=True)])


def _names(paths: list[Path]) -> list[str]:
    """What ids say of each file or folder of a pattern: its name, or its path below the common folder where names are there twice."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    whole = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [Path(path).relative_to(common).as_posix() for path in whole]


def _paths(source: str) -> list[Path]:
    """The folder, or the files, that `source` stands for."""
    path = Path(source)
    if path.is_dir():
        names = sorted(os.listdir(path))
        shards = [path / name for name in names if name.lower().endswith(_SHARDS) and not name.startswith(".")]
        if shards and any(name.lower().endswith(PICTURE_SUFFIXES) for name in names):
            raise FastVLMError(
                f"{path} has pictures and shards, such as {shards[0].name}", f'name the shards: "{path}/*{shards[0].suffix}"'
            )
        return shards or [path]
    if path.exists():
        return [path]
    patterns = _without_braces(source)
    if len(patterns) == 1 and not glob.has_magic(source):
        raise FastVLMError(f"{path} does not exist", f"give {ACCEPTED}")
    found = []
    for pattern in patterns:
        files = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern] * os.path.exists(pattern)
        if not files:
            raise FastVLMError(f"{pattern} does not exist", f"correct {source}")
        found += [Path(file) for file in files]
    return found


def _without_braces(pattern: str) -> list[str]:
    """What a shell makes of `{000..127}` and `{a,b}`."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words is None:
        width = len(first) if first.startswith("0") or last.startswith("0") else 0
        words = ",".join(f"{number:0{width}}" for number in range(int(first), int(last) + 1))
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [whole for word in words.split(",") for whole in _without_braces(before + word + after)]


def _reader(path: Path, name: str, prompt: str | None, images: Path | None) -> Reader:
    folder = path.parent if images is None else images
    if path.is_dir():
        return Folder(path, name, prompt)
    if not path.is_file():
        raise FastVLMError(f"{path} is not a file", f"give {ACCEPTED}")
    suffix = path.suffix.lower()
    if suffix in _LINES:
        return JsonLines(path, name, prompt, folder)
    if suffix in _PARQUET:
        with package_errors("Parquet files need"):
            import pyarrow.parquet  # noqa: F401  # before the first file is read
        return Parquet(path, name, prompt, folder)
    if suffix in _TAR:
        return WebDataset(path, name, prompt)
    raise FastVLMError(f"{path} has an unknown suffix", f"give {ACCEPTED}")


# Folders ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """The pictures below a folder, without names that begin with a dot. The id is the path below the folder, with `/`."""

    path: Path
    name: str
    """Begins the ids, unless it is empty."""
    prompt: str | None

    def rows(self) -> Iterator[Row]:
        reason = None if self.prompt is not None else "no prompt"
        folder = os.path.basename(os.path.realpath(self.path))
        for path in self._files():
            below = path.relative_to(self.path)
            yield Row((self.name / below).as_posix(), path, self.prompt, reason, named=(folder / below).as_posix())

    def count(self) -> int:
        count = sum(1 for _ in self._files())
        if not count:
            raise FastVLMError(f"{self.path} has no pictures ({', '.join(PICTURE_SUFFIXES)})", f"give {ACCEPTED}")
        return count

    def _files(self) -> Iterator[Path]:
        """Sorted in each folder, links to folders last. A folder that is met twice is read once."""

        def stop(error: OSError) -> None:
            raise FastVLMError(
                f"{error.filename} cannot be listed ({error.strerror or error})", "make it readable, or move it away"
            ) from None

        seen = set[tuple[int, int]]()
        for root, folders, files in os.walk(self.path, onerror=stop, followlinks=True):
            try:
                here = os.stat(root)
            except OSError as error:
                stop(error)
            if (here.st_dev, here.st_ino) in seen:
                folders.clear()
                continue
            seen.add((here.st_dev, here.st_ino))
            shown = [name for name in folders if not name.startswith(".")]
            folders[:] = sorted(shown, key=lambda name: (os.path.islink(os.path.join(root, name)), name))
            for name in sorted(files):
                if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("."):
                    yield Path(root, name)


# JSON lines ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonLines:
    """One object per line: {id, image, prompt}. A line without an id is known as `FILE:LINE`."""

    path: Path
    name: str
    prompt: str | None
    folder: Path
    """Pictures are relative to it."""

    def rows(self) -> Iterator[Row]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{self.name}:{number}"
                try:
                    text = line.decode("utf-8-sig")
                    if text.strip():
                        yield self._row(parse_json(text), where)
                except ValueError as error:
                    why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    yield Row(where, None, None, f"not JSON ({why})")

    def count(self) -> int:
        with open(self.path, "rb") as file:
            count = sum(1 for line in file if line.strip())
        if not count:
            raise FastVLMError(f"{self.path} is empty", f"give {ACCEPTED}")
        return count

    def _row(self, fields: Any, where: str) -> Row:
        row = from_fields(fields, where)
        if isinstance(row, Unusable):
            return Row(row.id, None, None, row.reason)
        return _about_file(row.id, row.picture, row.prompt or self.prompt, self.folder)


def _about_file(id: str, name: str, prompt: str | None, folder: Path) -> Row:
    """A row about the picture `name` in `folder`."""
    if is_address(name):
        return Row(id, None, prompt, f"{shortened(name)} is an address, and pictures are not downloaded")
    if "\0" in name:
        return Row(id, None, prompt, "its picture is not a path")
    return Row(id, folder / name, prompt, None if prompt is not None else "no prompt", named=name)


# Parquet ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parquet:
    """Columns `id`, `image` and `prompt`. An image is a path, its bytes, or {bytes, path} as in Hugging Face's datasets.

    https://huggingface.co/docs/datasets/about_dataset_features (Image feature). A row without an id is known as `FILE:ROW`, from 1.
    """

    path: Path
    name: str
    prompt: str | None
    folder: Path
    """Pictures are relative to it."""

    def rows(self) -> Iterator[Row]:
        from pyarrow import ArrowException

        with self._open() as file:
            names = file.schema_arrow.names
            wanted = [name for name in ("id", "image", "prompt") if name in names]
            number = 0
            batches = file.iter_batches(batch_size=_AT_A_TIME, columns=wanted)
            while True:
                try:
                    some = next(batches).to_pylist()
                except StopIteration:
                    return
                except (ValueError, OSError, ArrowException) as error:
                    raise self._unreadable(error) from None
                for fields in some:
                    number += 1
                    yield self._row(fields, f"{self.name}:{number}")

    def count(self) -> int:
        with self._open() as file:
            return int(file.metadata.num_rows)

    def _open(self) -> Any:
        from pyarrow import ArrowException, parquet

        try:
            file = parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
        except (ValueError, OSError, ArrowException) as error:
            raise self._unreadable(error) from None
        if "image" not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names[:8])
            raise FastVLMError(f"{self.path} has the columns {columns}, but no column image", "rename the column of the pictures")
        return file

    def _unreadable(self, error: Exception) -> FastVLMError:
        return FastVLMError(f"{self.path} cannot be read as Parquet ({' '.join(str(error).split())})", "copy it or write it again")

    def _row(self, fields: dict[str, Any], where: str) -> Row:
        id = where if fields.get("id") is None else str(fields["id"])
        image, prompt = fields["image"], fields.get("prompt") or self.prompt
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str) and image and isinstance(prompt, (str, type(None))):
            return _about_file(id, image, prompt, self.folder)
        if not isinstance(image, bytes) or not image:
            return Row(id, None, None, "no picture" if not image else f"its picture is a {type(image).__name__}, not a path or bytes")
        if not isinstance(prompt, str):
            return Row(id, image, None, "no prompt" if prompt is None else f"its prompt is a {type(prompt).__name__}")
        return Row(id, image, prompt)


# WebDataset ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WebDataset:
    """An uncompressed tar. Consecutive members whose names agree up to the first dot of the last part are a row, known by that name.

    https://github.com/webdataset/webdataset (README, "The WebDataset Format"). The `prompt` of the `json` member is the question of the
    row. The `txt` member is it only if there is no other, because published sets put the caption there.
    """

    path: Path
    name: str
    prompt: str | None

    def rows(self) -> Iterator[Row]:
        try:
            key = ""
            with tarfile.open(self.path, "r:") as archive:
                for key, members in itertools.groupby(self._members(archive), key=lambda member: _split(member.name)[0]):
                    yield self._row(key, {_split(member.name)[1].lower(): member for member in members})
                end = _read_part(self.path, archive.offset, _END + 1)
                if not end or any(end[: tarfile.BLOCKSIZE]):
                    raise tarfile.ReadError("unexpected end of data")  # which tarfile takes for the end of the archive
                if any(end) or len(end) > _END:
                    raise tarfile.ReadError("more follows its end, as in joined or incomplete archives")
        except (tarfile.TarError, EOFError) as error:
            what = f"{self.path} is not a readable, uncompressed tar ({error})"
            raise FastVLMError(what, "copy it again, or uncompress it") from None
        if not key:
            raise FastVLMError(f"{self.path} has no samples", f"give {ACCEPTED}")

    def count(self) -> None:
        return None

    @staticmethod
    def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            key, extension = _split(member.name)
            if not member.isdir() and extension and not key.endswith("/") and key:
                yield member

    def _row(self, key: str, members: dict[str, tarfile.TarInfo]) -> Row:
        picture = next((member for extension, member in members.items() if f".{extension}".endswith(PICTURE_SUFFIXES)), None)
        if picture is None:
            return Row(key, None, None, f"no picture, only {', '.join(members)}")
        for member in (picture, members.get("json"), members.get("txt")):
            if member is not None and (not member.isfile() or member.issparse()):
                kind = "a link" if member.islnk() or member.issym() else "not a whole file"
                return Row(key, None, None, f"{member.name} is {kind} in the archive")
        image = ArchivedPicture(f"{self.path.name}/{picture.name}", partial(_read_part, self.path, picture.offset_data, picture.size))
        own, caption = None, None
        try:
            if "json" in members:
                fields = parse_json(self._text(members["json"]))
                row = from_fields({**fields, "image": picture.name} if isinstance(fields, dict) else fields, key)
                if isinstance(row, Unusable):
                    return Row(key, image, None, row.reason)
                own = row.prompt
            if "txt" in members:
                caption = self._text(members["txt"]).strip()
        except ValueError as error:
            return Row(key, image, None, f"its text cannot be read ({error})")
        prompt = own or self.prompt or caption
        return Row(key, image, prompt or None, None if prompt else "no prompt")

    def _text(self, member: tarfile.TarInfo) -> str:
        return _read_part(self.path, member.offset_data, member.size).decode("utf-8-sig")


def _split(name: str) -> tuple[str, str]:
    """The key and the extension of a member: `a/b.c.jpg` -> `a/b`, `c.jpg`."""
    folder, slash, file = name.rpartition("/")
    base, _, extension = file.partition(".")
    return f"{folder}{slash}{base}", extension


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
