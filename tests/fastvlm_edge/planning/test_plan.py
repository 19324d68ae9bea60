"""`fastvlm-edge plan`: predictions follow from work and board, and the command says what fits. The fit is tested in tests/benchmarks."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge.cli import main
from fastvlm_edge.commands.plan import predict_one
from fastvlm_edge.machine.boards.rates import BOARDS
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.planning.predict import activation_bytes
from fastvlm_edge.planning.recommend import recommend
from fastvlm_edge.planning.workload import (
    FP16,
    INT4,
    INT8,
    PRECISIONS,
    SIZES,
    VisionShape,
    decode_bytes,
    prefill_macs,
    vision_work,
)
from tests.support.fake_model import build_model

# Work ---------------------------------------------------------------------------------------------------------------------------


def test_the_encoder_has_the_multiply_accumulates_that_were_counted_elsewhere() -> None:
    """243.4 and 59.6 billion at 1024 and 512 px without the projector (fvcore on the reference code), 122.7 million parameters."""
    for image_size, billions in ((512, 59.6), (1024, 243.4)):
        work = vision_work(VisionShape(), 896, image_size)
        projector = (image_size // 64) ** 2 * (3072 * 896 + 896**2)
        assert (work.dense + work.grouped - projector) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert work.weights - 3072 * 896 - 896**2 == pytest.approx(122_714_208, rel=3e-3), "but for biases and norms"


def test_matrices_of_the_released_decoders() -> None:
    """Parameters of layers and head by the checkpoints' tensor lists, without norms and biases."""
    for size, layers, embedding in (
        ("0.5b", 357_898_112, 136_134_656),
        ("1.5b", 1_310_340_608, 233_373_696),
        ("7b", 6_525_621_760, 544_997_376),
    ):
        text = SIZES[size].text
        assert text.head == embedding
        assert text.body == pytest.approx(layers, rel=3e-4)


def test_bytes_of_a_token_and_products_of_a_prompt() -> None:
    text = SIZES["0.5b"].text
    assert text.cache_bytes(1) == 12_288
    assert decode_bytes(text, FP16, FP16, 0) == 2 * (text.body + text.head)
    assert decode_bytes(text, INT4, INT8, 100) == text.body * (0.5 + 2 / 128) + text.head + 100 * 12_288
    assert prefill_macs(text, 290) - prefill_macs(text, 0) == 290 * text.body + 2 * 24 * 896 * 290**2


# Predictions --------------------------------------------------------------------------------------------------------------------


def test_predictions_follow_from_work_and_board() -> None:
    nano, shape = BOARDS["orin-nano"], SIZES["0.5b"]
    slow, fast = (predict_one(shape, nano, nano.mode(name), "int4", 1024, 2048) for name in ("15W", "MAXN_SUPER"))
    assert slow.ttft_ms > fast.ttft_ms
    assert slow.tokens_per_second < fast.tokens_per_second
    limit = nano.mode("MAXN_SUPER").bandwidth / decode_bytes(shape.text, INT4, INT8, 354)
    assert 0.5 * limit < fast.tokens_per_second < limit
    by_precision = [predict_one(shape, nano, nano.mode(None), name, 1024, 2048) for name in ("fp16", "int8", "int4")]
    for more, less in itertools.pairwise(by_precision):
        assert more.tokens_per_second < less.tokens_per_second
        assert more.run_bytes > less.run_bytes and more.build_bytes > less.build_bytes
        assert more.joules_per_token > less.joules_per_token
    long = predict_one(shape, nano, nano.mode(None), "int4", 1024, 32768)
    assert long.cache_bytes - by_precision[2].cache_bytes == 12_288 * (32768 - 2048)
    assert long.run_bytes - by_precision[2].run_bytes > 12_288 * (32768 - 2048), "the mask grows too"
    assert predict_one(shape, nano, nano.mode(None), "int4", 1536, 2048).ttft_ms > fast.ttft_ms


def test_scratch_memory_is_that_of_the_recorded_engines() -> None:
    record = json.loads((Path(__file__).parents[3] / "benchmarks" / "results" / "engine_builds.json").read_text(encoding="utf-8"))
    rows = [row for row in record["results"] if row["graph"] == "after" and row["profiles"] != "two profiles, the second for one row"]
    assert len(rows) >= 10
    for row in rows:
        shape = SIZES[row["size"]]
        built = replace(shape, text=replace(shape.text, layers=row["layers"]))
        predicted = activation_bytes(built, 256, 4096, fused=row["precision"] != "fp32")
        assert row["scratch_bytes"] == pytest.approx(predicted, rel=0.12), row


@pytest.mark.parametrize(
    ("size", "layers", "wide", "context", "measured"),
    [
        ("0.5b", 2, 1, 4096, 270_270_464),
        ("0.5b", 2, 1, 8192, 505_937_920),
        ("0.5b", 4, 3, 4096, 272_499_200),
        ("0.5b", 4, 2, 4096, 338_558_976),
        ("0.5b", 24, 8, 4096, 343_540_224),
        ("7b", 2, 1, 2048, 277_053_952),
        ("7b", 2, 2, 4096, 484_475_392),
        ("7b", 4, 2, 4096, 558_694_912),
    ],
)
def test_scratch_memory_of_layers_with_fp32_scores(size: str, layers: int, wide: int, context: int, measured: int) -> None:
    """Measured with TensorRT for RTX 1.7.1 for SM 8.6; tests/engines/test_kernel_budgets.py compares the prediction with the builder."""
    shape = SIZES[size]
    built = replace(shape, text=replace(shape.text, layers=layers, fp32_scores=wide))
    assert activation_bytes(built, 256, context) == pytest.approx(measured, rel=0.02)


def test_the_range_of_integers_reaches_down_to_fp16() -> None:
    board = BOARDS["orin-nano"]
    fp16, int4 = (predict_one(SIZES["0.5b"], board, board.mode(None), name, 1024, 2048) for name in ("fp16", "int4"))
    assert int4.tokens_per_second_range[0] == pytest.approx(fp16.tokens_per_second_range[0])
    assert int4.tokens_per_second_range[1] > int4.tokens_per_second > fp16.tokens_per_second


def test_the_recommendation_is_the_most_accurate_that_is_quick_and_fits() -> None:
    nano = BOARDS["orin-nano"]

    def of(size: str) -> tuple[str | None, str]:
        chosen, why = recommend([predict_one(SIZES[size], nano, nano.mode(None), name, 1024, 4096) for name in ("fp16", "int8", "int4")])
        return chosen.precision if chosen else None, why

    assert of("0.5b")[0] == "fp16"
    precision, why = of("7b")
    assert precision == "int4" and "swap" in why


def test_what_does_not_fit_says_what_to_change() -> None:
    nano = BOARDS["orin-nano"]
    chosen, why = recommend([predict_one(SIZES["7b"], nano, nano.mode(None), "fp16", 1024, 4096)])
    assert chosen is None
    assert "17.2 GB" in why and "--context" not in why, "the weights alone are too much"
    chosen, why = recommend([predict_one(SIZES["7b"], nano, nano.mode(None), "int4", 1024, 65536)])
    assert chosen is None and "a smaller --context" in why


# The command --------------------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "1.5b", "--target", "orin-nano", "--power", "25w"]) == 0
    table = capsys.readouterr().out
    assert "25W" in table and "A prediction, not yet run on hardware" in table and "Recommended: " in table
    assert main(["plan", "1.5b", "--target", "thor", "--json", "--image-size", "512", "--context", "1024"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prediction"] is True
    assert [row["precision"] for row in document["rows"]] == ["fp16", "int8", "int4"]
    assert document["recommended"] == {"precision": "fp16", "image_size": 512, "context": 1024}
    low, high = document["rows"][0]["ttft_range_ms"]
    assert low < document["rows"][0]["ttft_ms"] < high
    assert document["rows"][0]["ttft_ms"] == pytest.approx(document["rows"][0]["vision_ms"] + document["rows"][0]["prefill_ms"], abs=0.01)


def test_several_sizes_have_a_row_each_and_share_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    nano, shape = BOARDS["orin-nano"], SIZES["0.5b"]

    def document(sizes: str) -> dict[str, Any]:
        assert main(["plan", "0.5b", "--target", "orin-nano", "--precision", "int4", "--json", "--image-size", sizes]) == 0
        return dict(json.loads(capsys.readouterr().out))

    one, several, reverse = document("1024"), document("1024,512,256"), document("256,1024,512")
    assert one["rows"][0]["run_bytes"] == several["rows"][0]["run_bytes"] == reverse["rows"][0]["run_bytes"], "all share the weights"
    large = activation_bytes(shape, 1536, 4096) - activation_bytes(shape, 1024, 4096)
    assert document("256,1536")["rows"][0]["run_bytes"] - one["rows"][0]["run_bytes"] == pytest.approx(large, abs=1)
    assert several["rows"][0]["ttft_ms"] == one["rows"][0]["ttft_ms"] > reverse["rows"][0]["ttft_ms"]
    assert [(row["image_size"], row["visual_tokens"]) for row in several["image_sizes"]] == [(1024, 256), (512, 64), (256, 16)]
    alone = [predict_one(shape, nano, nano.mode(None), "int4", size, 4096).ttft_ms for size in (1024, 512, 256)]
    assert [row["ttft_ms"] for row in several["image_sizes"]] == pytest.approx(alone, abs=0.001)
    assert one["image_sizes"] == several["image_sizes"][:1]

    assert main(["plan", "0.5b", "--target", "orin-nano", "--image-size", "1024,512"]) == 0
    table = capsys.readouterr().out
    assert "Memory is that of all image sizes; the times are those of the first:" in table
    assert [line.split()[:2] for line in table.splitlines() if line.split()[0] in ("1024", "512")] == [["1024", "256"], ["512", "64"]]


def test_a_model_directory_with_several_sizes_is_planned_with_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(build_model(tmp_path / "model", other_sizes=[512, 128]))
    decoder = replace(manifest.decoder, heads=4, intermediate=64)
    vision = replace(manifest.vision, dims=[16, 32, 64, 128, 256], depths=[1, 2, 2, 1, 1], out_dim=512, se_dim=32)
    replace(manifest, decoder=decoder, vision=vision).write(tmp_path / "model")
    assert main(["plan", str(tmp_path / "model"), "--target", "thor", "--json"]) == 0
    assert [row["image_size"] for row in json.loads(capsys.readouterr().out)["image_sizes"]] == [256, 512, 128]


def test_a_model_that_fits_nowhere_ends_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "7b", "--target", "orin-nano", "--precision", "fp16"]) == 1
    assert "fp16 does not fit; --precision int4 fits in 6.1 GB" in capsys.readouterr().out
    assert main(["plan", "7b", "--target", "orin-nano", "--context", "32768"]) == 1
    assert "nothing fits: int4 needs" in capsys.readouterr().out


def test_every_precision_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for precision in PRECISIONS:
        assert main(["plan", "0.5b", "--target", "orin", "--precision", precision]) == 0
        assert f"Recommended: {precision} at 1024 px" in capsys.readouterr().out


def test_a_smaller_context_is_tried_where_the_model_s_own_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvlm_edge.commands.plan.DEFAULT_CONTEXT", 32768)
    assert main(["plan", "7b", "--target", "orin-nano", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recommended"]["context"] == 2048


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["7b", "--target", "thor", "--image-size", "64"], "image size 64 is not supported; choose 128 to 1536"),
        (["7b", "--target", "thor", "--image-size", "2048"], "image size 2048 is not supported; choose 128 to 1536"),
        (["7b", "--target", "thor", "--context", "65536"], "a context of 65536 is longer than the 32768 positions 7b was trained for"),
        (["7b", "--target", "thor", "--context", "300"], "too short for a picture of 256 tokens and a conversation; give at least 320"),
        (["13b", "--target", "thor"], "nor a released size; give a model directory, or one of: 0.5b, 1.5b, 7b"),
        (["7b", "--target", "rtx"], "power modes for target 'rtx' (any GeForce RTX 30, 40 or 50); use one of: orin-nano"),
        (
            ["7b", "--target", "orin-nano", "--power", "7W"],
            "power mode '7W' of Jetson Orin Nano 8 GB; use one of: 15W, 25W, MAXN_SUPER",
        ),
    ],
)
def test_what_cannot_be_planned_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_an_older_manifest_says_to_convert_again(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model_dir), "--target", "thor"]) == 1
    assert "convert the checkpoint again" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_plot_is_drawn(tmp_path: Path, ending: str) -> None:
    assert main(["plan", "0.5b", "--target", "orin", "--plot", str(tmp_path / f"ttft.{ending}")]) == 0
    head = (tmp_path / f"ttft.{ending}").read_bytes()[:64]
    assert head.startswith(b"\x89PNG") if ending == "png" else b"<?xml" in head


def test_a_plot_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "0.5b", "--target", "orin", "--plot", str(tmp_path / "no" / "ttft.png")]) == 1
    assert "could not be written" in capsys.readouterr().err


def test_a_plot_without_matplotlib_names_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", "0.5b", "--target", "orin", "--plot", "x.png"]) == 1
    assert "--plot needs the package matplotlib, which is not installed" in capsys.readouterr().err


def test_planning_needs_neither_torch_nor_onnx() -> None:
    code = (
        "import sys\nfrom fastvlm_edge.cli import main\nassert main(['plan', '0.5b', '--target', 'thor', '--json']) == 0\n"
        "bad = {'torch', 'onnx', 'transformers', 'matplotlib', 'onnxruntime'} & set(sys.modules)\nassert not bad, bad"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
