"""Texts decoded at once are those that are decoded one by one, token for token, in every engine that can."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.runtimes import open_artifact
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.batch_generation import TEXTS, BatchDecoder, text_groups
from elmexport.runtimes.generation import Stop, generate
from elmexport.runtimes.prompts import bundled_prompts
from elmexport.runtimes.sampler import Sampling
from elmexport.runtimes.sequences import Sequences
from elmexport.runtimes.text import TextModel, TextOptions, open_text_model
from tests.conftest import MadeOnce

VOCAB = 6


class Markov(Runtime):
    """Logits that depend on the last two tokens; those of a step of several sequences are off by up to `error`."""

    name = "markov"
    batch_tokens = 1000

    def __init__(self, error: float = 0.0, *, smooth: bool = False, ties: bool = False) -> None:
        super().__init__()
        self.vocab_size, self.context, self.smooth = VOCAB, 64, smooth
        self.table = np.random.default_rng(0).normal(0, 1.5, (VOCAB, VOCAB, VOCAB)).astype(np.float32)
        if ties:
            self.table[:, :, 1] = self.table.max(2) + 1e-6  # by less than the error the most likely token, or the least of two
            self.table[:, :, 2] = self.table[:, :, 1] - 2e-6
        self.error, self.noise = np.float32(error), np.random.default_rng(1)
        self.together = self.alone = 0
        self.cache: list[int] = []

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        self.cache = [*self.cache[:position], *ids.tolist()]
        return np.stack([self.row(self.cache[: i + 1]) for i in range(position, len(self.cache))][-last:])

    def row(self, text: Sequence[int]) -> NDArray[np.float32]:
        return self.table[text[-2] if len(text) > 1 else 0, text[-1]]

    def _sequences(self, lengths: Sequence[int]) -> Sequences:
        return MarkovSequences(self, len(lengths))


class MarkovSequences(Sequences):
    def __init__(self, runtime: Markov, count: int) -> None:
        self.runtime = runtime
        self.texts: list[list[int]] = [[] for _ in range(count)]

    def read(self, number: int, ids: Sequence[int], position: int) -> NDArray[np.float32]:
        assert position <= len(self.texts[number])
        self.runtime.alone += 1
        self.texts[number][position:] = ids
        return self.runtime.row(self.texts[number])

    def step(self, numbers: Sequence[int], ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        self.runtime.together += 1
        for number, token, position in zip(numbers, ids, positions, strict=True):
            assert position <= len(self.texts[number])
            self.texts[number][position:] = [token]
        rows = np.stack([self.runtime.row(self.texts[number]) for number in numbers])
        noise: NDArray[np.float32] = self.runtime.noise.uniform(-1, 1, rows.shape).astype(np.float32)
        return rows + self.runtime.error * noise


PROMPTS = [[1, 2], [3], [4, 5, 0, 1], [2, 2, 2], [5]]


def decoded(
    runtime: Runtime, sampling: Sampling, prompts: Sequence[Sequence[int]] = PROMPTS, count: int = 40, eos: Sequence[int] = ()
) -> tuple[list[tuple[list[int], Stop | None]], str | None]:
    decoder = BatchDecoder(runtime, sampling, max_tokens=count, eos_ids=eos)
    texts: list[list[int]] = [[] for _ in prompts]

    def give(number: int, token: int) -> bool:
        texts[number].append(token)
        return True

    stops = decoder.decode(prompts, give)
    return list(zip(texts, stops, strict=True)), decoder.note


def one_by_one(
    runtime: Runtime, sampling: Sampling, prompts: Sequence[Sequence[int]] = PROMPTS, count: int = 40, eos: Sequence[int] = ()
) -> list[tuple[list[int], Stop | None]]:
    found = []
    for ids in prompts:
        generation = generate(runtime, ids, max_tokens=count, sampling=sampling, eos_ids=eos)
        found.append((list(generation), generation.stop))
    return found


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(repetition_penalty=1.3), Sampling(1.0, top_k=4, seed=3)], ids=str)
@pytest.mark.parametrize("eos", [[], [3]])
def test_exact_engines(sampling: Sampling, eos: list[int]) -> None:
    """Ends at different tokens, of whatever kind."""
    runtime = Markov()
    for count in (40, 100):
        found, note = decoded(runtime, sampling, count=count, eos=eos)
        assert found == one_by_one(runtime, sampling, count=count, eos=eos)
        assert note is None
    assert ("end of text" if eos else "context full") in {stop for _, stop in found}


def test_engines_that_round_otherwise_go_on_alone() -> None:
    runtime = Markov(1e-6)
    found, note = decoded(runtime, Sampling())
    assert found == one_by_one(runtime, Sampling())
    assert note == "markov rounds otherwise when it reads several texts at once, so each was decoded alone"
    assert runtime.together == 1


def test_engines_that_round_nearly_the_same() -> None:
    """Close calls are decided alone, and there are some."""
    runtime = Markov(4e-6, smooth=True, ties=True)
    found, note = decoded(runtime, Sampling())
    assert found == one_by_one(runtime, Sampling())
    assert note is None and runtime.together > 30
    plain = Markov(4e-6, smooth=True)
    decoded(plain, Sampling())
    assert runtime.alone > plain.alone
    wrong = Markov(1e-3, smooth=True)  # too much for that
    assert decoded(wrong, Sampling()) == (one_by_one(wrong, Sampling()), "markov rounds otherwise when it reads several texts at once, so each was decoded alone")  # fmt: skip


def test_a_seed_is_kept_where_rounding_may_change_what_it_draws() -> None:
    runtime = Markov(1e-6, smooth=True)
    found, note = decoded(runtime, Sampling(1.0, seed=5))
    assert found == one_by_one(runtime, Sampling(1.0, seed=5))
    assert note is not None and "may change what a seed draws" in note
    assert runtime.together == 0
    decoded(runtime, Sampling(1.0))
    assert runtime.together > 30


def test_a_text_that_is_cut_leaves_the_others() -> None:
    given: list[tuple[int, int]] = []

    def give(number: int, token: int) -> bool:
        given.append((number, token))
        return number != 1

    stops = BatchDecoder(Markov(), Sampling(), max_tokens=5, eos_ids=()).decode(PROMPTS, give)
    assert stops == ["max tokens", "stop string", "max tokens", "max tokens", "max tokens"]
    assert [number for number, _ in given].count(1) == 1


def test_groups() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        lengths = generator.integers(1, 60, generator.integers(0, 60)).tolist()
        groups = [lengths[part] for part in text_groups(lengths, 200)]
        assert [length for group in groups for length in group] == lengths
        assert all(len(group) == 1 or (len(group) <= TEXTS and len(group) * max(group) <= 200) for group in groups)
    assert list(text_groups([5] * 40, 10_000)) == [slice(0, 16), slice(16, 32), slice(32, 40)]
    assert list(text_groups([5, 5, 5], 0)) == [slice(0, 1), slice(1, 2), slice(2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "quant", "noted"),
    [("gguf", "int4", False), ("gguf", "q8_0", False), ("gguf", "q4_k_m", True), ("checkpoint", "", False), ("onnx", "int4", False)],
)
def test_texts_are_the_same_as_alone(tiny_artifact: MadeOnce, target: str, quant: str, noted: bool) -> None:
    """`Completion`s of texts of different lengths, one of which a stop string cuts and others fill the context."""
    model = open_text_model(TINY_FOLDER if target == "checkpoint" else tiny_artifact(target, quant))
    prompts = [model.encode(prompt) for prompt in bundled_prompts()]
    prompts[3] = prompts[3] * 40
    prompts[3] = prompts[3][: model.runtime.context - 20]
    for sampling in (Sampling(), Sampling(repetition_penalty=1.2), Sampling(0.9, top_p=0.9, seed=11)):
        options, notes = TextOptions(48, sampling, stop=(" the",)), list[str]()
        alone = [model.complete_ids(ids, options) for ids in prompts]
        written: list[str] = []
        found = list(model.complete_many(prompts, options, written.append, notes.append))
        assert [(one.text, one.tokens, one.stop) for one in found] == [(one.text, one.tokens, one.stop) for one in alone]
        assert "".join(written) == "".join(one.text for one in alone)
        assert bool(notes) is (noted or (target == "checkpoint" and sampling.seed is not None))
    assert model.complete_ids(prompts[0], options).text == alone[0].text  # what comes after a batch is as ever


@pytest.mark.slow
def test_many_greedy_texts_of_the_checkpoint_are_the_same_as_alone() -> None:
    """torch sums otherwise in a batch: no text shows it."""
    runtime, tokenizer = open_artifact(TINY_FOLDER), load_tokenizer(TINY_FOLDER / "tokenizer.model")
    from importlib.resources import files

    text = (files("calibration") / "texts" / "weighting.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, bos=False)
    prompts = [[1, *ids[start : start + 3 + start % 9]] for start in range(0, 4800, 200)]
    for part in range(0, len(prompts), 8):
        some = prompts[part : part + 8]
        found, note = decoded(runtime, Sampling(), some, 40)
        assert note is None
        assert found == one_by_one(runtime, Sampling(), some, 40)


def test_bad_prompts_are_refused_before_any_work() -> None:
    tokenizer, runtime = load_tokenizer(TINY_FOLDER / "tokenizer.model"), Markov()
    model = TextModel("markov", runtime, tokenizer)
    with pytest.raises(ElmExportError, match="the prompt has 70 tokens"):
        model.complete_many([[1, 2], [1] * 70], TextOptions(4))
    assert runtime.alone == runtime.length == 0


@pytest.mark.parametrize("target", ["gguf", "checkpoint"])
def test_ids_outside_the_vocabulary(tiny_artifact: MadeOnce, target: str) -> None:
    runtime = open_artifact(TINY_FOLDER if target == "checkpoint" else tiny_artifact(target, "int4"))
    with pytest.raises(ElmExportError, match="outside the vocabulary"):
        decoded(runtime, Sampling(), [[1], [runtime.vocab_size]], 4)
    assert runtime.logits([1, 2]).shape == (2, runtime.vocab_size)
