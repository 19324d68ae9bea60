"""The generated command reference, and the pages that name modules and classes of the package."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastvlm_edge
from docs.generate_reference import PAGE, parsers, reference
from fastvlm_edge.cli import COMMANDS
from tests.docs.pages import ROOT, read

PACKAGES = ("fastvlm_edge", "convert", "calib", "engines")


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_command_reference_is_what_the_parsers_say(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m docs.generate_reference"


def test_the_command_reference_has_every_command() -> None:
    headings = re.findall(r"(?m)^## fastvlm-edge (\w+)", reference())
    assert list(dict.fromkeys(headings)) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_value_is_named_in_words(command: str) -> None:
    """argparse would name the function of the type: "invalid _not_negative value"."""
    for parser in parsers(command):
        for action in parser._actions:
            if action.type in (None, int, float):
                continue
            assert callable(action.type)
            for text in ("", "x", "1x", "-", "0x10", "1,x", ",", "é", "nan"):
                with contextlib.suppress(argparse.ArgumentTypeError):
                    action.type(text)


def modules() -> set[str]:
    """Paths of the modules of the product, the linked directories once."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            relative = path.relative_to(ROOT)
            through_a_link = any((ROOT / parent).is_symlink() for parent in relative.parents)
            if not through_a_link and path.name != "__init__.py":
                found.add(relative.as_posix())
    return found


def test_the_architecture_page_names_every_module_once_and_no_other() -> None:
    named: list[str] = []
    for section in re.split(r"(?m)^### ", read("docs/architecture.md"))[1:]:
        directory = section.partition("\n")[0].strip("`")
        named += [directory + name for name in re.findall(r"(?m)^\| `([\w.]+\.py)` \| \S", section)]
    assert sorted(named) == sorted(modules())


def test_the_python_reference_names_what_the_package_exports() -> None:
    page = read("docs/reference/python.md")
    for name in fastvlm_edge.__all__:
        exported = getattr(fastvlm_edge, name)
        if not inspect.isclass(exported):
            continue
        assert f"`{name}`" in page or f"## {name}\n" in page
        members = [field.name for field in dataclasses.fields(exported)] if dataclasses.is_dataclass(exported) else []
        members += [
            member
            for member, value in vars(exported).items()
            if not member.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)) and member not in members
        ]
        section = page.partition(f"## {name}\n")[2].partition("\n## ")[0] or page
        for member in members:
            if (name, member) != ("SamplingParams", "wants_logits"):
                assert re.search(rf"`({name}\.)?{member}\b", section), f"{name}.{member}"


def test_the_defaults_in_the_python_reference_are_the_real_ones() -> None:
    page = read("docs/reference/python.md")
    for field in dataclasses.fields(fastvlm_edge.SamplingParams):
        assert re.search(rf"(?m)^\| `{field.name}` \| `?{re.escape(repr(field.default))}`? \|", page), field.name
    load = inspect.signature(fastvlm_edge.FastVLM.load)
    shown = page.partition("`FastVLM.load(")[2].partition(")`")[0]
    expected = []
    for parameter in load.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in expected:
            expected.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}".replace("'", '"')
        expected.append(parameter.name + default)
    assert shown == ", ".join(expected)


def test_the_site_builds_and_loads_nothing_from_other_servers(tmp_path: Path) -> None:
    zensical = Path(sys.executable).with_name("zensical")
    if not zensical.is_file():
        pytest.skip("zensical is not installed (the extra docs)")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    built = subprocess.run([zensical, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "build" / "site"
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").rglob("*.md")))
    loading = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""")
    assert not [page.name for page in pages if loading.search(page.read_text(encoding="utf-8"))]
    for picture in site.rglob("*.svg"):
        assert not re.search(r"""(url\(["']?|href=["']|src=["'])https?:""", picture.read_text(encoding="utf-8")), picture.name
    assert not list(site.rglob("*.py"))
