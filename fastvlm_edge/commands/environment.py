"""Options from the environment: `--max-tokens` is also FASTVLM_EDGE_MAX_TOKENS, for containers and systemd units."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "FASTVLM_EDGE_"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def variable(action: argparse.Action) -> str:
    """The variable of an option or argument."""
    name = action.option_strings[-1].lstrip("-") if action.option_strings else action.dest
    return PREFIX + name.upper().replace("-", "_")


def name_variables(parser: argparse.ArgumentParser) -> None:
    """Let the help of every option and argument end with its variable."""
    for action in _actions(parser):
        action.help = f"{action.help} [{variable(action)}]"


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """The options. What is not on the command line is taken from the environment; a variable that is empty counts as not set.

    An option that may be repeated is one variable, with commas. Wrong values end the program as wrong usage does, and name the variable.
    """
    repeated: dict[str, list[Any]] = {}
    for action in _actions(parser):
        name = variable(action)
        text = environment.get(name, "").strip()
        if not text:
            continue
        if action.nargs == 0:
            if text.lower() not in (*_TRUE, *_FALSE):
                parser.error(f"{name} is {text!r}; give 1 or 0")
            action.default = action.const if text.lower() in _TRUE else action.default
        elif isinstance(action, argparse._AppendAction):
            repeated[action.dest] = [_value(parser, action, name, part.strip()) for part in text.split(",") if part.strip()]
            if not repeated[action.dest]:
                parser.error(f"{name} is {text!r}, which has no value; give values with commas between them")
        else:
            action.default = _value(parser, action, name, text)
            action.required = False
    options = parser.parse_args(arguments)
    for dest, values in repeated.items():
        if not getattr(options, dest):
            setattr(options, dest, values)
    return options


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def _value(parser: argparse.ArgumentParser, action: argparse.Action, name: str, text: str) -> Any:
    try:
        value = action.type(text) if callable(action.type) else text
    except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, argparse.ArgumentTypeError) else "it is not a number"
        parser.error(f"{name} is {text!r}: {reason}")
    if action.choices is not None and value not in action.choices:
        parser.error(f"{name} is {text!r}; use one of: {', '.join(map(str, action.choices))}")
    return value
