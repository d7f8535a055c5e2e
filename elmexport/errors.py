"""Exceptions that `elmexport` raises on purpose, with their exit codes.

A message says what was found, what is allowed, and the fix. The command line prints it without a traceback and exits with
`exit_code`: 1 a gate failed, 2 bad use or bad input, 3 the environment lacks something.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST = 640  # characters of a message
_ENDLESS = re.compile(r"\S{300,}")
# What the libraries below say: torch, the loader of shared libraries, the system, C++, Python's threads.
_LACK = re.compile(r"(can.t|cannot|unable to|failed to) allocate|failed to map segment|bad.?alloc|can.t start new thread", re.IGNORECASE)


class ElmExportError(Exception):
    """Bad use or bad input. Base of every error raised on purpose."""

    exit_code = 2

    def __str__(self) -> str:
        return shortened(super().__str__())

    def of(self, name: str) -> ElmExportError:
        """The same of the tensor `name`, which the message begins with."""
        return ElmExportError(f"{name}: {self}")


class VerificationError(ElmExportError):
    """An artifact was written, run, and found to be far from the model it came from."""

    exit_code = 1


class Fp16RangeError(ElmExportError):
    """A weight that fp16 numbers or scales cannot hold: `found`, and `advice`, which whoever knows the format replaces."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(found, advice)
        self.found, self.advice = found, advice

    def __str__(self) -> str:
        return shortened(f"{self.found}; {self.advice}")

    def of(self, name: str) -> Fp16RangeError:
        return Fp16RangeError(f"{name}: {self.found}", self.advice)


class MissingDependencyError(ElmExportError):
    """A package, tool or permission that the environment lacks; the message names it and how to get it."""

    exit_code = 3


def shortened(message: str) -> str:
    """Cut what a damaged file put into `message`, a name of thousands of characters or a list of numbers; the fix, at its end, stays."""
    message = _ENDLESS.sub(lambda word: f"{word[0][:150]}…{word[0][-50:]}", message)
    return message if len(message) <= LONGEST else f"{message[: LONGEST - 203]} … {message[-200:]}"


def listed(names: Sequence[str], count: int = 3, longest: int = 80) -> str:
    """List the first `count` of `names` and say how many more there are: what is found may be long, a message may not."""
    shown = ", ".join(name if len(name) <= longest else f"{name[: longest - 1]}…" for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


def out_of_memory(error: BaseException) -> str | None:
    """The message for an `error` that reports, or followed from, memory that could not be had; None for any other."""
    led: BaseException | None = error
    while led is not None:
        if isinstance(led, MemoryError) or _LACK.search(str(led)):
            found = "".join(f" ({line})" for line in str(led).splitlines()[:1])
            return shortened(f"not enough memory{found}; close other programs, raise the process's limit, or take a smaller model")
        led = led.__cause__ or led.__context__
    return None
