"""Checkpoints in `.bin` files: the same tensors as in safetensors, in bounded memory, and nothing in them is ever run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_edge.convert.checkpoint.pickles import read_pickle
from fastvlm_edge.errors import FastVLMError
from tests.support.checkpoints import as_pickles, write_checkpoint


class Malicious:
    """Runs a command when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def refuse(path: Path, message: str) -> None:
    with pytest.raises(FastVLMError, match=message) as raised:
        read_pickle(path)
    assert "\n" not in str(raised.value) and raised.value.mend


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["apple", "native"])
def test_the_tensors_are_those_of_safetensors(tmp_path: Path, layout: str, shards: int) -> None:
    expected = open_checkpoint(str(write_checkpoint(tmp_path / "safetensors", layout=layout)))
    checkpoint = open_checkpoint(str(as_pickles(write_checkpoint(tmp_path / "pickles", layout=layout), shards)))
    assert checkpoint.names() == expected.names() and len(checkpoint.weights) == shards and checkpoint.notes == []
    for name in expected.names():
        assert checkpoint.dtype(name) == expected.dtype(name)
        assert checkpoint.tensor(name).tobytes() == expected.tensor(name).tobytes(), name
    name = "llm.embed_tokens.weight"
    assert checkpoint.tensor_rows(name, 100, 107).tobytes() == expected.tensor(name)[100:107].tobytes()
    with pytest.raises(IndexError):
        checkpoint.tensor_rows(name, 600, 10_000)
    files = {path.name for path in checkpoint.weights} | ({"pytorch_model.bin.index.json"} if shards > 1 else set())
    assert files <= checkpoint.hash_files().keys()


def test_views_are_stored_as_they_are_seen(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    torch.save({"turned": whole.T, "part": whole[1:3], "half": torch.tensor(2.5, dtype=torch.bfloat16)}, tmp_path / "x.bin")
    entries = read_pickle(tmp_path / "x.bin")
    assert np.array_equal(entries["turned"].read("turned"), whole.T.numpy())
    assert np.array_equal(entries["turned"].read("turned", (2, 5)), whole.T[2:5].numpy())
    assert np.array_equal(entries["part"].read("part"), whole[1:3].numpy())
    assert entries["half"].shape == () and float(entries["half"].read("half")) == 2.5


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00002-of-00002.bin"])
def test_a_command_in_a_pickle_is_named_and_not_run(tmp_path: Path, name: str) -> None:
    directory = as_pickles(write_checkpoint(tmp_path / "model"), shards=1 if name == "pytorch_model.bin" else 2)
    mark = tmp_path / "was_run"
    tensors = torch.load(directory / name, weights_only=True)
    torch.save(tensors | {"model.norm.weight": Malicious(mark)}, directory / name)
    with pytest.raises(FastVLMError, match=rf"{name} asks for (posix|nt)\.system: it holds more than tensors, and was not opened"):
        open_checkpoint(str(directory))
    assert not mark.exists()
    torch.load(directory / name, weights_only=False)  # as it would be without care
    assert mark.exists()


def test_an_old_format_is_refused_before_pytorch_sees_it(tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": Malicious(mark)}, path, _use_new_zipfile_serialization=False)
    refuse(path, r"is not in the zip format of torch\.save.*older formats can run code when they are opened")
    path.write_bytes(pickle.dumps(Malicious(mark)) + b"PK\x03\x04")
    refuse(path, "is not in the zip format")
    path.write_bytes(b"")
    refuse(path, "is not in the zip format")
    assert not mark.exists()


def _nested(path: Path) -> None:
    torch.save({"optimizer": {"state": torch.ones(2)}}, path)


def _tensor(path: Path) -> None:
    torch.save(torch.ones(2), path)


def _number(path: Path) -> None:
    torch.save({"step": 3}, path)


def _truncated(path: Path) -> None:
    torch.save({"x": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def _archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")


def _script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_nested, "holds 'optimizer', a dict, where tensors are expected"),
        (_tensor, "holds a Tensor, not tensors by name"),
        (_number, "holds 'step', a int, where tensors are expected"),
        (_truncated, "is damaged"),
        (_archive, "is damaged"),
        (_script, "is damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_a_table_of_tensors(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "x.bin")
    refuse(tmp_path / "x.bin", message)


def test_types_that_are_not_supported_are_named(tmp_path: Path) -> None:
    directory = as_pickles(write_checkpoint(tmp_path / "model"))
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    for odd in (torch.ones(128, dtype=torch.int8), torch.ones(128).to_sparse()):
        torch.save(tensors | {"model.norm.weight": odd}, directory / "pytorch_model.bin")
        with pytest.raises(FastVLMError, match=r"tensors of unsupported types: model\.norm\.weight \(.*(int8|sparse)"):
            open_checkpoint(str(directory))


def test_shards_without_an_index_and_shards_that_are_missing(tmp_path: Path) -> None:
    directory = as_pickles(write_checkpoint(tmp_path / "model"), shards=2)
    index = directory / "pytorch_model.bin.index.json"
    listed = json.loads(index.read_text())
    index.unlink()
    with pytest.raises(FastVLMError, match=r"has 2 files pytorch_model\*\.bin but no pytorch_model\.bin\.index\.json"):
        open_checkpoint(str(directory))
    index.write_text(json.dumps({"weight_map": listed["weight_map"] | {"model.extra": "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(FastVLMError, match=r"lists tensor model\.extra"):
        open_checkpoint(str(directory))
    (directory / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FastVLMError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        open_checkpoint(str(directory))


def test_safetensors_come_first_and_pickles_beside_them_are_not_opened(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    (directory / "pytorch_model.bin").write_bytes(b"not a pickle")
    (note,) = open_checkpoint(str(directory)).notes
    assert note.startswith("not used: pytorch_model.bin")


MEASURE = """
import resource, sys
from pathlib import Path
from fastvlm_edge.convert.checkpoint import pickles
pickles.MAPPED_BYTES = 1 << 25
entries = pickles.read_pickle(Path(sys.argv[1]))
next(iter(entries.values())).read("x")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, entry in entries.items():
    entry.read(name)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_file_larger_than_what_is_mapped_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """240 MB in 24 tensors: the process grows by what it maps at once (32 MB) and a few tensors, not by the file."""
    values = torch.zeros(2_500_000)
    torch.save({f"{number}": values + number for number in range(24)}, tmp_path / "x.bin")
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "x.bin"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000, done.stdout  # KiB
