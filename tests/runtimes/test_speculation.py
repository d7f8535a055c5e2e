"""Speculative decoding: greedy texts are plain decoding's, token for token, in every engine; what is drawn has the distribution of plain sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.runtimes import open_artifact
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.draft_model import find_draft
from elmexport.runtimes.generation import generate
from elmexport.runtimes.sampler import Sampling
from elmexport.runtimes.speculation import Draft, Drafter, DraftModel, PromptLookup
from tests.conftest import MadeOnce

VOCAB = 6


class Markov(Runtime):
    """Logits that depend on the last two tokens; sharp enough that guesses are accepted now and then."""

    name = "markov"

    def __init__(self, seed: int, context: int = 64) -> None:
        super().__init__()
        self.vocab_size, self.context = VOCAB, context
        self.table = np.random.default_rng(seed).normal(0, 1.5, (VOCAB, VOCAB, VOCAB)).astype(np.float32)
        self.cache: list[int] = []
        self.calls = 0

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        self.calls += 1
        self.cache = [*self.cache[:position], *ids.tolist()]
        rows = [self.table[self.cache[i - 1] if i else 0, self.cache[i]] for i in range(position, len(self.cache))]
        return np.stack(rows[-last:])


class Guesses:
    """Guesses the same tokens, whatever came before."""

    count = 4

    def draft(self, text: Sequence[int], count: int) -> Draft:
        return Draft([1, 2, 3, 4][:count])


def lookup(runtime: Runtime, sampling: Sampling) -> Drafter:
    return PromptLookup(4, 2)


def guesses(runtime: Runtime, sampling: Sampling) -> Drafter:
    return Guesses()


def draft_model(runtime: Runtime, sampling: Sampling) -> Drafter:
    return DraftModel(Markov(5), sampling, 3)


DRAFTERS = [lookup, guesses, draft_model]


def tokens(runtime: Runtime, sampling: Sampling, drafter: Drafter | None, prompt: Sequence[int] = (1, 2, 3), count: int = 40) -> list[int]:
    return list(generate(runtime, prompt, max_tokens=count, sampling=sampling, eos_ids=(), drafter=drafter))


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_plain_decoding(drafter: object, penalty: float) -> None:
    sampling = Sampling(repetition_penalty=penalty)
    for seed in range(20):
        runtime = Markov(seed)
        plain = tokens(runtime, sampling, None)
        plain_calls, runtime.calls = runtime.calls, 0
        assert tokens(runtime, sampling, drafter(runtime, sampling)) == plain  # type: ignore[operator]
        assert runtime.calls <= plain_calls + 1  # and one for the trial


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"repetition_penalty": 1.5}], ids=str)
def test_what_is_drawn_has_the_models_distribution(drafter: object, sampling: dict[str, float]) -> None:
    """Chi-square on the third to fifth token, jointly: where guesses are accepted, rejected, and where what follows a guess is drawn."""
    runtime, drawn, expected = Markov(3), np.zeros(VOCAB**3), np.zeros(VOCAB**3)
    prompt, runs = [1, 2, 1, 2], 4000
    settings = Sampling(1.0, seed=0, **sampling)  # type: ignore[arg-type]
    for seed in range(runs):
        own = Sampling(1.0, seed=seed, **sampling)  # type: ignore[arg-type]
        a, b, c = tokens(runtime, own, drafter(runtime, own), prompt, 3)  # type: ignore[operator]
        drawn[(a * VOCAB + b) * VOCAB + c] += 1
    for i in range(VOCAB**3):
        text, chance = list(prompt), runs * 1.0
        for token in (i // VOCAB**2, i // VOCAB % VOCAB, i % VOCAB):
            chance *= settings.probabilities(runtime.table[text[-2], text[-1]], text)[token]
            text.append(token)
        expected[i] = chance
    assert drawn[expected == 0].sum() == 0
    rare = (expected > 0) & (expected < 5)
    groups = np.append(drawn[expected >= 5], drawn[rare].sum()), np.append(expected[expected >= 5], expected[rare].sum())
    likely = groups[1] > 0
    assert stats.chisquare(groups[0][likely], groups[1][likely]).pvalue > 1e-4


def test_guesses_are_counted() -> None:
    runtime = Markov(0)
    runtime.table[:] = -5
    for token in range(VOCAB):
        runtime.table[:, token, (token + 1) % VOCAB] = 5  # 0 1 2 3 4 5 0 1 …
    generation = generate(runtime, [0, 1, 2, 3, 4, 5, 0], max_tokens=28, sampling=Sampling(), eos_ids=(), drafter=PromptLookup(4))
    assert len(list(generation)) == 28
    found = generation.speculation
    assert found is not None
    # One token from the prompt and eight of the trial; then steps of four guesses and one token more, the last of what is left.
    assert (found.steps, found.drafted, found.accepted, found.repeated, found.note) == (4, 15, 15, 0, None)


class Noisy(Markov):
    """Rounds otherwise where several tokens are read at once."""

    noise = 1e-6
    smooth = True

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        rows = super()._forward(ids, position, last)
        return rows + self.noise * np.arange(VOCAB, dtype=np.float32) if len(ids) > 1 and position else rows


def test_tokens_about_as_likely_as_others_are_decoded_again() -> None:
    runtime = Noisy(2)
    runtime.table = np.round(runtime.table)  # many ties, which noise decides otherwise
    prompt = [1, 2, 3, 1, 2, 3]
    plain = tokens(runtime, Sampling(), None, prompt)
    generation = generate(runtime, prompt, max_tokens=40, sampling=Sampling(), eos_ids=(), drafter=PromptLookup(4, 1))
    assert list(generation) == plain
    assert generation.speculation is not None and generation.speculation.repeated > 0


@pytest.mark.parametrize(("noise", "smooth"), [(0.3, True), (1e-6, False)])
def test_an_engine_whose_rounding_depends_on_the_number_of_tokens_decodes_plainly(noise: float, smooth: bool) -> None:
    runtime = Noisy(2)
    runtime.noise, runtime.smooth = noise, smooth
    plain = tokens(runtime, Sampling(), None)
    generation = generate(runtime, [1, 2, 3], max_tokens=40, sampling=Sampling(), eos_ids=(), drafter=PromptLookup(4, 1))
    assert list(generation) == plain
    assert generation.speculation is not None and "rounds otherwise" in str(generation.speculation.note)
    assert generation.speculation.drafted == 0


def test_a_context_that_fills_up() -> None:
    for context in range(12, 24):
        runtime = Markov(1, context)
        for drafter in (PromptLookup(5, 1), Guesses(), DraftModel(Markov(5, 15), Sampling(), 3)):
            generation = generate(runtime, [1, 2, 3], max_tokens=40, sampling=Sampling(), eos_ids=(), drafter=drafter)
            assert list(generation) == tokens(runtime, Sampling(), None)
            assert generation.stop == "context full"


@pytest.mark.parametrize(("count", "size", "message"), [(0, 3, "prompt-lookup is 0"), (4, 0, "ngram-size is 0")])
def test_bad_counts(count: int, size: int, message: str) -> None:
    with pytest.raises(ElmExportError, match=message):
        PromptLookup(count, size)
    with pytest.raises(ElmExportError, match="num-draft-tokens is 0"):
        DraftModel(Markov(0), Sampling(), 0)


PROMPTS = 100  # of guesses that cost nothing; a draft model, which does, has every fifth
LENGTH = 24


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Beginnings of the bundled prose, every tenth twice over, so that there is something to look up."""
    from importlib.resources import files

    text = (files("calibration") / "texts" / "weighting.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(TINY_FOLDER / "tokenizer.model").encode(text, bos=False)
    starts = np.linspace(0, len(ids) - 100, PROMPTS).astype(int)
    return [[1, *(ids[start : start + 8 + i % 17] * (2 if i % 10 == 0 else 1))] for i, start in enumerate(starts)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "quant", "share"),  # the least part of guesses accepted: 0 where rounding forbids to guess
    [
        ("onnx", "int4", 0.3),
        ("onnx", "fp32", 0.3),
        ("gguf", "int4", 0.3),
        ("gguf", "q4_k_m", 0),
        ("mlx", "int4", 0.3),
        ("coreml", "int4", 0),
    ],
)
def test_greedy_is_plain_decoding_in_every_engine(
    tiny_artifact: MadeOnce, prompts: list[list[int]], target: str, quant: str, share: float
) -> None:
    runtime, small = open_artifact(tiny_artifact(target, quant)), open_artifact(TINY_FOLDER)
    runtime.prepare_generation()
    # Fewer for engines that are slow, in fp32, whose guesses are the same, and where nothing is guessed.
    some = prompts if (target, quant) in (("onnx", "int4"), ("gguf", "int4")) else prompts[::10] if share else prompts[::25]
    accepted = drafted = 0
    for number, ids in enumerate(some):
        plain = tokens(runtime, Sampling(), None, ids, LENGTH)
        for drafter in (PromptLookup(6), *([] if number % 5 else [DraftModel(small, Sampling(), 4)])):
            generation = generate(runtime, ids, max_tokens=LENGTH, sampling=Sampling(), eos_ids=(), drafter=drafter)
            assert list(generation) == plain
            assert generation.speculation is not None
            accepted, drafted = accepted + generation.speculation.accepted, drafted + generation.speculation.drafted
    assert accepted >= share * drafted and (drafted > 0) is (share > 0)


def test_flash_attention_changes_little(tiny_artifact: MadeOnce) -> None:
    """llama.cpp's other attention, which generation uses, gives the same logits up to rounding."""
    runtime = open_artifact(tiny_artifact("gguf", "fp32"))
    ids = [1, *range(300, 340)]
    plain = runtime.logits(ids)
    runtime.prepare_generation()
    np.testing.assert_allclose(runtime.logits(ids), plain, atol=0.02)


def test_a_draft_models_cache_follows_the_text() -> None:
    """After guesses that were refused, it guesses as if it had read the whole text."""
    text = [1, 2, 3]
    kept = DraftModel(Markov(5), Sampling(), 3)
    for token in (4, 5, 0, 0, 2, 1):
        text.append(token)
        fresh = DraftModel(Markov(5), Sampling(), 3)
        assert kept.draft(text, 3).tokens == fresh.draft(text, 3).tokens


def test_a_draft_model_with_another_tokenizer(tmp_path: Path) -> None:
    from elmexport.runtimes.text import open_text_model

    folder = tmp_path / "other"
    folder.mkdir()
    for file in TINY_FOLDER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    with pytest.raises(ElmExportError, match="has another tokenizer than"):
        open_text_model(TINY_FOLDER, draft=str(folder))


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("nowhere", "--draft-model nowhere: no such file or folder, and no model; give an artifact, .* tiny, "),
        ("", "no such file or folder, and no model"),
        ("x" * 300, "no such file or folder, and no model"),
        ("some/where/else", "no such file or folder, and no model"),
        ("folder/model.gguf", "folder/model.gguf: no such file or folder"),
        ("empty", "empty: neither an artifact"),
    ],
)
def test_no_draft_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, draft: str, message: str) -> None:
    """Said before the model is opened."""
    from elmexport.runtimes import text

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, "open_as", lambda kind, path: pytest.fail("opened"))
    with pytest.raises(ElmExportError, match=message):
        text.open_text_model(TINY_FOLDER, draft=draft)


def test_a_draft_model_is_an_artifact_or_a_models_name(tiny_artifact: MadeOnce, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of a model's name is meant where it holds a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert find_draft("tiny").open_runtime().name == "torch"
    assert find_draft(str(TINY_FOLDER)).open_runtime().name == "torch"
    (tmp_path / "tiny").rmdir()
    (tmp_path / "tiny").symlink_to(tiny_artifact("onnx", "int4"))
    assert find_draft("tiny").open_runtime().name == "onnxruntime"


def test_a_draft_model_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a hub id is asked of the hub, by the code that exports use."""
    from elmexport.runtimes import draft_model as module

    def open_checkpoint(model: str, *, tokenizer: str | None) -> None:
        raise ElmExportError(f"asked for {model} with {tokenizer}")

    monkeypatch.setattr(module, "open_checkpoint", open_checkpoint)
    with pytest.raises(ElmExportError, match=r"asked for someone/model with t\.model"):
        find_draft("someone/model", Path("t.model"))
