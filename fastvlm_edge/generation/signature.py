"""Methods that pass their arguments on to another one share its signature, so that its options are written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Self = TypeVar("Self")


def parameters_of(
    original: Callable[Concatenate[Any, P], object],
) -> Callable[[Callable[Concatenate[Self, ...], R]], Callable[Concatenate[Self, P], R]]:
    """Gives a method the parameters of another one, for type checkers and for `help`."""

    def give(method: Callable[Concatenate[Self, ...], R]) -> Callable[Concatenate[Self, P], R]:
        returned = inspect.signature(method).return_annotation
        signature = inspect.signature(original).replace(return_annotation=returned)
        method.__signature__ = signature  # type: ignore[attr-defined]
        return method

    return give
