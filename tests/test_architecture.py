"""Who may import whom, read from the source with `ast`: nothing is imported here, and imports inside functions count too.

    calib -> convert -> fastvlm_edge        engines -> fastvlm_edge

import-linter would be the usual tool; it does not follow the links `fastvlm_edge/{convert,engines,calib}` to the real directories.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREES = {name: ROOT / name.rpartition(".")[2] for name in ("fastvlm_edge", *(f"fastvlm_edge.{x}" for x in ("convert", "engines", "calib")))}
"""Package -> its real directory."""

MAY_IMPORT = {"runtime": set[str](), "convert": {"runtime"}, "engines": {"runtime"}, "calib": {"convert", "runtime"}}
"""Part -> the other parts it may import; the runtime is everything in `fastvlm_edge/` but the three links."""

ON_DEMAND = {
    "fastvlm_edge.commands.convert": {"convert", "calib"},
    "fastvlm_edge.commands.build": {"engines"},
    "fastvlm_edge.commands.plan": {"engines"},
    "fastvlm_edge.bundle_entry": {"engines"},
    "fastvlm_edge.pretrained": {"convert"},
}
"""Modules of the runtime that load another part when the user asks for it. The command line imports a command only to run it, and
only a bundle starts at `bundle_entry`."""

SERVE = {"starlette", "uvicorn", "h11", "msgspec", "prometheus_client"}
"""Packages of the extra `serve`, and uvicorn's h11: only `server/` and the command `serve` import them."""

PACKAGES = {
    "runtime": {"numpy", "PIL", "tokenizers", "onnxruntime", "llguidance", "av", "pyarrow", "ray", *SERVE},
    "engines": {"numpy"},
    "convert": {"numpy", "tokenizers", "torch", "onnx", "ml_dtypes", "huggingface_hub", "jinja2"},
    "calib": {"numpy", "torch", "onnx", "ml_dtypes"},
}
"""Part -> the packages it may import. The GPU libraries are looked up by name where they are used, so they do not appear."""

DRAWS = {"fastvlm_edge.bench.plot", "fastvlm_edge.commands.plan"}
"""Modules that import matplotlib inside a function."""

BARE = ("fastvlm_edge.cli", "fastvlm_edge.commands.doctor", "fastvlm_edge.machine.power", "fastvlm_edge.extras", "fastvlm_edge.progress")
"""Modules that load on Python 3.8 without any package, with all that they load."""


@dataclass(frozen=True)
class Import:
    """`source` (a module of the project) imports `target`: a module of the project, or the top-level name of a package."""

    source: str
    target: str
    at_load: bool
    """False inside a function and under TYPE_CHECKING."""

    def __str__(self) -> str:
        return f"{self.source} imports {self.target}"


@cache
def modules() -> dict[str, Path]:
    """Every module of the project -> its file."""
    found = {}
    for package, directory in TREES.items():
        for path in directory.rglob("*.py"):
            parts = path.relative_to(directory).with_suffix("").parts
            if (directory / parts[0]).is_symlink():  # Python before 3.13 follows links here
                continue
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports_in(module: str, tree: ast.AST, known: Mapping[str, Path]) -> Iterator[Import]:
    """Every import statement below `tree`, and every `import_module("a.literal.name")`."""

    def targets(node: ast.AST) -> Iterator[str]:
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(origin), names=names, level=0):
                yield from (f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in known else origin for alias in names)
            case ast.ImportFrom():
                raise AssertionError(f"{module}:{node.lineno}: a relative import; write the whole name")
            case ast.Call(func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name))]):
                if name.partition(".")[0] == "fastvlm_edge":
                    yield name

    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            loads = at_load and not inside and not for_types
            for target in targets(child):
                yield Import(module, target if target in known else target.partition(".")[0], loads)
            yield from walk(child, loads)

    return walk(tree, True)


@cache
def imports() -> tuple[Import, ...]:
    known = modules()
    every = (imports_in(module, ast.parse(path.read_text(encoding="utf-8")), known) for module, path in known.items())
    return tuple(dict.fromkeys(found for of_one in every for found in of_one))


def part(module: str) -> str:
    """convert, engines, calib or runtime."""
    second = [*module.split("."), ""][1]
    return second if second in MAY_IMPORT else "runtime"


def room(module: str) -> str:
    """The directory of a module in `fastvlm_edge/`, or the module itself where it stands beside the directories."""
    return ".".join(module.split(".")[:2])


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """One circle of a graph, or an empty list."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        nodes: list[str] = error.args[1]
        return nodes[::-1]
    return []


def graph(name_of: Mapping[str, str]) -> dict[str, set[str]]:
    """Who imports whom between the groups `name_of` gives to modules; a group that imports itself is no circle."""
    edges = defaultdict[str, set[str]](set)
    for found in imports():
        if found.target in name_of and name_of[found.source] != name_of[found.target]:
            edges[name_of[found.source]].add(name_of[found.target])
    return edges


def loaded_with(module: str) -> set[str]:
    """`module`, all that it imports at load, and the packages they are in."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [name.rpartition(".")[0]] * ("." in name)
            waiting += [found.target for found in imports() if found.source == name and found.at_load and found.target in modules()]
    return seen


def test_every_part_is_found() -> None:
    assert {part(module) for module in modules()} == set(MAY_IMPORT)
    assert {"fastvlm_edge", "fastvlm_edge.generation.vlm", "fastvlm_edge.convert.pipeline"} <= set(modules())
    assert len(modules()) == len(set(modules().values())), "a module is counted twice"


def test_parts_import_in_one_direction() -> None:
    def allowed(found: Import) -> bool:
        ours, theirs = part(found.source), part(found.target)
        return ours == theirs or theirs in MAY_IMPORT[ours] | ON_DEMAND.get(found.source, set())

    assert [str(found) for found in imports() if found.target in modules() and not allowed(found)] == []


def test_every_exception_is_needed() -> None:
    used = defaultdict[str, set[str]](set)
    for found in imports():
        if part(found.source) == "runtime" and found.target in modules() and part(found.target) != "runtime":
            used[found.source].add(part(found.target))
    assert used == ON_DEMAND
    assert {found.source for found in imports() if found.target == "matplotlib" and not found.at_load} == DRAWS


def test_what_loads_on_demand_loads_nothing_before() -> None:
    """The command line itself and everything but a command can be imported without the other three parts."""
    commands = {module for module in ON_DEMAND if module.startswith("fastvlm_edge.commands.")}
    for module in modules():
        if part(module) == "runtime" and module not in commands:
            assert {part(name) for name in loaded_with(module)} == {"runtime"}, module


def test_modules_have_no_circle() -> None:
    assert circle(graph({module: module for module in modules()})) == []


def test_rooms_have_no_circle() -> None:
    rooms = {module: room(module) for module in modules()}
    del rooms["fastvlm_edge"]  # it only gives the public names, on first use
    sources = {found.source for found in imports()} - set(rooms)
    assert circle(graph({**rooms, **{source: source for source in sources}})) == []


@pytest.mark.parametrize("of", ["convert", "calib"])
def test_rooms_of_a_part_have_no_circle(of: str) -> None:
    names = {module: ".".join(module.split(".")[:3]) if part(module) == of else room(module) for module in modules()}
    assert circle(graph(names)) == []


def test_packages_are_those_of_each_part() -> None:
    """So only convert/ and calib/ import torch and onnx, and the product imports neither tests, benchmarks nor examples."""

    def allowed(found: Import) -> bool:
        draws = found.target == "matplotlib" and found.source in DRAWS and not found.at_load
        return draws or found.target in PACKAGES[part(found.source)] | sys.stdlib_module_names

    assert [str(found) for found in imports() if found.target not in modules() and not allowed(found)] == []


def test_only_the_command_serve_imports_the_server_and_its_packages() -> None:
    """And the command does so only when it runs: its help needs nothing."""

    def of_the_server(found: Import) -> bool:
        return found.target in SERVE or room(found.target) == "fastvlm_edge.server"

    users = {found.source for found in imports() if of_the_server(found) and room(found.source) != "fastvlm_edge.server"}
    assert users == {"fastvlm_edge.commands.serve"}
    packages = {
        found.target for name in loaded_with("fastvlm_edge.commands.serve") for found in imports() if found.source == name and found.at_load
    }
    assert not packages & SERVE


@pytest.mark.parametrize("module", BARE)
def test_it_loads_without_a_package_on_python_3_8(module: str) -> None:
    for name in sorted(loaded_with(module) & set(modules())):
        ast.parse(modules()[name].read_text(encoding="utf-8"), feature_version=(3, 8))
        foreign = {found.target for found in imports() if found.source == name and found.at_load} - set(modules())
        assert foreign <= sys.stdlib_module_names, f"{name}, which {module} loads, imports {sorted(foreign - sys.stdlib_module_names)}"


@pytest.mark.parametrize(
    ("line", "target", "at_load"),
    [
        ("import torch.nn as nn", "torch", True),
        ("from fastvlm_edge.convert import pipeline", "fastvlm_edge.convert.pipeline", True),
        ("from fastvlm_edge.convert.pipeline import convert", "fastvlm_edge.convert.pipeline", True),
        ("def f():\n    import onnx", "onnx", False),
        ("class A:\n    import onnx", "onnx", True),
        ("try:\n    import onnx\nexcept ImportError:\n    pass", "onnx", True),
        ("if TYPE_CHECKING:\n    from fastvlm_edge.engines.build import build", "fastvlm_edge.engines.build", False),
        ('f = lambda: import_module("fastvlm_edge.calib.quantizer")', "fastvlm_edge.calib.quantizer", False),
    ],
)
def test_imports_are_seen(line: str, target: str, at_load: bool) -> None:
    assert set(imports_in("here", ast.parse(line), modules())) == {Import("here", target, at_load)}


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})[:-1] != []
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
