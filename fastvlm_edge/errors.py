"""The exception for everything that a user can put right: a wrong value, a missing file, a machine that does not fit."""

from __future__ import annotations

from typing import Any

_SHOWN = 150


class FastVLMError(Exception):
    """What is wrong, and what to do about it.

    The command line prints `str(error)`, which is "what; mend", on stderr and exits with status 1. With `--json` it also prints both parts
    as one object on stdout.
    """

    def __init__(self, what: str, mend: str | None = None) -> None:
        """`what` names the thing, its value and what was expected. `mend` says what to do, if possible as "run: COMMAND".

        Both are written without a final period.
        """
        super().__init__(what if mend is None else f"{what}; {mend}")
        self.what = what
        self.mend = mend
        self.partial: dict[str, Any] | None = None
        """The results that a command had before it failed. With `--json` they are printed in the same object as `error`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.mend)


class PictureError(FastVLMError):
    """A picture that cannot be used. `kind` is for programs that count errors."""

    def __init__(self, what: str, mend: str | None = None, kind: str = "damaged") -> None:
        """`kind`: missing, unreadable, not_a_picture, damaged, unsupported, too_large, or memory."""
        super().__init__(what, mend)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.mend, self.kind)


class PackageError(FastVLMError, ImportError):
    """A package that is not installed, or is installed and cannot be loaded. It is also an ImportError, as Python programs expect."""


def one_line(error: BaseException) -> str:
    """An exception as Python prints it, in one line.

    Of a long text it keeps the first and the last line. numpy explains itself in thirty, of which one has the cause.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    original = [line for line in lines if line.startswith("Original error was:")]
    text = " ".join(original or lines)
    if len(text) > 2 * _SHOWN and len(lines) > 1:
        text = f"{lines[0][:_SHOWN]} ... {lines[-1][:_SHOWN]}"
    return f"{type(error).__name__}: {text[: 2 * _SHOWN]}" if text else type(error).__name__
