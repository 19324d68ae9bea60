"""Command lines in the documentation: each is accepted by its parser; make targets, extras, modules and files exist."""

from __future__ import annotations

import argparse
import html
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.generate_reference import parsers
from fastvlm_edge.cli import COMMANDS
from tests.docs.pages import PAGES, ROOT, command_lines, inline_code, read

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with mypy

BUNDLES = ("./meter-reader",)
"""Names of bundles in the examples. A bundle leaves MODEL out, and has a few commands of its own."""
BUNDLE_ONLY = {"install", "uninstall", "prepare", "about", "licenses"}
TARGETS = set(re.findall(r"(?m)^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8")))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = set(PYPROJECT["project"]["optional-dependencies"])
PYTHONS = re.compile(r"(\.venv/bin/)?python3?(\.\d+)?$")
PIPS = re.compile(r"(\.venv/bin/)?pip3?$")


def commands() -> list[tuple[str, str]]:
    """(page, simple command): lines of shell blocks, split at `&&` and `;`."""
    found = []
    for page in PAGES:
        for line in command_lines(read(page)):
            found += [(page, part.strip()) for part in re.split(r"&&|; ", line)]
    return found


def words_of(command: str) -> list[str]:
    """The words of a command without `sudo`, `ssh HOST` and assignments of variables."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []  # part of something else, such as a Python string
    while words and (words[0] in ("sudo", "$") or re.match(r"[A-Z_]+=", words[0])):
        words = words[1:]
    return words[2:] if words[:1] == ["ssh"] else words


def toolkit_commands() -> Iterator[tuple[str, list[str]]]:
    """(page, arguments) of every call of the toolkit."""
    for page, command in commands():
        words = words_of(command)
        if not words:
            continue
        if words[0] == "fastvlm-edge":
            yield page, words[1:]
        elif PYTHONS.match(words[0]) and words[1:3] == ["-m", "fastvlm_edge"]:
            yield page, words[3:]
        elif words[0] in BUNDLES and words[1:] and words[1] not in BUNDLE_ONLY:
            model = [] if words[1] == "doctor" else ["model"]
            yield page, [words[1], *model, *words[2:]]


def accept(arguments: list[str]) -> None:
    """Parse the arguments of the toolkit as the command line does. Raises SystemExit for wrong usage."""
    if arguments in (["--version"], ["--help"]):
        return
    command, rest = arguments[0], arguments[1:]
    assert command in COMMANDS, command
    parser, *others = parsers(command)
    for other in others:
        subcommand = other.prog.split()[-1]
        if rest[:1] == [subcommand]:
            parser, rest = other, rest[1:]
            break
    parser.parse_args(rest)


def test_every_call_of_the_toolkit_is_accepted_by_its_parser(capsys: pytest.CaptureFixture[str]) -> None:
    seen, wrong = set(), []
    for page, arguments in toolkit_commands():
        try:
            accept(arguments)
        except SystemExit as leave:
            if leave.code:
                wrong.append(f"{page}: {shlex.join(arguments)}: {capsys.readouterr().err.splitlines()[-1]}")
        seen.add(arguments[0])
    assert not wrong
    assert seen >= set(COMMANDS)


def test_a_wrong_call_would_be_found() -> None:
    for arguments in (
        ["run", "model", "--image", "a.jpg"],
        ["bench", "compare", "a.json"],
        ["convert", "X", "-o", "m", "--precision", "fp12"],
    ):
        with pytest.raises(SystemExit):
            accept(arguments)
    with pytest.raises(AssertionError):
        accept(["talk", "model"])


def test_every_command_and_option_in_the_prose_exists() -> None:
    known = {}
    for command in COMMANDS:
        known[command] = {option for parser in parsers(command) for action in parser._actions for option in action.option_strings}
    wrong = []
    for page in PAGES:
        for code in inline_code(read(page)):
            words = code.split()
            if words[0] == "fastvlm-edge" and len(words) > 1 and not words[1].startswith("-") and words[1] not in ("COMMAND",):
                if words[1] not in COMMANDS:
                    wrong.append(f"{page}: {code}")
                    continue
                words = words[1:]
            if words[0] in COMMANDS:
                wrong += [f"{page}: {code}" for word in words[1:] if word.startswith("-") and word.partition("=")[0] not in known[words[0]]]
    assert not wrong


def test_every_make_target_exists() -> None:
    used = {(page, word) for page, command in commands() for words in [words_of(command)] if words[:1] == ["make"] for word in words[1:]}
    used |= {(page, code.split()[1]) for page in PAGES for code in inline_code(read(page)) if re.match(r"make [a-z]", code)}
    assert not {(page, target) for page, target in used if target not in TARGETS and "=" not in target}
    assert {target for _, target in used} >= {"demo", "setup", "test", "docs"}


def test_every_extra_exists_and_nothing_claims_to_be_on_pypi() -> None:
    seen = set()
    for page, command in commands():
        words = words_of(command)
        if PIPS.match(words[0]) if words else False:
            for word in words[2:]:
                if found := re.fullmatch(r"\.\[([\w,]+)\]", word):
                    assert set(found.group(1).split(",")) <= EXTRAS, f"{page}: {command}"
                    seen |= set(found.group(1).split(","))
                assert not word.startswith("fastvlm-edge"), f"{page}: {command}"
    assert seen >= {"convert", "rtx", "tensorrt"}


def test_every_module_and_script_that_is_started_exists_and_knows_its_options() -> None:
    seen = set()
    for page, command in commands():
        words = words_of(command)
        if not words or not PYTHONS.match(words[0]) or len(words) < 2:
            continue
        module = words[2] if words[1] == "-m" and len(words) > 2 else ""
        if module.partition(".")[0] in ("benchmarks", "examples", "docs"):
            path = ROOT / (module.replace(".", "/") + ".py")
            assert path.is_file(), f"{page}: {command}"
            source = path.read_text(encoding="utf-8")
            for option in (word for word in words[3:] if word.startswith("--")):
                assert f'"{option}"' in source, f"{page}: {command}: {option}"
            seen.add(module)
        elif not module and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"{page}: {command}"
    assert {"benchmarks.peers.run", "examples.demo_training.scenes"} <= seen


TREES = ("fastvlm_edge/", "convert/", "calib/", "engines/", "tests/", "benchmarks/", "examples/", "docs/", ".github/")


def test_every_path_in_the_prose_exists() -> None:
    missing = []
    for page in PAGES:
        if page == "CHANGELOG.md":
            continue
        for code in inline_code(read(page)):
            path = code.partition(" ")[0]
            if path.startswith(TREES) and not re.search(r"[A-Z<*{]{2,}|[<*{]", path.removesuffix("README.md")):
                missing += [f"{page}: {path}"] if not (ROOT / path).exists() else []
    assert not missing


@pytest.mark.parametrize("command", COMMANDS)
def test_parsers_are_those_of_the_commands(command: str) -> None:
    assert all(isinstance(parser, argparse.ArgumentParser) for parser in parsers(command))
    assert parsers(command)[0].prog == f"fastvlm-edge {command}"
    assert importlib.import_module(f"fastvlm_edge.commands.{command}").main
    assert Path(importlib.import_module("fastvlm_edge.commands").__path__[0], f"{command}.py").is_file()


def test_the_recorded_terminal_shows_commands_that_exist() -> None:
    pytest.importorskip("rich")
    recorder = importlib.import_module("docs.record_terminal")
    shown = html.unescape((recorder.IMAGES / "terminal.svg").read_text(encoding="utf-8")).replace("\xa0", " ")
    for command in recorder.COMMANDS:
        accept(shlex.split(command)[1:])
        assert command.partition('"')[0] in shown, "run: python -m docs.record_terminal"
