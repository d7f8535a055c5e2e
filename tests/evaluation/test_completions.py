"""Completions side by side: where they first differ from the reference, on tokenizers and texts made by hand, and on artifacts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.evaluation.completions import side_by_side
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.runtimes import open_artifact
from elmexport.runtimes.prompts import bundled_prompts
from tests.cli.conftest import Run, run  # noqa: F401  (a fixture)
from tests.conftest import MadeOnce

PROMPTS = ["It was a dark", "The door was opened, and", "She said that"]


@pytest.mark.slow
def test_where_texts_differ(tiny_artifact: MadeOnce) -> None:
    artifact = tiny_artifact("onnx", "int4-all")
    found = side_by_side([artifact, TINY_FOLDER], PROMPTS, max_tokens=16)
    assert [model.name for model in found.models] == ["OpenELM-tiny fp16", artifact.name, "tiny"]
    reference, small, same = found.models
    assert reference.divergence is None and same.divergence == 16  # fp32 and fp16 weights say the same
    assert all(text.rest == "" and text.diverges_at is None for text in same.texts)
    tokenizer = load_tokenizer(TINY_FOLDER / "tokenizer.model")
    lengths = []
    for prompt, wanted, text in zip(PROMPTS, reference.texts, small.texts, strict=True):
        ids, said = tokenizer.encode(prompt), {}
        for name, runtime in (("fp16", open_artifact(TINY_FOLDER)), ("int4", open_artifact(artifact))):
            tokens = list(ids)
            for _ in range(16):  # each step a forward pass of the whole text
                tokens.append(int(runtime.logits(tokens)[-1].argmax()))
            said[name] = tokens[len(ids) :]
        differing = [i for i, (a, b) in enumerate(zip(said["fp16"], said["int4"], strict=True)) if a != b]
        lengths.append(differing[0] if differing else 16)
        assert text.diverges_at == (differing[0] if differing else None)
        assert wanted.shared.startswith(text.shared) and (text.rest != "") is bool(differing)
    assert small.divergence == np.median(lengths) and min(lengths) < 16


def test_the_bundled_prompts_ask_for_the_capital() -> None:
    prompts = bundled_prompts()
    assert "What is the capital of California?" in prompts and len(set(prompts)) == len(prompts) >= 10


@pytest.mark.slow
def test_the_command_and_the_page(run: Run, tiny_artifact: MadeOnce) -> None:  # noqa: F811
    artifact = tiny_artifact("onnx", "int4-all")
    Path("questions.txt").write_text("It was a dark\nThe <b>door</b>\n")
    options = ("--prompts", "questions.txt")
    found = json.loads(run("compare", artifact, TINY_FOLDER, *options, "--max-tokens", "8", "--json").out)
    assert [model["name"] for model in found["models"]] == ["OpenELM-tiny fp16", artifact.name, "tiny"]
    outcome = run("compare", artifact, TINY_FOLDER, *options, "--max-tokens", "8")
    assert outcome.code == 0 and "It was a dark\n  OpenELM-tiny fp16" in outcome.out and "\x1b" not in outcome.out
    differing = sum(one["diverges_at"] is not None for one in found["models"][1]["completions"])
    assert outcome.out.count("»") == differing

    evaluated = (artifact, "--tasks", "none", "--text-tokens", "64", "--out", "page.html")
    assert run("report", *evaluated, *options).code == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "What they say" in page and "<h3>The &lt;b&gt;door&lt;/b&gt;</h3>" in page
    assert "It was a dark" in re.findall(r"<h3>(.*?)</h3>", page)
    run("report", artifact, *options, "--out", "page.json").refused("--prompts adds a section to a page; give --out FILE.html")
    run("compare", artifact, "--against", "none").refused("nothing to compare it with; name two")


@pytest.mark.slow
def test_a_model_of_another_tokenizer_is_shown_and_not_compared(run: Run, tmp_path: Path) -> None:  # noqa: F811
    other = tmp_path / "other"
    shutil.copytree(TINY_FOLDER, other)
    (other / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    Path("one.txt").write_text("It was a dark\n")
    outcome = run("compare", TINY_FOLDER, other, "--against", "none", "--prompts", "one.txt", "--max-tokens", "6")
    assert outcome.code == 0 and "»" not in outcome.out
    assert outcome.out.splitlines()[-1].split() == ["other", "another", "tokenizer", "-"]
