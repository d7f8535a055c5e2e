"""First sentences of docstrings: short, and in the field's terms, so that a search finds what it looks for.

Every module, and every public class and function at the top of a module, has a docstring; methods may do without one where a base class or
a name says it all. A first sentence is at most 130 characters and no question.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import elmexport

ROOT = Path(elmexport.__file__).parents[1]
NOT_YET: tuple[str, ...] = ()
FROZEN = tuple(
    f"elmexport/models/{family}/tiny/train.py" for family in ("openelm", "olmoe")
)  # kept as they were when they made the checkpoints
OPERATIONS = re.compile(r"elmexport/mil/ops_\w+\.py")  # functions named after the MIL operations that they are

LONGEST = 130
QUESTION = re.compile(r"(What|How|Where|Which|Is|Who|Why|When|Raises)\b")
SENTENCE = re.compile(r"(.+?[.?!])(?=\s+[A-Z`\"\[]|\s*$)|.+", re.DOTALL)

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> list[str]:
    paths = (path for folder in ("elmexport", "targets", "calibration") for path in sorted((ROOT / folder).rglob("*.py")))
    names = (path.relative_to(ROOT).as_posix() for path in paths if path.stat().st_size)
    return [name for name in names if name not in FROZEN and not name.startswith(NOT_YET)]


def definitions(node: Definition, name: str) -> Iterator[tuple[str, Definition]]:
    """A module or class, and what is public in it, by dotted name."""
    yield name, node
    for inner in node.body:
        if isinstance(inner, ast.ClassDef) and not inner.name.startswith("_"):
            yield from definitions(inner, f"{name}.{inner.name}")
        elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
            yield f"{name}.{inner.name}", inner


def first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    found = SENTENCE.match(paragraph)
    return "" if found is None else found[0]


def problem(sentence: str) -> str | None:
    """Say what is wrong with the first sentence of a docstring."""
    if not sentence:
        return "is missing"
    if QUESTION.match(sentence) or sentence.endswith("?"):
        return f"is a question, {sentence!r}"
    if len(sentence) > LONGEST:
        return f"has {len(sentence)} characters, {sentence!r}"
    return None


@pytest.mark.parametrize("source", sources())
def test_first_sentences(source: str) -> None:
    module = ast.parse((ROOT / source).read_text(encoding="utf-8"))
    problems = []
    for name, node in definitions(module, source):
        docstring = ast.get_docstring(node)
        inner = name.removeprefix(source)
        optional = inner.count(".") > 1 or (isinstance(node, ast.FunctionDef) and OPERATIONS.fullmatch(source) is not None)
        if docstring is None and optional:
            continue
        found = problem(first_sentence(docstring or ""))
        if found is not None:
            problems.append(f"{name}: the first sentence {found}")
    assert not problems, "\n".join(problems)


def test_words_that_are_wrong() -> None:
    """The checks themselves, on sentences that they are to refuse."""
    assert first_sentence("Compute e.g. a sum,\n  wrapped. More.\n\nRest.") == "Compute e.g. a sum, wrapped."
    assert first_sentence("No full stop") == "No full stop"
    assert problem("Compute the GPTQ codes of one matrix.") is None
    assert problem("Whether the rule is for `spec`.") is None
    for wrong in ("", "What becomes of a model's weights in an export.", "Is an artifact worse? ", "x" * 131, "A riddle, is it not?"):
        assert problem(first_sentence(wrong)) is not None
