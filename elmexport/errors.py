"""Exceptions that `elmexport` raises on purpose, with their exit codes.

A message says what was found, what is allowed, and the fix. The command line prints it without a traceback and exits with
`exit_code`: 1 a gate failed, 2 bad use or bad input, 3 the environment lacks something.
"""

from __future__ import annotations


class ElmExportError(Exception):
    """Bad use or bad input. Base of every error raised on purpose."""

    exit_code = 2


class VerificationError(ElmExportError):
    """An artifact was written, run, and found to be far from the model it came from."""

    exit_code = 1


class MissingDependencyError(ElmExportError):
    """A package, tool or permission that the environment lacks; the message names it and how to get it."""

    exit_code = 3
