"""The one exception that a user is meant to read."""

from __future__ import annotations


class FastVLMError(Exception):
    """What is wrong, with which value, and what to do about it.

    The command line prints both on stderr, or with `--json` as one object on stdout, and exits with status 1. `str` joins them with "; ".
    """

    def __init__(self, what: str, mend: str | None = None) -> None:
        """`what` names the thing, the value and what was expected; `mend` is what to do, a command where there is one. No final period."""
        super().__init__(what if mend is None else f"{what}; {mend}")
        self.what = what
        self.mend = mend

    def __reduce__(self) -> tuple[type[FastVLMError], tuple[str, str | None]]:
        return type(self), (self.what, self.mend)
