"""Writes docs/reference/commands.md from the parsers of the commands: `python -m docs.generate_reference`.

The text is made from the arguments themselves, not from `--help`, whose layout depends on the terminal and on the version of Python.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib import import_module
from pathlib import Path

from fastvlm_edge.cli import COMMANDS

PAGE = Path(__file__).parent / "reference" / "commands.md"
HEAD = """# Commands

<!-- Written by docs/generate_reference.py. Do not edit: a test compares this page with the parsers. -->

Results go to stdout, progress and errors to stderr. With `--json`, a command prints one JSON object and nothing else. If it fails, the
object is `{"error": {"message": ..., "mend": ...}}`, possibly with what was measured before. `plan` and `doctor` print their normal object
and exit with status 1 if nothing fits or a problem was found. Wrong usage exits with status 2 and prints nothing on stdout.

| exit status | meaning |
| --- | --- |
| 0 | done |
| 1 | failed; one line on stderr says what is wrong and what to do. `plan`: nothing fits; `doctor`: a problem was found |
| 2 | wrong usage |
| 130, 143 | interrupted (Ctrl-C), terminated |

`FASTVLM_EDGE_DEBUG=1` shows the traceback of an error.
"""


def parsers(command: str) -> list[argparse.ArgumentParser]:
    """The parser of a command, then those of its subcommands: the public functions of its module named `parser` or `..._parser`."""
    module = import_module(f"fastvlm_edge.commands.{command}")
    names = [name for name in vars(module) if name.endswith("_parser") and not name.startswith("_")]
    return [getattr(module, name)() for name in ("parser", *sorted(names))]


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for command in COMMANDS:
        parts += [section(parser) for parser in parsers(command)]
    return "\n".join(parts)


def section(parser: argparse.ArgumentParser) -> str:
    """One command: what it does, its usage, and a table per group of arguments."""
    lines = [f"## {parser.prog}", ""]
    if parser.description:
        lines += [escape(" ".join(parser.description.split())), ""]
    lines += ["```text", usage(parser), "```", ""]
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if action.help is not argparse.SUPPRESS and action.dest != "help"]
        if shown:
            title = {"positional arguments": "arguments", "optional arguments": "options"}.get(group.title or "", group.title or "")
            lines += [f"| {title} | |", "| --- | --- |", *(row(parser, action) for action in shown), ""]
    if parser.epilog:
        lines += ["```text", same_everywhere(parser.epilog.strip("\n")), "```", ""]
    return "\n".join(lines)


def same_everywhere(text: str) -> str:
    """Targets whose Python is, by default, the one that runs this: their lines must not depend on it."""
    here = "Python {}.{}".format(*sys.version_info)
    return re.sub(rf"(?m)^(\s*(?:aarch64|x86_64)\b.*){re.escape(here)}$", r"\1the Python that runs this", text)


def usage(parser: argparse.ArgumentParser) -> str:
    """The positional and the required arguments; the others are in the tables."""
    words, more = [parser.prog], False
    for action in parser._actions:
        if not action.option_strings:
            name = value_name(action)
            words.append({"+": f"{name} [{name} ...]", "*": f"[{name} ...]", "?": f"[{name}]"}.get(str(action.nargs), name))
    for action in parser._actions:
        if action.option_strings and action.required:
            words.append(f"{action.option_strings[0]} {value_name(action)}")
        elif action.option_strings:
            more = True
    return " ".join(words + ["[options]"] * more)


def value_name(action: argparse.Action) -> str:
    """What stands for the value of an argument."""
    if isinstance(action.metavar, str):
        return action.metavar
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One argument as a row of a table."""
    value = "" if action.nargs == 0 else value_name(action)
    name = ", ".join(f"{option} {value}".strip() for option in action.option_strings) or value
    if action.choices and isinstance(action.metavar, str):
        name += f" ({', '.join(map(str, action.choices))})"
    words = parser._get_formatter()._expand_help(action) if action.help else ""
    required = " (required)" if action.option_strings and action.required else ""
    return f"| `{name.replace('|', chr(92) + '|')}` | {escape(words)}{required} |"


def escape(text: str) -> str:
    """Plain text for a cell or a paragraph of Markdown; pages of the documentation become links."""
    text = text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
    return re.sub(r"\(docs/([\w.-]+)\)", r"([details](../\1))", text)


def main() -> int:
    """Write the page."""
    PAGE.write_text(reference(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
