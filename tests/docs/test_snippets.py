"""Commands and Python snippets of README and of the first pages really run, with the demo model and its pictures."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from examples.demo_training.scenes import make_scene
from tests.docs.pages import PAGES, ROOT, blocks, command_lines, read
from tests.support.videos import write_video

RUN = ("README.md", "docs/start.md", "docs/run.md")
"""Pages whose `convert` and `run` commands are run; the first one converts the model of the others."""
SNIPPETS = ("README.md", "docs/run.md", "docs/python.md", "docs/image_size.md", "docs/reference/python.md")
"""Pages whose Python snippets are run, all of a page in one process."""
PICTURES = {"meter.jpg": ("reading", 3), "sign.jpg": ("sign", 1)}
"""Placeholder -> kind and index of the scene that stands for it."""


def run(folder: Path, *words: str) -> str:
    """The output of Python with these arguments, in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FASTVLM_EDGE_CACHE": str(folder / "cache")}
    found = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, (words, found.stderr)
    return found.stdout


def commands(page: str) -> list[list[str]]:
    """Arguments of the `convert` and `run` commands of a page that need nothing but the placeholders."""
    lines = [shlex.split(line) for line in command_lines(read(page)) if line.startswith("fastvlm-edge ")]
    return [words[1:] for words in lines if words[1] in ("convert", "run")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the placeholders name, and the model that README's command converts."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "CHECKPOINT").symlink_to(ROOT / "examples" / "demo" / "fastvlm-demo")
    (folder / "fastvlm_edge").mkdir()
    (folder / "fastvlm_edge" / "demo").symlink_to(ROOT / "fastvlm_edge" / "demo")
    for name, (kind, index) in PICTURES.items():
        make_scene("heldout", 0, index, kind=kind).image.save(folder / name)
    write_video(folder / "clip.mp4", [index / 10 for index in range(40)])
    (schema,) = [block.text for block in blocks(read("docs/run.md")) if block.language == "json"]
    (folder / "schema.json").write_text(schema, encoding="utf-8")
    (convert,) = [words for words in commands("README.md") if words[0] == "convert"]
    assert run(folder, "-m", "fastvlm_edge", *convert).startswith("model: ")
    return folder


@pytest.mark.parametrize("page", RUN)
def test_the_commands_run(page: str, workplace: Path) -> None:
    found = commands(page)
    assert any(words[0] == "run" for words in found)
    for words in found:
        if words[0] == "run":
            assert run(workplace, "-m", "fastvlm_edge", *words).strip()
        else:
            assert words in commands("README.md")  # run already


@pytest.mark.parametrize("page", SNIPPETS)
def test_the_python_snippets_run(page: str, workplace: Path) -> None:
    snippets = [block.text for block in blocks(read(page)) if block.language == "python"]
    assert snippets
    script = workplace / "snippet.py"
    script.write_text("\n".join(snippets), encoding="utf-8")
    assert run(workplace, script.name).strip()


@pytest.mark.parametrize("page", PAGES)
def test_all_python_snippets_are_python(page: str) -> None:
    for block in blocks(read(page)):
        if block.language in ("python", "py"):
            compile(block.text, page, "exec")
