"""The demo checkpoint that comes with the project: small, native, the same in transformers, and right about pictures it never saw."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from examples.demo.renew import write_pictures
from fastvlm_edge import FastVLM
from fastvlm_edge.commands import demo
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.inputs.preprocess import preprocess
from fastvlm_edge.model_dir.manifest import PRECISIONS, read_manifest, sha256

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "demo" / "fastvlm-demo"
RECORD = ROOT / "benchmarks" / "results" / "demo_accuracy.json"
COUNT = 120


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, Any]]]:
    """Pictures and questions as the scene command writes them, from the held-out split."""
    folder = tmp_path_factory.mktemp("scenes")
    command = [sys.executable, "-m", "examples.demo_training.scenes", "--seed", "77", "--count", str(COUNT), "--out", str(folder)]
    subprocess.run([*command, "--split", "heldout"], check=True, capture_output=True, cwd=ROOT)
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [(folder / question["image"], question) for question in map(json.loads, lines)]


@pytest.fixture(scope="module", params=PRECISIONS)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastVLM]:
    output = tmp_path_factory.mktemp("models") / request.param
    convert(str(CHECKPOINT), output, precision=request.param)
    with FastVLM.load(output, threads=2) as loaded:
        yield loaded


def test_the_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 12e6


def test_answers_are_right_in_every_precision(vlm: FastVLM, scenes: list[tuple[Path, dict[str, Any]]]) -> None:
    right = [vlm.generate(question["prompt"], image=picture, max_new_tokens=16).text == question["answer"] for picture, question in scenes]
    least = 0.75 if vlm.manifest.precision == "int4" else 0.85
    assert np.mean(right) >= least, f"{np.mean(right):.3f} of {len(right)}"


def test_transformers_gives_the_same_answers(tmp_path: Path, scenes: list[tuple[Path, dict[str, Any]]]) -> None:
    import torch

    from tests.support.timm_reference import load_reference

    convert(str(CHECKPOINT), tmp_path / "model", precision="fp32")
    reference = load_reference(CHECKPOINT)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    tokens = reference.config.image_seq_length
    with FastVLM.load(tmp_path / "model", threads=2) as vlm:
        for picture, question in scenes[:12]:
            text = (
                f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{'<image>' * tokens}\n"
                f"{question['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            )
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
            pixels = torch.from_numpy(preprocess(picture, vlm.manifest.vision.image_size, "pad"))
            with torch.inference_mode():
                out = reference.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=16, do_sample=False
                )
            expected = tokenizer.decode(out[0, ids.shape[1] :].tolist())
            assert vlm.generate(question["prompt"], image=picture, max_new_tokens=16).text == expected


def test_the_recorded_accuracy_is_that_of_this_file() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["model_sha256"] == sha256(CHECKPOINT / "model.safetensors")
    assert record["count"] >= 2000


def test_the_packaged_model_answers_as_todays_conversion(tmp_path: Path, scenes: list[tuple[Path, dict[str, Any]]]) -> None:
    """If it does not, run: python -m examples.demo.renew."""
    today = convert(str(CHECKPOINT), tmp_path / "model", precision=demo.PRECISION)
    packaged = read_manifest(demo.MODEL)
    assert packaged.source.files == today.source.files
    assert set(packaged.files) == set(today.files) and packaged.plan == today.plan and packaged.text == today.text
    packaged_questions = map(json.loads, demo.QUESTIONS.read_text(encoding="utf-8").splitlines())
    asked = [*((demo.HOME / question["image"], question) for question in packaged_questions), *scenes]
    with FastVLM.load(demo.MODEL, "ort", threads=2) as old, FastVLM.load(tmp_path / "model", "ort", threads=2) as new:
        for picture, question in asked:
            replies = [vlm.generate(question["prompt"], image=picture, max_new_tokens=16).token_ids for vlm in (old, new)]
            assert replies[0] == replies[1], (picture.name, question["prompt"])


def test_the_packaged_pictures_are_those_that_the_generator_draws(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    assert (tmp_path / demo.QUESTIONS.name).read_text() == demo.QUESTIONS.read_text()
    for path in tmp_path.glob("*.jpg"):
        drawn, packaged = (np.asarray(Image.open(file), dtype=np.float32) for file in (path, demo.HOME / path.name))
        assert np.abs(drawn - packaged).mean() < 2  # another libjpeg rounds differently
    assert len(list(tmp_path.glob("*.jpg"))) == len(list(demo.HOME.glob("*.jpg"))) == 3
