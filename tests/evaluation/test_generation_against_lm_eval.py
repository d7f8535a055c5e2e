"""Generated answers are those of lm-eval's own Hugging Face backend: stop strings, end of text, numbers of tokens, long prompts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.evaluation.lm import RuntimeLM
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.runtimes.torch import TorchRuntime
from tests.evaluation.lm_eval_backend import backend
from tests.evaluation.wide import Wide

PROMPTS = (
    "It was a dark night, and",
    "The captain said to the young lady:",
    "Question: who was the king of England?\nAnswer:",
    " ".join(["The first men in the moon were not afraid."] * 40),  # longer than the context
)
SETTINGS: dict[str, dict[str, Any]] = {
    "length only": {"max_gen_toks": 24},
    "another name for the length": {"max_tokens": 7, "until": ["\n\n"]},
    "one stop string": {"max_gen_toks": 24, "until": "the"},
    "several": {"max_gen_toks": 24, "until": [", ", ".", "\n"], "do_sample": False, "temperature": 0.0},
    "a stop string over several tokens": {"max_gen_toks": 24, "until": ["of the", " and the"]},
}


def answers(lm: Any, settings: dict[str, Any]) -> list[str]:
    requests = [Instance("generate_until", {}, (prompt, copy.deepcopy(settings)), 0) for prompt in PROMPTS]
    return list(lm.generate_until(requests, disable_tqdm=True))


@pytest.fixture(scope="module")
def trained(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, RuntimeLM]:
    """`tiny`, as lm-eval runs it and as we do."""
    lm = RuntimeLM(TorchRuntime(tiny), load_tokenizer(TINY_FOLDER / "tokenizer.model"))
    return backend(TINY_FOLDER, tmp_path_factory.mktemp("vocabulary")), lm


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_answers(trained: tuple[Any, RuntimeLM], name: str) -> None:
    theirs, ours = (answers(lm, SETTINGS[name]) for lm in trained)
    assert ours == theirs
    assert any(theirs)


@pytest.mark.slow
def test_end_of_text(tmp_path: Path) -> None:
    wide = Wide.make(tmp_path)
    theirs, ours = (answers(lm, {"max_gen_toks": 40}) for lm in (wide.backend, wide.lm))
    assert ours == theirs
    lengths = [len(wide.lm.tokenizer.encode(answer, bos=False)) for answer in theirs]
    assert min(lengths) < 30, lengths  # at least one of them ended before its 40 tokens
