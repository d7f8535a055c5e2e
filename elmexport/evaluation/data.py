"""Rows of tasks from a folder of JSONL files: `NAME.SPLIT.jsonl`, or `NAME.jsonl` for the split that the task itself evaluates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elmexport.documents import decode_json
from elmexport.errors import ElmExportError
from elmexport.evaluation.layouts import DataRow, Kind, Layout

SPLITS = ("test", "validation", "train", "dev")
# Where the split that lm-eval evaluates is not there, the first of these that is.
EVALUATION_FALLBACK = ("validation", "test", "train", "dev")
# Where the split that lm-eval draws few-shot examples from is not there.
FEWSHOT_FALLBACK = ("train", "dev", "validation", "test")
UNNAMED = ""  # the split of NAME.jsonl
_KINDS: Mapping[type, str] = {str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


class LocalData:
    """The files of one folder, read when first asked for."""

    def __init__(self, folder: Path) -> None:
        """Find the JSONL files of a folder.

        Raises:
            ElmExportError: no such folder, or no JSONL file in it.
        """
        if not folder.is_dir():
            raise ElmExportError(f"{folder} is not a folder; --data takes one with files like arc_easy.validation.jsonl")
        self.folder = folder
        self._files = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.suffix == ".jsonl" and path.is_file()}
        if not self._files:
            raise ElmExportError(f"{folder} holds no .jsonl files; --data takes a folder with files like arc_easy.validation.jsonl")
        self._lines: dict[tuple[Path, int], list[DataRow]] = {}

    def splits(self, layout: Layout) -> dict[str, Path]:
        """The files of a data set by split; "" is the split that the task itself evaluates.

        Raises:
            ElmExportError: two files for one split.
        """
        found: dict[str, Path] = {}
        for name in layout.files:
            for split in (*SPLITS, UNNAMED):
                path = self._files.get(f"{name}.{split}.jsonl" if split else f"{name}.jsonl")
                if path is None:
                    continue
                if split in found:
                    raise ElmExportError(f"{found[split]} and {path} both hold {split or 'the'} rows of one data set; leave one of them")
                found[split] = path
        return found

    def lines(self, path: Path, layout: Layout) -> list[DataRow]:
        """The checked and converted rows of a file.

        Raises:
            ElmExportError: not readable, a line that is no JSON object, or a missing column; file, line and column are named.
        """
        key = (path, id(layout))
        if key not in self._lines:
            lines = read_lines(path)
            for line in lines:
                _check(line, layout)
            self._lines[key] = layout.convert(lines)
        return self._lines[key]

    def names(self) -> list[str]:
        """The names of the files."""
        return [path.name for path in self._files.values()]


def read_lines(path: Path) -> list[DataRow]:
    """The rows of a JSONL file; blank lines are left out.

    Raises:
        ElmExportError: not readable, or a line that is no JSON object; file and line are named.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ElmExportError(f"cannot read {path}: {error.strerror or error}") from None
    return [DataRow(str(path), number, _parse(path, number, text)) for number, text in enumerate(raw.split(b"\n"), start=1) if text.strip()]


def _parse(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        row = decode_json(text)
    except UnicodeDecodeError:
        raise ElmExportError(f"{path}, line {number}: not UTF-8 text; download the file again") from None
    except ValueError as error:
        raise ElmExportError(f"{path}, line {number}: not JSON ({error}); download the file again, or mend or remove the line") from None
    if not isinstance(row, dict):
        raise ElmExportError(f"{path}, line {number}: {_describe(row)}, where an object with columns belongs; mend or remove the line")
    return row


def _check(line: DataRow, layout: Layout) -> None:
    columns: Mapping[str, Kind] = layout.columns
    for column, kind in columns.items():
        value: Any = line.row
        for key in column.split("."):
            if not isinstance(value, dict) or key not in value:
                have = ", ".join(line.row) or "none"
                raise ElmExportError(f"{line.place}: column {column} is missing (there are: {have}); the columns are {', '.join(columns)}")
            value = value[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ElmExportError(
                f"{line.place}: column {column} is {_describe(value)}, where {' or '.join(_KINDS[k] for k in kinds)} belongs; mend or remove the line"
            )
        if column not in layout.optional and _holds_nothing(value):
            raise ElmExportError(
                f"{line.place}: column {column} is empty, or holds an empty text: {_describe(value)}; mend or remove the line"
            )


def _holds_nothing(value: Any) -> bool:
    """Whether `value` is empty, or one of the texts in it is."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, dict):  # texts may be keys
        return not value or any(_holds_nothing(part) for item in value.items() for part in item)
    return isinstance(value, list) and (not value or any(map(_holds_nothing, value)))


def _describe(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
