"""The first code of a bundle that runs on a board: it checks the machine, unpacks what is not unpacked yet, and checks hashes.

The shell header of the bundle runs this text with the Python of the board, before any package is available, so it uses the standard library
only. The header then hands over to `fastvlm_edge/bundle_entry.py`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

SYSTEM = Path("/var/lib/fastvlm-edge")
"""Where root, and so the systemd unit, unpacks. Other users use what they find there."""
INDEX = "bundle.json"
_BLOCK = 1 << 22


class BundleError(Exception):
    """What is wrong and what to do about it, like FastVLMError, which cannot be imported yet."""

    def __init__(self, what: str, mend: str | None = None) -> None:
        super().__init__(what if mend is None else f"{what}; {mend}")
        self.what = what
        self.mend = mend


class Bundle:
    """A bundle file: the index of everything in it, and the bytes."""

    def __init__(self, path: Path, index_sha256: str) -> None:
        """Raises BundleError if the file is cut off, or if its index is not the one that it was made with."""
        self.path = path
        self.index_sha256 = index_sha256
        try:
            self._zip = zipfile.ZipFile(path)
            text = self._zip.read(INDEX)
        except (zipfile.BadZipFile, KeyError):
            raise BundleError(f"{path} is damaged or cut off", "copy it again") from None
        if hashlib.sha256(text).hexdigest() != index_sha256:
            raise BundleError(f"{path} is damaged: its index has another sha256", "copy it again")
        self.index: dict[str, Any] = json.loads(text)
        self._wheels: dict[str, zipfile.ZipFile] = {}

    def files(self, part: str) -> dict[str, dict[str, Any]]:
        """Path below the directory of the part -> where the file is in the bundle, its `sha256` and `bytes`."""
        files: dict[str, dict[str, Any]] = self.index["parts"][part]["files"]
        return files

    def folder(self, part: str) -> str:
        """Name of the directory of a part, by the hash of its contents: bundles of the same model share the unpacked model and engines."""
        return f"{part}-{self.index['parts'][part]['key'][:16]}"

    def open(self, record: dict[str, Any]) -> IO[bytes]:
        """Open a file of the bundle for reading. A file in a wheel is read from the wheel, which is not unpacked first."""
        entry = record["entry"]
        if "member" not in record:
            return self._slice(entry)
        if entry not in self._wheels:
            self._wheels[entry] = zipfile.ZipFile(self._slice(entry))
        return self._wheels[entry].open(record["member"])

    def _slice(self, entry: str) -> IO[bytes]:
        """Open a zip entry in place, since entries are not compressed. Before Python 3.12, seeking in a file of the zip module is slow."""
        info = self._zip.getinfo(entry)
        file = self.path.open("rb")
        file.seek(info.header_offset)
        name, extra = struct.unpack("<26xHH", file.read(30))
        return io.BufferedReader(_Slice(file, info.header_offset + 30 + name + extra, info.file_size), _BLOCK)


class _Slice(io.RawIOBase):
    """The `size` bytes of a file from `begin` on, as a file."""

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._begin + self._at)
        count: int = self._file.readinto(memoryview(buffer)[:room])  # type: ignore[attr-defined]
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def state_folder() -> Path:
    """Where to unpack: `$FASTVLM_EDGE_STATE`, or else /var/lib/fastvlm-edge for root and the cache directory for other users."""
    named = os.environ.get("FASTVLM_EDGE_STATE")
    if named:
        return Path(os.path.abspath(named))
    if os.geteuid() == 0:
        return SYSTEM
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return cache / "fastvlm-edge" / "bundles" if cache.is_absolute() else SYSTEM  # a user without a home


def unpacked(bundle: Bundle, part: str) -> Path | None:
    """Directory of a part that is already unpacked, by this user or by root; None if there is none."""
    for state in (state_folder(), SYSTEM):
        folder = state / bundle.folder(part)
        if folder.is_dir() and os.access(folder, os.R_OK | os.X_OK):
            return folder
    return None


def ensure(bundle: Bundle, part: str, *, hashes: bool, advance: Callable[[int], None] = lambda _bytes: None) -> Path:
    """Directory of a part, which is unpacked once and checked at every start. `advance` is called with the number of newly unpacked bytes.

    With `hashes`, every byte is compared. Otherwise size, time of change and inode are compared with those of the last time that the bytes
    were, and the bytes only if these differ. A file that is damaged or missing is unpacked again. Raises BundleError if the disk is full or
    not writable.
    """
    found = unpacked(bundle, part)
    if found is None:
        found = state_folder() / bundle.folder(part)
        with _locked(found):
            if not found.is_dir():
                _unpack_all(bundle, part, found, advance)
                return found
    bad = _damaged(bundle, part, found, hashes)
    if bad:
        print(f"{bundle.path.name}: {found / bad[0]} is damaged or missing ({len(bad)} in all), unpacking again", file=sys.stderr)
        with _locked(found):
            for name in bad:
                _write(bundle, bundle.files(part)[name], found / name, advance)
            _note_stamps(found, {name: _stamp(found / name) for name in bundle.files(part)})
    return found


def _unpack_all(bundle: Bundle, part: str, folder: Path, advance: Callable[[int], None]) -> None:
    needed = sum(record["bytes"] for record in bundle.files(part).values())
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise _full(folder.parent, f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB free")
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # from a start that was killed: the lock excludes that another process is writing it
    try:
        for name, record in bundle.files(part).items():
            _write(bundle, record, partial / name, advance)
        partial.rename(folder)
        _note_stamps(folder, {name: _stamp(folder / name) for name in bundle.files(part)})
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(bundle: Bundle, record: dict[str, Any], path: Path, advance: Callable[[int], None]) -> None:
    """Unpack one file and hash it on the way. It gets its own name only after it is complete and the hash is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    digest = hashlib.sha256()
    try:
        with bundle.open(record) as source, partial.open("wb") as target:
            while block := source.read(_BLOCK):
                target.write(block)
                digest.update(block)
                advance(len(block))
            target.flush()
            if record["bytes"] > _BLOCK:
                os.fsync(target.fileno())
        if digest.hexdigest() != record["sha256"]:
            raise BundleError(f"{bundle.path} is damaged: {path.name} in it has another sha256", "copy the bundle again")
        partial.replace(path)
    except (zipfile.BadZipFile, EOFError):
        raise BundleError(f"{bundle.path} is damaged at {path.name}", "copy the bundle again") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path.parent, "no partial files were left there") from None
        raise
    finally:
        partial.unlink(missing_ok=True)


def _full(folder: Path, why: str) -> BundleError:
    return BundleError(f"the disk of {folder} is full ({why})", "free some space, or set FASTVLM_EDGE_STATE=DIRECTORY to use another disk")


# Checks -------------------------------------------------------------------------------------------------------------------------


def _damaged(bundle: Bundle, part: str, folder: Path, hashes: bool) -> list[str]:
    """Names of the files that differ from those in the bundle."""
    try:
        stamps = dict(json.loads(_stamps_path(folder).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        stamps = {}
    bad, fresh = [], {}
    for name, record in bundle.files(part).items():
        stamp = fresh[name] = _stamp(folder / name)
        is_whole = stamp is not None and stamp[0] == record["bytes"]
        if is_whole and (hashes or stamps.get(name) != stamp):
            is_whole = _sha256(folder / name) == record["sha256"]
        if not is_whole:
            bad.append(name)
    if fresh != stamps and not bad:
        _note_stamps(folder, fresh)
    return bad


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _stamps_path(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.checked"


def _note_stamps(folder: Path, stamps: dict[str, list[int] | None]) -> None:
    """Remember the stamps of files that were just compared. If the directory is another user's, they are compared again at every start."""
    path = _stamps_path(folder)
    partial = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        partial.write_text(json.dumps(stamps), encoding="utf-8")
        partial.replace(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Of several first starts at the same time one unpacks and the others wait. The lock ends with its process, however that ends."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f"{folder.name}.lock").open("w")
    except OSError as error:
        raise BundleError(
            f"{folder.parent} is not writable ({error.strerror})",
            "set FASTVLM_EDGE_STATE=DIRECTORY to use another one, or run as root",
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting for another process that unpacks {folder.name}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_glibc(index: dict[str, Any]) -> None:
    name, version = platform.libc_ver()
    if name == "glibc" and [int(part) for part in version.split(".")[:2]] < index["glibc"]:
        needed = ".".join(map(str, index["glibc"]))
        raise BundleError(
            f"this bundle needs glibc {needed} ({index['title']}), and this machine has {version}",
            "bundle for a target with an older glibc",
        )


# Start --------------------------------------------------------------------------------------------------------------------------


def start(path: str, index_sha256: str) -> Bundle:
    """Check the machine, unpack the runtime of the bundle at `path` if needed, and put it on `sys.path`."""
    bundle = Bundle(Path(os.path.abspath(path)), index_sha256)
    _check_glibc(bundle.index)
    if unpacked(bundle, "runtime") is None:
        print(f"{os.path.basename(path)}: unpacking the runtime into {state_folder()}, once", file=sys.stderr)
    _set_path(str(ensure(bundle, "runtime", hashes=True)))
    return bundle


def exit_status(path: str, call: Callable[[], int]) -> int:
    """What `call` returns; if it fails, the error is printed in one line and becomes an exit status. `path` is that of the bundle."""
    name = os.path.basename(path)
    try:
        return call()
    except BundleError as error:
        _report(name, error)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not raise again
        return 141
    except OSError as error:
        _report(name, BundleError(f"{error.filename or 'input or output'}: {error.strerror or error}"))
        return 1


def _report(name: str, error: BundleError) -> None:
    """Print the error as the commands do: one line on stderr and, with `--json`, one object on stdout."""
    if "--json" in sys.argv[1:]:
        print(json.dumps({"error": {"message": error.what, "mend": error.mend}}, ensure_ascii=False), flush=True)
    print(f"{name}: error: {error}", file=sys.stderr)


def _set_path(runtime: str) -> None:
    """Put the packages of the bundle first, and those of the system, where JetPack installs TensorRT, last. Child processes inherit it."""
    sys.path.insert(0, runtime)
    for folder in (f"/usr/lib/python{sys.version_info[0]}.{sys.version_info[1]}/dist-packages", "/usr/lib/python3/dist-packages"):
        if folder not in sys.path and os.path.isdir(folder):
            sys.path.append(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([runtime, *(folder for folder in sys.path if folder.endswith("dist-packages"))])
