"""The guides: every command of the toolkit in them is one that its parser takes, and every block says whether it was run."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from fastvlm_edge.cli import COMMANDS

DOCS = Path(__file__).parent.parent / "docs"
GUIDES = ("jetpack-6.md", "jetpack-7.md")
BUNDLE_ONLY = {"install"}
"""Commands that only a bundle has."""


def blocks(name: str) -> list[tuple[str, list[str]]]:
    """The text before each block of commands, and its lines without comments."""
    parts = re.split(r"```(?:sh)?\n", (DOCS / name).read_text(encoding="utf-8"))
    return [
        (before, [line.partition("  #")[0].strip() for line in block.splitlines()])
        for before, block in zip(parts[::2], parts[1::2], strict=False)
    ]


@pytest.mark.parametrize("name", GUIDES)
def test_every_block_says_whether_it_was_run(name: str) -> None:
    found = blocks(name)
    assert len(found) > 4
    for before, lines in found:
        last = before.strip().rpartition("\n\n")[2].lower()
        assert ("run by the tests" in last) != ("not yet run on hardware" in last), lines


@pytest.mark.parametrize("name", GUIDES)
def test_every_command_of_the_toolkit_is_taken_by_its_parser(name: str) -> None:
    seen = set()
    for _, lines in blocks(name):
        for line in lines:
            words = [word for word in shlex.split(line) if word != "sudo"]
            if words[0] not in ("fastvlm-edge", "./meter-reader"):
                continue
            command, arguments = words[1], words[2:]
            if words[0] == "./meter-reader":
                if command in BUNDLE_ONLY:
                    continue
                arguments = ["model", *arguments]
            module = importlib.import_module(f"fastvlm_edge.commands.{command}")
            assert command in COMMANDS
            module.parser().parse_args(arguments)  # leaves with SystemExit where it is wrong
            seen.add(command)
    assert seen >= {"convert", "plan", "bundle", "doctor", "build", "run"}
