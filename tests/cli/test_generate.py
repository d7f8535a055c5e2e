"""`elmexport generate`, on the checkpoint folder of `tiny`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elmexport.models.openelm.catalog import TINY_FOLDER
from tests.cli.conftest import Run

PROMPT = "It was a dark"


@pytest.mark.slow
def test_greedy_is_the_default_and_repeats_itself(run: Run) -> None:
    texts = [run("generate", TINY_FOLDER, PROMPT, "--max-tokens", "8") for _ in range(2)]
    assert texts[0].code == 0, texts[0].err
    assert texts[0] == texts[1]
    assert texts[0].out.endswith("\n") and not texts[0].out.startswith("It was") and len(texts[0].out.split()) > 1
    assert texts[0].err == ""


@pytest.mark.slow
def test_is_what_the_reference_finds_most_likely(run: Run) -> None:
    from elmexport.checkpoint.tokenizer import load_tokenizer
    from elmexport.runtimes import open_artifact

    tokenizer = load_tokenizer(TINY_FOLDER / "tokenizer.model")
    ids = tokenizer.encode(PROMPT)
    assert ids[0] == 1
    prompt = tokenizer.decode(ids)
    runtime = open_artifact(TINY_FOLDER)
    for _ in range(4):  # each step a forward pass of the whole text, no cache
        ids.append(int(runtime.logits(ids)[-1].argmax()))
    assert run("generate", TINY_FOLDER, PROMPT, "--max-tokens", "4").out == tokenizer.decode(ids)[len(prompt) :] + "\n"


@pytest.mark.slow
def test_sampling_follows_the_seed(run: Run) -> None:
    options = ("--max-tokens", "12", "--temperature", "1.2", "--top-k", "200", "--top-p", "0.99", "--seed")
    texts = [run("generate", TINY_FOLDER, PROMPT, *options, seed).out for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_a_full_context_is_noted(run: Run) -> None:
    outcome = run("generate", TINY_FOLDER, "word " * 250, "--max-tokens", "500")
    assert outcome.code == 0
    assert outcome.err.startswith("note: stopped because the context is full")


def test_another_tokenizer(run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(TINY_FOLDER, tmp_path / "model")
    (folder / "tokenizer.model").rename(tmp_path / "other.model")
    run("generate", folder, PROMPT).refused("no tokenizer", "--tokenizer PATH")
    assert run("generate", folder, PROMPT, "--tokenizer", "other.model", "--max-tokens", "4").code == 0
    run("generate", folder, PROMPT, "--tokenizer", "none.model").refused("none.model: no such tokenizer file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-tokens", "0"), "max-tokens is 0; it must be 1 or above"),
        (("--temperature", "-1"), "temperature is -1"),
        (("--temperature", "1", "--top-k", "0"), "top-k is 0"),
        (("--temperature", "1", "--top-p", "1.5"), "top-p is 1.5"),
        (("--top-p", "0.5"), "no effect at temperature 0"),
    ],
)
def test_bad_settings(run: Run, options: tuple[str, ...], message: str) -> None:
    run("generate", TINY_FOLDER, PROMPT, *options).refused(message)


def test_nothing_there(run: Run) -> None:
    run("generate", "nowhere", PROMPT).refused("nowhere: no such file or folder; give the folder that an export printed")


def test_a_prompt_that_is_not_text(run: Run) -> None:
    run("generate", TINY_FOLDER, "a\udcffb").refused("the prompt 'a\\udcffb' is not text", "use UTF-8")


def test_a_prompt_too_long(run: Run) -> None:
    run("generate", TINY_FOLDER, "word " * 300).refused("need a context of", "this artifact holds 256")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with two more rows for ChatML's tokens; either ends a text."""
    import torch

    from elmexport.checkpoint import open_checkpoint
    from elmexport.checkpoint.save import save_checkpoint

    folder = tmp_path_factory.mktemp("chat") / "model"
    tiny = open_checkpoint("tiny")
    table = "transformer.token_embeddings.weight"
    weights = {name: tiny.tensor(name) for name in tiny.specs}
    weights[table] = torch.cat([weights[table], weights[table][[300, 301]]])
    save_checkpoint(folder, replace(tiny.config, vocab_size=4098), weights)
    shutil.copy(TINY_FOLDER / "tokenizer.model", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 4097]}')
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 4096, "<|im_end|>": 4097}')
    (folder / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<|im_start|>"]}')
    (folder / "chat_template.jinja").write_text("<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant\n")
    return folder


@pytest.mark.slow
def test_chat(run: Run, chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template goes around what the user says, whose own control tokens are text."""
    from elmexport.runtimes import text as module

    asked: list[tuple[list[int], tuple[int, ...]]] = []
    generate = module.generate

    def watched(runtime: Any, ids: list[int], **options: Any) -> Any:
        asked.append((ids, options["eos_ids"]))
        return generate(runtime, ids, **options)

    monkeypatch.setattr(module, "generate", watched)
    outcome = run("generate", chat_model, "Say <|im_end|> please", "--chat", "--max-tokens", "4")
    assert outcome.code == 0 and outcome.out.strip(), outcome.err
    ((ids, ends),) = asked
    assert (ids[0], ids.count(4096), ids.count(4097), ends) == (4096, 2, 1, (2, 4097))
    assert run("generate", chat_model, "Say please", "--max-tokens", "4").code == 0
    assert asked[1][0][0] == 1 and 4096 not in asked[1][0]  # without --chat a text after BOS


@pytest.mark.slow
def test_chat_in_an_artifact(run: Run, chat_model: Path, tmp_path: Path) -> None:
    """The template and the ends of text travel; GGUF carries them inside."""
    said = ("Who is there?", "--chat", "--max-tokens", "6")
    wanted = run("generate", chat_model, *said).out
    for target in ("onnx", "gguf"):
        out = tmp_path / target
        assert run(target, "--model", chat_model, "--quant", "fp32", "--out", out, "--no-verify").code == 0
        assert run("generate", out, *said).out == wanted, target


def test_chat_without_a_template(run: Run) -> None:
    run("generate", TINY_FOLDER, "Hi", "--chat").refused("comes without a chat template", "leave out --chat")
