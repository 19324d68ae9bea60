"""The released sizes with random weights: conversion in every layout, its time and memory, and the answers of transformers."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import skimage.data

from fastvlm_edge import FastVLM
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.inputs.preprocess import preprocess
from fastvlm_edge.model_dir.manifest import read_manifest
from tests.support.checkpoints import write_checkpoint
from tests.test_against_transformers import PROMPT, STEPS, reference_reply

pytestmark = pytest.mark.slow

MEASURED_CONVERSION = """
import json, resource, sys
from pathlib import Path
from fastvlm_edge.convert.pipeline import convert
convert(sys.argv[1], Path(sys.argv[2]), precision=sys.argv[3])
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))
"""


def converted(source: Path, output: Path, precision: str) -> tuple[float, float]:
    """Convert in a process of its own; seconds and peak memory in GiB."""
    began = time.monotonic()
    command = [sys.executable, "-c", MEASURED_CONVERSION, str(source), str(output), precision]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return time.monotonic() - began, json.loads(result.stdout)


@pytest.mark.parametrize("layout", ["apple", "hub", "native"])
@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
def test_every_layout_converts_and_answers(tmp_path: Path, layout: str, size: str) -> None:
    source = write_checkpoint(tmp_path / "ck", layout=layout, size=size)
    seconds, peak = converted(source, tmp_path / "model", "int4")
    manifest = read_manifest(tmp_path / "model")
    print(f"{size} {layout} int4: {seconds:.0f} s, {peak:.2f} GiB, logits {manifest.parity['logits']}")
    if size == "0.5b":
        assert seconds < 120
    assert manifest.vision.tokens == 256
    with FastVLM.load(tmp_path / "model") as vlm:
        assert vlm.generate("What is it?", image=skimage.data.coffee(), max_new_tokens=8).token_ids


def test_7b_converts_to_int4_in_8_gib(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "ck", layout="hub", size="7b", shards=4)
    seconds, peak = converted(source, tmp_path / "model", "int4")
    manifest = read_manifest(tmp_path / "model")
    print(f"7b hub int4: {seconds:.0f} s, {peak:.2f} GiB, logits {manifest.parity['logits']}")
    assert peak <= 8
    assert manifest.decoder.hidden == 3584


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_0_5b_gives_the_tokens_of_transformers(tmp_path: Path, tied: bool) -> None:
    from tokenizers import Tokenizer

    from tests.support.timm_reference import load_reference

    native = write_checkpoint(tmp_path / "ck", layout="native", size="0.5b", tied=tied)
    convert(str(native), tmp_path / "model")
    picture = skimage.data.coffee()
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    expected, features = reference_reply(load_reference(native), tokenizer, preprocess(picture, 1024, "pad"))
    with FastVLM.load(tmp_path / "model") as vlm:
        found = vlm.encode_image(picture).numpy()
        reply = vlm.generate(PROMPT, image=picture, max_new_tokens=STEPS)
    assert abs(found - features).max() / abs(features).max() < 1e-4
    assert len(expected) == STEPS
    assert reply.token_ids == expected


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_0_5b_engines_keep_the_types_of_their_weights(tmp_path: Path, precision: str) -> None:
    """TensorRT for RTX, without a GPU; an engine that is larger than its weights has widened or doubled some."""
    pytest.importorskip("tensorrt_rtx")
    from fastvlm_edge.engines.build import Options, build

    native = write_checkpoint(tmp_path / "ck", layout="native", size="0.5b")
    manifest = convert(str(native), tmp_path / "model", precision=precision)
    record = build(tmp_path / "model", "rtx", Options(cache=None))
    for part, slack in (("vision", 1.35), ("decoder", 1.1)):
        assert record.files[f"{part}.engine"].bytes < slack * manifest.files[f"{part}.weights"].bytes


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_0_5b_with_int8_activations_builds_for_sm86_and_keeps_its_types(
    tmp_path: Path, demo_scenes: Callable[[str, int], Path], precision: str
) -> None:
    """As above, calibrated: Q and DQ around the encoder's products, integers from GPTQ. Half the trained size, to save an hour."""
    pytest.importorskip("tensorrt_rtx")
    from fastvlm_edge.calib.quantizer import Options as Calibration
    from fastvlm_edge.calib.quantizer import Quantizer
    from fastvlm_edge.convert.graphs.placement import check_placement
    from fastvlm_edge.engines.build import Options, build

    native = write_checkpoint(tmp_path / "ck", layout="native", size="0.5b")
    calibrate = Quantizer(Calibration(str(demo_scenes("calibration", 8)), limit=8)).calibrate
    manifest = convert(str(native), tmp_path / "model", precision=precision, image_size=512, calibrate=calibrate)
    assert check_placement(tmp_path / "model" / "vision.onnx").share("INT8") > 0.5
    record = build(tmp_path / "model", "sm86", Options(cache=None))
    for part, slack in (("vision", 1.35), ("decoder", 1.1)):
        assert record.files[f"{part}.engine"].bytes < slack * manifest.files[f"{part}.weights"].bytes
