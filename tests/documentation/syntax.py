"""Syntax of languages whose compilers are not here: JavaScript by Node, Swift and C# by tree-sitter's grammars."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

GRAMMARS = {"swift": "tree_sitter_swift", "csharp": "tree_sitter_c_sharp"}


def syntax_error(language: str, text: str) -> str | None:
    """The first line that the grammar does not know, or None. A parser knows no types: what it takes may still not compile."""
    if language == "js":
        return _javascript_error(text)
    tree_sitter = pytest.importorskip(
        "tree_sitter", reason="Swift and C# are parsed by tree-sitter: pip install tree-sitter tree-sitter-swift tree-sitter-c-sharp"
    )
    grammar = importlib.import_module(GRAMMARS[language])
    tree = tree_sitter.Parser(tree_sitter.Language(grammar.language())).parse(text.encode())
    lines = [node.start_point[0] for node in _nodes(tree.root_node) if node.is_error or node.is_missing]
    return f"line {min(lines) + 1}: {text.splitlines()[min(lines)]}" if lines else None


def _nodes(root: Any) -> Iterator[Any]:
    yield root
    for child in root.children:
        yield from _nodes(child)


def _javascript_error(text: str) -> str | None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("JavaScript is parsed by Node.js, which is not here: apt-get install nodejs")
    done = subprocess.run([node, "--input-type=module", "--check"], input=text, capture_output=True, text=True)
    return done.stderr if done.returncode else None
