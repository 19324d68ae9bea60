"""The guides for Jetson: every block of commands says whether it was run."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT

GUIDES = ("jetpack-6.md", "jetpack-7.md")


@pytest.mark.parametrize("name", GUIDES)
def test_every_block_says_whether_it_was_run(name: str) -> None:
    parts = re.split(r"```(?:sh)?\n", (ROOT / "docs" / name).read_text(encoding="utf-8"))
    before_blocks = parts[:-1:2]
    assert len(before_blocks) > 4
    for before in before_blocks:
        last = before.strip().rpartition("\n\n")[2].lower()
        assert ("run by the tests" in last) != ("not yet run on hardware" in last), last
