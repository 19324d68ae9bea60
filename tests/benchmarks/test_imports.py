"""Tests and benchmarks do not import each other. `tests/benchmarks` is the exception: it tests the benchmarks' own code.

What both need stands in `examples/` or in the product.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def imported(source: str) -> Iterator[str]:
    """The name of every module that `source` imports, inside functions too, by statement or by `import_module("name")`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(origin), names=names):
                yield from (f"{origin}.{alias.name}" for alias in names)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(function).rpartition(".")[2] == "import_module":
                    yield name


def trespassing(folder: Path, forbidden: str, *, but: Path | None = None) -> list[str]:
    """`FILE imports MODULE` for every import of the top-level package `forbidden` below `folder`, except below `but`."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted(folder.rglob("*.py"))
        if but is None or but not in path.parents
        for name in imported(path.read_text(encoding="utf-8"))
        if name.partition(".")[0] == forbidden
    ]


def test_tests_do_not_import_benchmarks() -> None:
    assert trespassing(ROOT / "tests", "benchmarks", but=ROOT / "tests" / "benchmarks") == []


def test_benchmarks_do_not_import_tests() -> None:
    assert trespassing(ROOT / "benchmarks", "tests") == []


def test_examples_import_neither() -> None:
    assert trespassing(ROOT / "examples", "tests") == trespassing(ROOT / "examples", "benchmarks") == []


@pytest.mark.parametrize(
    "line",
    [
        "import benchmarks",
        "from benchmarks import cpu",
        "def f():\n    from benchmarks.peers.run import call",
        'import_module("benchmarks.tables")',
        'importlib.import_module("benchmarks.tables", None)',
    ],
)
def test_an_import_is_seen(line: str) -> None:
    assert any(name.partition(".")[0] == "benchmarks" for name in imported(line))
