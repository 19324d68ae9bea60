"""Links of the documentation: relative ones lead to a file and a heading that exist, external ones have the shape of an address."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, links, read


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    wrong = []
    for link in links(read(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", PAGES)
def test_external_links_are_addresses(page: str) -> None:
    for link in links(read(page)):
        if re.match(r"[a-z]+:", link) and not link.startswith("mailto:"):
            parts = urlsplit(link)
            assert parts.scheme == "https" and "." in parts.netloc and not re.search(r"\s|\.$", link), link


def test_every_page_of_the_docs_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    named = set(re.findall(r"[\w./-]+\.md", navigation))
    docs = ROOT / "docs"
    assert named == {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}


def test_every_picture_is_shown_somewhere() -> None:
    shown = {((ROOT / page).parent / link).resolve() for page in PAGES for link in links(read(page)) if not re.match(r"[a-z]+:", link)}
    pictures = {path for path in (ROOT / "docs" / "images").iterdir() if path.is_file()}

    def same_figure(path: Path) -> bool:
        return any(other in shown for other in (path, path.with_suffix(".png"), path.with_suffix(".svg")))

    assert not [path.name for path in pictures if not same_figure(path)]
