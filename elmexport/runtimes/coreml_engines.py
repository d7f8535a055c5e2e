"""Engines of Core ML packages: the MIL executor, at exactly the sizes that are needed or at the declared ones, and Core ML itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmexport.contracts.coreml import (
    CACHE_OUTPUTS,
    DECODE,
    HIDDEN,
    HIDDEN_OUT,
    INPUT_IDS,
    LAST_TOKEN,
    POSITION,
    PREFILL,
    TOKEN,
    VALUE,
)
from elmexport.errors import VerificationError
from elmexport.mil.coremltools_import import quiet_coremltools
from elmexport.mil.executor import MilModel, Precision, States
from elmexport.mil.narrowing import CannotNarrowError
from elmexport.mil.program import Program
from elmexport.runtimes.coreml_contract import Contract


class Engine(Protocol):
    """Engine of a package, with the cache of one sequence. One token goes to `decode`, more to `prefill`."""

    def calls(self, count: int, position: int, first: int) -> Iterator[tuple[int, int]]:
        """Split `count` tokens at `position` into calls, bounds `[start, stop)`; `first` is the first token whose logits are wanted."""

    def logits(self, ids: NDArray[np.int32], position: int, rows: int) -> NDArray[np.float32]:
        """Logits `[rows, vocab]` of the last `rows` of `ids` `[n]`, which `calls` gave; 0 rows only fill the cache."""

    def token(self, ids: NDArray[np.int32], position: int) -> int:
        """The most likely token after `ids`; of a package that gives it."""


def padded_calls(contract: Contract, count: int, position: int, first: int) -> Iterator[tuple[int, int]]:
    """Split tokens into calls (`Engine.calls`) where `prefill` takes whole chunks only, and gives what follows one token.

    The last chunk is padded, or goes token by token where a padded one would not fit the cache; everything after the first logits that are
    wanted goes token by token too.
    """
    chunk = contract.interface.prefill
    start = 0
    while start < count:
        prefilled = start < first and position + start + chunk <= contract.context
        stop = min(start + chunk, first + 1) if prefilled else start + 1
        yield start, stop
        start = stop


class MilEngine(ABC):
    """MIL executor. Scores of a package that gives the most likely token can be read too.

    `model` is the contract's program with its scores among the outputs (`Contract.with_scores`).
    """

    def __init__(self, model: MilModel, contract: Contract) -> None:
        self.model, self.contract = model, contract
        types = model.function(PREFILL).types()
        self.caches: States = {name: torch.zeros([size or 0 for size in types[name].shape]) for name in contract.caches}

    @abstractmethod
    def calls(self, count: int, position: int, first: int) -> Iterator[tuple[int, int]]:
        """See `Engine`."""

    @abstractmethod
    def _given(self, ids: Tensor) -> Tensor:
        """What `prefill` gets for `ids` `[…, n]`."""

    @abstractmethod
    def _seen(self, caches: States, tokens: int) -> States:
        """What a function gets of `caches`, which are written or read up to `tokens`."""

    def logits(self, ids: NDArray[np.int32], position: int, rows: int) -> NDArray[np.float32]:
        tokens = torch.from_numpy(ids[None])
        results = self.step(self.caches, tokens, position, rows, scores=rows > 0)
        if not rows:
            return np.empty((0, self.contract.vocab_size), np.float32)
        scores = self.scores(results, tokens)
        if self.contract.interface.argmax:
            _check_most_likely(scores, results)
        return scores[0].numpy()

    def token(self, ids: NDArray[np.int32], position: int) -> int:
        return int(self.step(self.caches, torch.from_numpy(ids[None]), position, 1, scores=False)[TOKEN])

    def step(self, caches: States, ids: Tensor, position: int, rows: int, *, scores: bool) -> dict[str, Tensor]:
        """Run one function on `ids` `[1, n]` at `position`: outputs after the last `rows` tokens. Keys and values go into `caches`.

        Of a batch, `ids` and `caches` have one more axis in front.
        """
        count = ids.shape[-1]
        function = PREFILL if count > 1 else DECODE
        own, shared = {INPUT_IDS: ids}, {POSITION: torch.tensor([position], dtype=torch.int32)}
        if function == PREFILL:
            own[INPUT_IDS] = self._given(ids)
            shared[LAST_TOKEN] = torch.arange(count - max(rows, 1), count, dtype=torch.int32)
        wanted: tuple[str, ...] = (TOKEN, VALUE) if self.contract.interface.argmax and rows else ()
        wanted += self.contract.scores[function] if scores else ()
        states: States = {}
        if self.contract.interface.cache_io:
            own |= self._seen(caches, max(position, 1))
            wanted += tuple(self.contract.caches.values())
        else:
            states = self._seen(caches, position + count)
        if ids.ndim == 2:
            results = self.model.run({**own, **shared}, states, function, outputs=wanted)
        else:
            results = self.model.run_batch(own, shared, states, function, outputs=wanted)
        for name, cache in caches.items():
            if self.contract.interface.cache_io:
                cache[..., position : position + count, :] = results[self.contract.caches[name]][..., :count, :]
            elif states[name].data_ptr() != cache.data_ptr():  # the executor made a new tensor instead of writing into the view
                cache[..., : position + count, :] = states[name]
        return results

    def scores(self, results: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """Logits among the `results` of a step that read `ids`, `[…, rows, vocab]`."""
        return torch.cat([results[name] for name in self.contract.scores[PREFILL if ids.shape[-1] > 1 else DECODE]], -1)


class PaddedMilEngine(MilEngine):
    """MIL executor at the functions' declared sizes, as Core ML runs them: chunks are padded, one row of logits comes of each call."""

    def calls(self, count: int, position: int, first: int) -> Iterator[tuple[int, int]]:
        return padded_calls(self.contract, count, position, first)

    def _given(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.pad(ids, (0, self.contract.interface.prefill - ids.shape[-1]))

    def _seen(self, caches: States, tokens: int) -> States:
        return caches


class WholeChunkMilEngine(PaddedMilEngine):
    """As `PaddedMilEngine`, but `last_token` takes as many entries as logits are wanted, so that all of a chunk come of one call."""

    def calls(self, count: int, position: int, first: int) -> Iterator[tuple[int, int]]:
        chunk, start = self.contract.interface.prefill, 0
        while start < count:
            stop = min(start + chunk, count) if position + start + chunk <= self.contract.context else start + 1
            yield start, stop
            start = stop


class NarrowedMilEngine(MilEngine):
    """MIL executor on no more than is needed: neither padding nor the cache behind the last token is computed.

    `prefill` takes any number of tokens up to its declared one, `last_token` as many entries as logits are wanted, which Core ML cannot give.
    """

    def calls(self, count: int, position: int, first: int) -> Iterator[tuple[int, int]]:
        chunk = self.contract.interface.prefill
        return ((start, min(start + chunk, count)) for start in range(0, count, chunk))

    def _given(self, ids: Tensor) -> Tensor:
        return ids

    def _seen(self, caches: States, tokens: int) -> States:
        return {name: cache[..., :tokens, :] for name, cache in caches.items()}

    def batch(self, ids: NDArray[np.int32], position: int) -> NDArray[np.float32]:
        """Logits `[batch, tokens, vocab]` of `ids` `[batch, tokens]`, each row after the first `position` tokens."""
        batch, length = ids.shape
        caches = copied_prefix(self.caches, batch, position, length)
        parts = []
        for start, stop in self.calls(length, position, 0):
            part = torch.from_numpy(ids[:, None, start:stop])
            results = self.step(caches, part, position + start, part.shape[2], scores=True)
            parts.append(self.scores(results, part)[:, 0])
        return torch.cat(parts, 1).numpy()


def copied_prefix(caches: States, batch: int, position: int, length: int) -> States:
    """Copy the first `position` tokens of `caches` into caches of `batch` sequences, with room for `length` tokens more."""
    copies = {name: cache.new_zeros(batch, *cache[..., : position + length, :].shape) for name, cache in caches.items()}
    for name, copy in copies.items():
        copy[..., :position, :] = caches[name][..., :position, :]
    return copies


_ROWS = {"rows": [(LAST_TOKEN, 0)]}


def open_check_engine(program: Program, contract: Contract) -> MilEngine:
    """Open the MIL executor for a few calls in little memory: functions at their declared sizes, no decompressed weight kept."""
    model = MilModel(contract.with_scores(program), budget=0)
    try:
        return WholeChunkMilEngine(model.narrowed(_ROWS, PREFILL), contract)
    except CannotNarrowError:
        return PaddedMilEngine(model, contract)


def open_mil_engine(program: Program, contract: Contract, precision: Precision) -> MilEngine:
    """Open the MIL executor: narrowed where that gives what the package gives, else padded.

    In a causal model, padding and the cache behind the last token change nothing. That this one is causal is checked by running it a few
    times; where it is not, or an axis cannot be followed, the functions run at their declared sizes.
    """
    model = MilModel(contract.with_scores(program), precision=precision)
    padded = PaddedMilEngine(model, contract)
    # The caches of one package share a mask, and nothing says that those of another one are as long.
    names = list(contract.caches)
    context = {f"context of {keys}": [(keys, 2), (values, 2)] for keys, values in zip(names[::2], names[1::2], strict=True)}
    try:
        every_row = WholeChunkMilEngine(model.narrowed(_ROWS, PREFILL), contract)
        less = model.narrowed({**_ROWS, "tokens": [(INPUT_IDS, 1)], **context}, PREFILL).narrowed(context, DECODE)
    except CannotNarrowError:
        return padded
    narrowed = NarrowedMilEngine(less, contract)
    return narrowed if _agree(padded, every_row, narrowed) else padded


def _agree(padded: MilEngine, every_row: MilEngine, narrowed: MilEngine) -> bool:
    """Whether the first tokens of a chunk get the same logits from a call of their own (`padded` reads one, `narrowed` several) as from a call
    of the whole chunk, `every_row`."""
    chunk, context = padded.contract.interface.prefill, padded.contract.context
    ids = torch.arange(chunk, dtype=torch.int32)[None] % padded.contract.vocab_size
    position = min(1, context - chunk)  # so near the beginning, one token too many in sight makes a difference
    generator = torch.Generator().manual_seed(0)
    caches = {name: torch.randn(cache.shape, generator=generator) for name, cache in padded.caches.items()}

    def logits(engine: MilEngine, count: int) -> Tensor:
        copies = {name: cache.clone() for name, cache in caches.items()}
        return engine.scores(engine.step(copies, ids[:, :count], position, count, scores=True), ids[:, :count])

    full = logits(every_row, chunk)
    if not torch.isfinite(full).all():
        return False  # broken, and nothing to compare by
    tolerance = 1e-2 * float(full.abs().max())  # sums in another order round to another fp16 value here and there

    def close(engine: MilEngine, count: int) -> bool:
        return torch.allclose(logits(engine, count), full[:, :count], rtol=0, atol=tolerance)

    return close(padded, 1) and all(close(narrowed, count) for count in sorted({1, min(3, chunk), chunk - 1} - {0}))


def _check_most_likely(scores: Tensor, results: dict[str, Tensor]) -> None:
    """Compare the package's token and value with its scores. Numbers that are not finite have no order, and are the self-check's business.

    Raises:
        VerificationError: they disagree.
    """
    values, tokens = scores.max(-1)
    if torch.isfinite(scores).all() and not (torch.equal(tokens.int(), results[TOKEN]) and torch.equal(values, results[VALUE])):
        raise VerificationError("the package's token is not the one with the largest logit, or its value another; report it as a bug")


class CoreMLEngine:
    """Core ML, on macOS 15 or later: the packages one after another. Not run on Apple hardware."""

    def __init__(self, programs: Sequence[Program], contract: Contract) -> None:
        with quiet_coremltools():
            from coremltools.models import MLModel

        self.contract = contract
        self._packages = [_Package(program, contract, MLModel) for program in programs]

    def calls(self, count: int, position: int, first: int) -> Iterator[tuple[int, int]]:
        return padded_calls(self.contract, count, position, first)

    def logits(self, ids: NDArray[np.int32], position: int, rows: int) -> NDArray[np.float32]:
        results = self._run(ids, position)
        if not rows:
            return np.empty((0, self.contract.vocab_size), np.float32)
        return np.concatenate([np.asarray(results[name][0], np.float32) for name in self.contract.scores[DECODE]], axis=-1)

    def token(self, ids: NDArray[np.int32], position: int) -> int:
        return int(self._run(ids, position)[TOKEN].item())

    def _run(self, ids: NDArray[np.int32], position: int) -> Any:
        count = len(ids)
        values: dict[str, Any] = {POSITION: np.array([position], np.int32)}
        if count > 1:
            ids = np.pad(ids, (0, self.contract.interface.prefill - count))
            values[LAST_TOKEN] = np.array([count - 1], np.int32)
        values[INPUT_IDS] = ids[None]
        results = {}
        for package in self._packages:
            results = package.run(PREFILL if count > 1 else DECODE, values, position, count)
            values[HIDDEN] = results.get(HIDDEN_OUT)
        return results


class _Package:
    """One package in Core ML, with the cache of its layers."""

    def __init__(self, program: Program, contract: Contract, model: Any) -> None:
        self._functions = program.functions
        self._models = {name: model(str(program.path), function_name=name) for name in (PREFILL, DECODE)}
        self._state = {} if contract.interface.cache_io else {"state": self._models[DECODE].make_state()}
        types = program.function(PREFILL).types()
        self._caches = (
            {name: np.zeros([size or 0 for size in types[name].shape], np.float16) for name in CACHE_OUTPUTS}
            if contract.interface.cache_io
            else {}
        )

    def run(self, function: str, values: Mapping[str, Any], position: int, count: int) -> Any:
        """Outputs of `function` on what it takes of `values`, for `count` tokens at `position`."""
        given = {**values, **self._caches}
        results = self._models[function].predict({name: given[name] for name in self._functions[function].inputs}, **self._state)
        for name, cache in self._caches.items():
            cache[:, :, position : position + count] = results[CACHE_OUTPUTS[name]][:, :, :count]
        return results
