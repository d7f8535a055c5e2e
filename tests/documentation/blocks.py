"""Fenced code blocks of the documentation, and what becomes of each: executed, or not, for a reason that stands above it.

A comment on the line above a fence marks a block:

    <!-- not run: REASON -->    not executed; still parsed, and its `elmexport` commands are still read by the command line
    <!-- file: NAME -->         written under this name into the folder that the page's blocks run in
    <!-- install -->            its steps that install are left out, for the suite runs against what is installed

Blocks are run with the small built-in model in the place of the published sizes: `--model 450M` as `--model tiny`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXECUTED = ("bash", "python")
PARSED = ("js", "swift", "csharp", "json", "yaml", "toml", "xml")
TEXT = ("text",)  # output, drawings: no code
LANGUAGES = (*EXECUTED, *PARSED, *TEXT)

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```\s*?$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"^\s*<!-- (?P<kind>not run: .+|file: \S+|[a-z]+) -->\s*$")
_INSTALLS = re.compile(r"(git|cd|source|\.|(\S*/)?pip3?|(\S*/)?python[\d.]* -m (venv|pip)) ")
_SIZES = re.compile(r"\b(270M|450M|1\.1B|3B)(?![\w.])")
_INCLUDED = re.compile(r"^\s*--8<-- \"(?P<path>[^\"]+)\"$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block; `where` is its page and line."""

    where: str
    language: str
    text: str
    marks: tuple[str, ...]

    @property
    def not_run(self) -> str | None:
        """The reason why it is not executed."""
        return next((mark.removeprefix("not run: ") for mark in self.marks if mark.startswith("not run: ")), None)

    @property
    def file(self) -> str | None:
        """The name of the file that the block is."""
        return next((mark.removeprefix("file: ") for mark in self.marks if mark.startswith("file: ")), None)

    @property
    def with_tiny(self) -> str:
        """The text, published sizes replaced by the built-in model."""
        return _SIZES.sub("tiny", self.text)

    def commands(self) -> list[str]:
        """The shell commands of a `bash` block, one for each line; of an `install` block one for each link of a `&&` chain, installs left out."""
        lines = [line.strip() for line in re.sub(r"\\\n\s*", "", self.with_tiny).splitlines()]
        if "install" in self.marks:
            steps = [re.sub(r"^\S*/elmexport ", "elmexport ", step.strip()) for line in lines for step in line.split("&&")]
            lines = [step for step in steps if not _INSTALLS.match(step)]
        return [line for line in lines if line and not line.startswith("#")]


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a page, in order; files that a block includes are put in their place."""
    text = path.read_text(encoding="utf-8")
    return list(_blocks(text, path.relative_to(ROOT).as_posix()))


def _blocks(text: str, name: str) -> Iterator[Block]:
    for found in _FENCE.finditer(text):
        before = text[: found.start()].splitlines()
        marks = []
        while before and (mark := _MARK.match(before[-1])) is not None:
            marks.append(mark["kind"])
            before.pop()
        indent = len(found["indent"])
        body = "".join(line[indent:] if line.strip() else line for line in found["text"].splitlines(keepends=True))
        body = _INCLUDED.sub(lambda include: (ROOT / include["path"]).read_text(encoding="utf-8"), body)
        yield Block(f"{name}:{text[: found.start()].count(chr(10)) + 1}", found["language"], body, tuple(reversed(marks)))


def parse(markdown: str) -> list[Block]:
    """The blocks of a text that is no file."""
    return list(_blocks(markdown, "text"))


def elmexport_arguments(command: str) -> list[str] | None:
    """The arguments of a command of `elmexport` alone; None for another program's, or where a shell has more to do."""
    words = shlex.split(command, comments=True)
    operators = {"|", "||", "&&", ";", ">", ">>", "<", "&"}
    return words[1:] if words[:1] == ["elmexport"] and not operators & set(words) and "$" not in command else None
