"""Answers kept on disk as they come, so that an interrupted evaluation goes on where it ended and a larger one uses a smaller one's.

One file holds one artifact's answers to one task: JSON lines of a request's hash and its answer. A request's hash covers its whole text,
few-shot examples included, so answers never outlive the question.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from io import BufferedWriter
from pathlib import Path
from typing import Any

from elmexport.documents import decode_json
from elmexport.errors import ElmExportError


class AnswerStore:
    """The answers in `path`, made with its folder when the first one comes. A context manager; also a cache hook for lm-eval's models."""

    def __init__(self, path: Path, on_answer: Callable[[], None] = lambda: None) -> None:
        """`on_answer` is called for every new answer.

        Raises:
            ElmExportError: the file is there but cannot be read.
        """
        self.path = path
        self._on_answer = on_answer
        self._answers = _read(path)
        self._file: BufferedWriter | None = None

    def get(self, kind: str, arguments: tuple[Any, ...]) -> Any:
        """The answer to a request ("loglikelihood", …), None where there is none yet."""
        return self._answers.get(request_hash(kind, arguments))

    def add_partial(self, attr: str, req: tuple[Any, ...], res: Any) -> None:
        """Keep an answer; on disk when this returns, whatever becomes of the process.

        Raises:
            ElmExportError: the file cannot be written.
        """
        key = request_hash(attr, req)
        self._answers[key] = res
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(json.dumps({"request": key, "answer": res}, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise ElmExportError(
                f"cannot write {self.path}: {error.strerror or error}; free space, or choose another folder with ELMEXPORT_CACHE"
            ) from error
        self._on_answer()

    def _open(self) -> BufferedWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("ab")
        if file.tell() and not _ends_a_line(self.path):
            file.write(b"\n")  # a killed process left half a line
        return file

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def request_hash(kind: str, arguments: tuple[Any, ...]) -> str:
    """SHA-256, hex, of a request's kind and all of its text."""
    return hashlib.sha256(json.dumps([kind, *arguments], ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ElmExportError(
            f"cannot read {path}: {error.strerror or error}; remove it, or choose another folder with ELMEXPORT_CACHE"
        ) from None
    answers = {}
    for line in lines:
        try:
            entry: Mapping[str, Any] = decode_json(line)
            answers[entry["request"]] = entry["answer"]
        except (ValueError, KeyError, TypeError):
            continue  # half a line, of a process that was killed: that question is asked again
    return answers


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
