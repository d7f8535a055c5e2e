"""Files of prompts: a line each, or a row each of JSON lines."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from elmexport.documents import parse_json
from elmexport.errors import ElmExportError


def read_prompts(path: Path) -> list[str]:
    """Prompts in a file: its lines, or in a `.jsonl` the text of each row, or its key `prompt`. Empty lines are none.

    Raises:
        ElmExportError: no such file, not UTF-8 text, no prompt in it, or a row of another kind.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ElmExportError(f"cannot read {path}: {error.strerror or error}; --prompts takes a text file, a prompt a line") from None
    except UnicodeDecodeError:
        raise ElmExportError(f"{path} is not UTF-8 text; --prompts takes a text file, a prompt a line, or JSON lines") from None
    return _parsed(text, path)


def bundled_prompts() -> list[str]:
    """A few prompts that come with elmexport: questions, facts, and beginnings of stories."""
    return _parsed((files("elmexport.runtimes") / "prompts.txt").read_text(encoding="utf-8"), Path("prompts.txt"))


def _parsed(text: str, path: Path) -> list[str]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    prompts = (
        [_row(line, f"{path}, line {number}") for number, line in lines]
        if path.suffix == ".jsonl"
        else [line.rstrip("\r") for _, line in lines]
    )
    if not prompts:
        raise ElmExportError(f"{path} holds no prompt; write one a line")
    return prompts


def _row(line: str, where: str) -> str:
    fix = 'give a text, or {"prompt": "…"}, a line'
    row = parse_json(line.encode(), where, fix)
    prompt = row.get("prompt") if isinstance(row, dict) else row
    if not isinstance(prompt, str):
        raise ElmExportError(f"{where} holds no prompt; {fix}")
    return prompt
