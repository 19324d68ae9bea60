"""The examples of docs/serve.md work: the curl lines, and the Python ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import blocks, read
from tests.support.serving import DEMO, Served

CURLS = [block.text for block in blocks(read("docs/serve.md")) if "curl " in block.text]
PYTHON = [block.text for block in blocks(read("docs/serve.md")) if block.language == "python" and "langchain" not in block.text]
"""tests/clients has those of LangChain."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(DEMO / "meter.jpg", tmp_path)
    return tmp_path


def at(served: Served, text: str) -> str:
    assert "127.0.0.1:8000" in text
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{served.port}")


@pytest.mark.parametrize("script", CURLS)
def test_curl(script: str, served: Served, folder: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    done = subprocess.run(["bash", "-c", at(served, script)], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    decoder, rest, found = json.JSONDecoder(), done.stdout.strip(), []
    while rest:
        document, end = decoder.raw_decode(rest)
        found.append(document)
        rest = rest[end:].strip()
    assert len(found) == script.count("curl ") and not any("error" in document for document in found), found


def test_python(served: Served, folder: Path) -> None:
    script = "\n".join(PYTHON)  # each goes on where the one before ends
    done = subprocess.run([sys.executable, "-c", at(served, script)], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
