"""Whatever is given instead of a model directory is called by its name, with the command that was meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.cli import main
from fastvlm_edge.commands import demo
from fastvlm_edge.model_dir.mistaken import hub_id_of

CHECKPOINT = Path(__file__).resolve().parents[3] / "examples" / "demo" / "fastvlm-demo"


@pytest.mark.parametrize(
    ("given", "what", "mend"),
    [
        ("gone", "gone is not a model directory: it does not exist", "check the path, or run: fastvlm-edge convert CHECKPOINT -o gone"),
        ("apple/FastVLM-0.5B", "if it is a hub id", "run: fastvlm-edge convert apple/FastVLM-0.5B -o model"),
        (
            "https://huggingface.co/apple/FastVLM-0.5B/tree/main",
            "https://huggingface.co/apple/FastVLM-0.5B/tree/main is the address of a checkpoint",
            "run: fastvlm-edge convert apple/FastVLM-0.5B -o model",
        ),
        ("https://example.org/a.zip", "https://example.org/a.zip is an address", "give a directory on this machine"),
        ("data:image/png;base64," + "A" * 9999, "is an address", "give a directory on this machine"),
        ("A" * 9999, "AAA...' is not a model directory, or cannot be read", "check the path"),
        ("a\0b", "is not a model directory: it does not exist", "check the path"),
        (str(CHECKPOINT), "is a checkpoint, not a model directory", f"run: fastvlm-edge convert {CHECKPOINT} -o model"),
        (str(CHECKPOINT / "model.safetensors"), "is a file, not a model directory", "give a directory that"),
        (str(demo.MODEL / "vision.onnx"), "is a file of a model directory", f"give the directory: {demo.MODEL}"),
        (str(demo.HOME), f"{demo.HOME} is not a model directory, but contains 1", f"give one of them, such as {demo.MODEL}"),
        (str(demo.HOME / "sign.jpg"), "is a picture, not a model directory", "give the model directory first, and then --image"),
    ],
)
def test_it_is_called_by_its_name(given: str, what: str, mend: str) -> None:
    with pytest.raises(FastVLMError) as caught:
        FastVLM.load(given)
    assert what in caught.value.what and caught.value.mend is not None and caught.value.mend.startswith(mend)
    assert len(str(caught.value)) < 400


def test_a_directory_of_engines(tmp_path: Path) -> None:
    model = Path(shutil.copytree(demo.MODEL, tmp_path / "model"))
    (model / "engines" / "orin").mkdir(parents=True)
    with pytest.raises(FastVLMError, match=f"is a part of a model directory; give {model}"):
        FastVLM.load(model / "engines" / "orin")


@pytest.mark.parametrize("below", ["models--apple--FastVLM-0.5B/snapshots/" + "0" * 40, "output/checkpoint-100"])
def test_a_folder_with_a_checkpoint_in_it(tmp_path: Path, below: str) -> None:
    """A hub cache, and a trainer's folder. `convert` finds what is in them."""
    inside = tmp_path / below
    inside.mkdir(parents=True)
    folder = tmp_path / Path(below).parts[0]
    with pytest.raises(FastVLMError, match=r"it has no fastvlm\.json"):
        FastVLM.load(folder)
    (inside / "config.json").write_text('{"model_type": "llava_qwen2"}')
    with pytest.raises(FastVLMError, match=rf"has a checkpoint in it.*; run: fastvlm-edge convert {folder} -o model"):
        FastVLM.load(folder)


@pytest.mark.parametrize("config", ['{"editor": {}}', "[" * 99999, "", '"model_type"'])
@pytest.mark.parametrize("place", [".", "tool"])
def test_a_config_of_another_program_is_no_checkpoint(tmp_path: Path, place: str, config: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "config.json").write_text(config)
    with pytest.raises(FastVLMError, match=r"it has no fastvlm\.json"):
        FastVLM.load(tmp_path)


@pytest.mark.parametrize(
    "command", ["run MODEL x", "bench MODEL", "eval MODEL --data DATA", "build MODEL", "bundle MODEL --target orin-jp6 -o x"]
)
def test_every_command_says_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.replace("MODEL", str(CHECKPOINT)).replace("DATA", str(demo.QUESTIONS)).split()) == 1
    assert "is a checkpoint, not a model directory; run: fastvlm-edge convert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("https://huggingface.co/apple/FastVLM-0.5B", "apple/FastVLM-0.5B"),
        ("http:/hf.co/apple/FastVLM-0.5B?x=1", "apple/FastVLM-0.5B"),
        ("huggingface.co/apple/FastVLM-0.5B/blob/main/config.json", "apple/FastVLM-0.5B"),
        ("hf://apple/FastVLM-0.5B", "apple/FastVLM-0.5B"),
        ("https://huggingface.co/datasets/a/b", None),
        ("https://example.org/apple/FastVLM-0.5B", None),
        ("apple/FastVLM-0.5B", None),
    ],
)
def test_the_hub_id_in_an_address(given: str, found: str | None) -> None:
    assert hub_id_of(given) == found
