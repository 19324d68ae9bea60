"""`build --static` and `--max-batch` with the real TensorRT for RTX: what is written, recorded, and built again. No engine runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from examples.checkpoints.random_decoder import write_decoder
from fastvlm_edge import FastVLMError
from fastvlm_edge.backends.engine_files import static_part
from fastvlm_edge.cli import main
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.engines.build import Options, build, read_layers
from fastvlm_edge.engines.layers import parse_listing
from fastvlm_edge.engines.profiles import STATIC_IDS, static_capacities, static_profiles
from fastvlm_edge.model_dir.engine_record import EngineRecord, read_record
from fastvlm_edge.nvidia.tensorrt_library import BuildSettings, find_library
from tests.support.checkpoints import write_checkpoint

pytest.importorskip("tensorrt_rtx")
DECODER = [static_part(kind, capacity) for capacity in (256, 512) for kind in ("prefill", "decode")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("source") / "tiny-fastvlm", layout="native")
    output = tmp_path_factory.mktemp("models") / "tiny"
    convert(str(checkpoint), output, precision="int8", context=512)
    return output


@pytest.fixture
def model(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTVLM_EDGE_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(tiny, tmp_path / "model")


def build_static(model: Path, tmp_path: Path, *capacities: int, **options: bool) -> EngineRecord:
    return build(model, "sm86", Options(static=True, capacities=capacities, cache=tmp_path / "cache", **options))


def test_static_engines_are_two_for_each_capacity(model: Path, tmp_path: Path) -> None:
    record = build_static(model, tmp_path, 200)  # rounded up to 256; the context is 512
    folder = model / "engines" / "sm86"
    assert sorted(record.files) == sorted(f"{part}.engine" for part in ("vision", *DECODER))
    assert all((folder / name).stat().st_size == entry.bytes for name, entry in record.files.items())
    assert (record.flags["static"], record.flags["max_batch"]) == (True, 1)
    assert [record.profiles[part][0]["input_ids"] for part in DECODER] == [[[1, 512]] * 3, [[1, STATIC_IDS]] * 3] * 2
    assert [record.profiles[part][0]["past_key_values.0.key"][0][2] for part in DECODER] == [256, 256, 512, 512]
    assert read_record(folder) == record


def test_static_engines_have_no_dynamic_size(model: Path, tmp_path: Path) -> None:
    build_static(model, tmp_path, report=True)
    for part, layers in read_layers(model / "engines" / "sm86").items():
        sizes = [tensor.shape for layer in layers for tensor in (*layer.inputs, *layer.outputs)]
        assert sizes and all(size > 0 for shape in sizes for size in shape), part
        assert part == "vision" or not any(layer.widens_weights for layer in layers), part


def test_one_id_or_one_position_would_write_integer_matrices_out(tmp_path: Path) -> None:
    """Why STATIC_IDS is 2, and why a decode profile takes more than one of each (docs/tensorrt.md)."""
    manifest = write_decoder(tmp_path, "int8", size="0.5b", layers=2, vocab=8704)
    (decode,) = static_profiles(manifest, (1024,))[static_part("decode", 1024)]
    assert decode["input_ids"][0] == decode["logit_positions"][0] == (1, STATIC_IDS)

    def written_out(ids: int, positions: int) -> int:
        sizes = {"input_ids": ids, "position_ids": ids, "logit_positions": positions}
        profile = {**decode, **{name: ((1, size),) * 3 for name, size in sizes.items()}}
        built = find_library(("tensorrt_rtx",)).build(tmp_path / "decoder.onnx", BuildSettings((profile,), ((8, 6),)))
        return sum(layer.widens_weights for layer in parse_listing(built.listing))

    assert written_out(2, 2) == written_out(16, 16) == 0
    assert written_out(1, 1) > written_out(2, 1) > 0


def test_static_engines_are_up_to_date_until_their_shapes_change(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = build_static(model, tmp_path)
    assert build_static(model, tmp_path) == first
    assert sorted(build_static(model, tmp_path, 256).files) != sorted(first.files)
    dynamic = build(model, "sm86", Options(cache=tmp_path / "cache"))
    assert sorted(dynamic.files) == ["decoder.engine", "vision.engine"]
    assert not list((model / "engines" / "sm86").glob("decoder.*.engine"))
    again = build_static(model, tmp_path)
    assert {part: again.build[part]["cached"] for part in again.profiles} == dict.fromkeys(again.profiles, True)


def test_engines_for_several_conversations_build(model: Path, tmp_path: Path) -> None:
    for separate in (False, None):
        record = build(model, "sm86", Options(max_batch=4, separate_profiles=separate, cache=None, report=True))
        assert record.flags["max_batch"] == 4
        assert len(record.profiles["decoder"]) == (1 if separate is False else 2), "two profiles are the default for several conversations"
        decode = record.profiles["decoder"][-1]
        assert [shapes[2][0] for name, shapes in sorted(decode.items()) if name != "image_features"] == [4] * (len(decode) - 1)
        assert not any(layer.widens_weights for layer in read_layers(model / "engines" / "sm86")["decoder"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--capacities", "256"], "--capacities is for --static"),
        (["--static", "--max-batch", "2"], "cannot be combined"),
        (["--static", "--profiles", "1"], "cannot be combined"),
        (["--static", "--capacities", "256,0"], "0 is not a positive number"),
        (["--max-batch", "0"], "0 is not a positive number"),
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tmp_path), *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("context", "wanted", "capacities"),
    [(4096, (), (1024, 4096)), (512, (), (512,)), (1024, (), (1024,)), (4000, (200, 1025, 9000), (256, 1536, 4096)), (100, (5,), (128,))],
)
def test_the_whole_context_is_always_a_capacity(context: int, wanted: tuple[int, ...], capacities: tuple[int, ...]) -> None:
    assert static_capacities(context, wanted) == capacities


def test_a_failed_static_build_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvlm_edge.nvidia.tensorrt_library import Library

    real, count = Library.build, 0

    def fail(self: Library, *arguments: object, **named: object) -> object:
        nonlocal count
        count += 1
        if count == 4:
            raise FastVLMError("no kernel")
        return real(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Library, "build", fail)
    with pytest.raises(FastVLMError, match="no kernel"):
        build_static(model, tmp_path, 256)
    assert not (model / "engines" / "sm86").exists() and not list((model / "engines").glob("*"))
