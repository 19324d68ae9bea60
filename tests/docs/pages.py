"""The pages of the documentation, and what stands in them: blocks of code, command lines, inline code, links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(
    sorted(
        page.relative_to(ROOT).as_posix()
        for page in (
            *ROOT.glob("*.md"),
            *ROOT.glob("docs/**/*.md"),
            *ROOT.glob("examples/**/*.md"),
            ROOT / "benchmarks" / "README.md",
        )
    )
)
"""All but benchmarks/studies/README.md: its commands are those of older commits."""


@dataclass(frozen=True)
class Block:
    """A block of code."""

    language: str
    """What stands behind the fence; "" for an indented block or a bare fence."""
    text: str


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """Fenced blocks, and blocks that are indented by four spaces after an empty line."""
    found, lines, at = [], text.splitlines(), 0
    while at < len(lines):
        if lines[at].startswith("```"):
            end = next(index for index in range(at + 1, len(lines)) if lines[index].startswith("```"))
            found.append(Block(lines[at][3:].strip(), "\n".join(lines[at + 1 : end])))
            at = end + 1
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            found.append(Block("", "\n".join(line[4:] for line in lines[at:end]).rstrip()))
            at = end
        else:
            at += 1
    return found


def prose(text: str) -> str:
    """The text without fenced and indented blocks and without comments."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"(?m)^    .*$", "", text)


def command_lines(text: str) -> list[str]:
    """The lines of shell blocks, continued lines joined, without comments."""
    lines = []
    for block in blocks(text):
        if block.language in ("", "sh", "bash"):
            lines += [re.split(r"\s+#", line)[0].strip() for line in block.text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def inline_code(text: str) -> list[str]:
    """Everything between single backticks in the prose."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose(text))]


def links(text: str) -> list[str]:
    """Targets of links and pictures in the prose, Markdown's and HTML's."""
    text = re.sub(r"`[^`]*`", "", prose(text))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def anchors(text: str) -> set[str]:
    """Ids of the headings of a page, as MkDocs and GitHub make them."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?m)^```.*?^```", "", text, flags=re.DOTALL)):
        words = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        base = anchor = re.sub(r"[-\s]+", "-", words)
        number = 1
        while anchor in found:
            anchor, number = f"{base}_{number}", number + 1
        found.add(anchor)
    return found
