"""Control tokens spelled out in a task's text are what lm-eval's Hugging Face backend makes of them: control tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import ModelIds, load_tokenizer
from elmexport.checkpoint.tokenizer.clients import write_tokenizer_files
from elmexport.evaluation.lm import RuntimeLM
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.runtimes.torch import TorchRuntime
from tests.checkpoint.tokenizer.vocabularies import byte_level
from tests.evaluation.lm_eval_backend import ReferenceModel

PAIRS = (
    ("The old man</s> The captain", " went to the sea."),
    ("<s>It was a dark night", " and the wind"),  # no second BOS
    ("It was a dark night ", "</s>"),
    ("", "<s> and nothing before it"),
    ("<unk> is no word", " but a token"),
)


@pytest.fixture(scope="module")
def both(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, RuntimeLM]:
    folder = tmp_path_factory.mktemp("vocabulary")
    tokenizer = load_tokenizer(TINY_FOLDER / "tokenizer.model")
    write_tokenizer_files(tokenizer, 256, folder)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    return HFLM(pretrained=ReferenceModel(TINY_FOLDER), tokenizer=theirs, add_bos_token=True, batch_size=1), RuntimeLM(
        TorchRuntime(tiny), tokenizer
    )


@pytest.mark.slow
def test_ids(both: tuple[Any, RuntimeLM]) -> None:
    theirs, ours = both
    assert ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id
    for text in (text for pair in PAIRS for text in (*pair, "".join(pair))):
        for add in (None, False, True):
            assert ours.tok_encode(text, add) == theirs.tok_encode(text, add), (text, add)


def test_likelihoods(both: tuple[Any, RuntimeLM]) -> None:
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS]
    theirs, ours = (lm.loglikelihood(requests, disable_tqdm=True) for lm in both)
    for (found, greedy), (wanted, theirs_greedy) in zip(ours, theirs, strict=True):
        assert found == pytest.approx(wanted, abs=1e-3, rel=1e-5) and greedy == theirs_greedy
    whole = [Instance("loglikelihood_rolling", {}, ("".join(pair),), 0) for pair in PAIRS]
    theirs, ours = (lm.loglikelihood_rolling(whole, disable_tqdm=True) for lm in both)
    assert ours == pytest.approx(theirs, abs=1e-3, rel=1e-5)


def test_a_model_without_bos(tiny: Checkpoint, tmp_path: Path) -> None:
    """OLMoE's tokenizer has none: the token that ends texts stands for what comes before them, as lm-eval has it."""
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer.json", specials=["</s>"]), ModelIds(None, (0,), 4096))
    folder = tmp_path / "artifact"
    folder.mkdir()
    write_tokenizer_files(tokenizer, 256, folder)
    hugging = transformers.AutoTokenizer.from_pretrained(str(folder))
    theirs = HFLM(pretrained=ReferenceModel(TINY_FOLDER), tokenizer=hugging, batch_size=1)
    ours = RuntimeLM(TorchRuntime(tiny), tokenizer)
    assert ours.prefix_token_id == theirs.prefix_token_id == 0
    for text in ("It was", "</s>It was</s>"):
        for add in (None, False):
            assert ours.tok_encode(text, add) == theirs.tok_encode(text, add)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in (("", "It was"), ("It was", " dark"))]
    found, wanted = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, theirs))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-3, rel=1e-5)
