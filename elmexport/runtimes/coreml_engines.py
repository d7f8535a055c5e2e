"""What executes a package of our contract: the MIL executor, or on macOS Core ML. The second has not been run on Apple hardware."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
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
    """Holds the cache of one sequence. One token goes to `decode`, more to `prefill`."""

    name: str

    @property
    def narrowed(self) -> bool:
        """Whether `prefill` takes any number of tokens up to T and gives the logits of any of them; otherwise chunks are padded, and only
        what follows the last token is given."""

    def logits(self, ids: NDArray[np.int32], position: int, rows: int) -> NDArray[np.float32]:
        """`[rows, vocab]` of the last `rows` of `ids` `[n]`; 0 rows only fill the cache. Unless `narrowed`, 1 row at most."""

    def token(self, ids: NDArray[np.int32], position: int) -> int:
        """The most likely token after `ids`; of a package that gives it."""


class MilEngine:
    """The MIL executor. `fp32` rounds nothing.

    Padding and the cache behind the last token are not computed, where the program's axes can be followed: in a causal model they change
    nothing. And logits of several tokens come from one run, which Core ML cannot give: `last_token` gets as many entries. That this model's
    results are the same so is checked before it is relied on; if they are not, or an axis cannot be followed, the functions run at their
    declared sizes, as Core ML runs them.

    Scores of a package that gives the most likely token can be read too.
    """

    def __init__(self, program: Program, contract: Contract, precision: Precision) -> None:
        self.name = "mil executor" if precision == "fp16" else "mil executor, fp32"
        self.contract = contract
        self.model = MilModel(contract.with_scores(program), precision=precision)
        types = self.model.function(PREFILL).types()
        self._caches: States = {name: torch.zeros([size or 0 for size in types[name].shape]) for name in contract.caches}
        self._narrow = False

    @cached_property
    def narrowed(self) -> bool:
        chunk = self.contract.interface.prefill
        ids = torch.arange(chunk, dtype=torch.int32)[None] % self.contract.vocab_size
        position = min(1, self.contract.context - chunk)  # so near the beginning, one token too many in sight makes a difference
        lengths = sorted({1, min(3, chunk), chunk - 1} - {0})
        generator = torch.Generator().manual_seed(0)
        caches = {name: torch.randn(cache.shape, generator=generator) for name, cache in self._caches.items()}

        def run(count: int) -> Tensor:
            copies = {name: cache.clone() for name, cache in caches.items()}
            return self._scores(self._step(copies, ids[:, :count], position, count, scores=True), ids[:, :count])

        one = run(1)
        # The caches of one package share a mask, and nothing says that those of another one are as long.
        caches_of_all = list(self.contract.caches)
        context = {
            f"context of {keys}": [(keys, 2), (values, 2)] for keys, values in zip(*(caches_of_all[i::2] for i in (0, 1)), strict=True)
        }
        rows = [(LAST_TOKEN, 0)]
        try:
            self.model.narrow({"rows": rows}, PREFILL)
            full = run(chunk)
            if not torch.isfinite(full).all():
                return False  # broken, and nothing to compare by
            self.model.narrow({"rows": rows, "tokens": [(INPUT_IDS, 1)], **context}, PREFILL)
            self.model.narrow(context, DECODE)
        except CannotNarrowError:
            return False
        self._narrow = True
        tolerance = 1e-2 * float(full.abs().max())  # sums in another order round to another fp16 value here and there

        def close(a: Tensor, b: Tensor) -> bool:
            return torch.allclose(a, b, rtol=0, atol=tolerance)

        self._narrow = close(one, full[:, :1]) and all(close(run(length), full[:, :length]) for length in lengths)
        return self._narrow

    def logits(self, ids: NDArray[np.int32], position: int, rows: int) -> NDArray[np.float32]:
        tokens = torch.from_numpy(ids[None])
        results = self._run(tokens, position, rows, scores=rows > 0)
        if not rows:
            return np.empty((0, self.contract.vocab_size), np.float32)
        scores = self._scores(results, tokens)
        if self.contract.interface.argmax:
            _check_most_likely(scores, results)
        return scores[0].numpy()

    def token(self, ids: NDArray[np.int32], position: int) -> int:
        return int(self._run(torch.from_numpy(ids[None]), position, 1, scores=False)[TOKEN])

    def batch(self, ids: NDArray[np.int32], position: int) -> NDArray[np.float32]:
        """`[batch, tokens, vocab]` of `ids` `[batch, tokens]`, each row after the first `position` tokens; only if `narrowed`."""
        batch, length = ids.shape
        caches = {name: cache.new_zeros(batch, *cache[..., : position + length, :].shape) for name, cache in self._caches.items()}
        for name, cache in caches.items():
            cache[..., :position, :] = self._caches[name][..., :position, :]
        parts = []
        for start in range(0, length, self.contract.interface.prefill):
            part = torch.from_numpy(ids[:, None, start : start + self.contract.interface.prefill])
            results = self._step(caches, part, position + start, part.shape[2], scores=True)
            parts.append(self._scores(results, part)[:, 0])
        return torch.cat(parts, 1).numpy()

    def _run(self, ids: Tensor, position: int, rows: int, *, scores: bool) -> dict[str, Tensor]:
        _ = self.narrowed  # decides how to run
        return self._step(self._caches, ids, position, rows, scores=scores)

    def _step(self, caches: States, ids: Tensor, position: int, rows: int, *, scores: bool) -> dict[str, Tensor]:
        """Read `ids` `[1, n]` at `position` into `caches`; of a batch, both have one more axis in front. What follows the last `rows` tokens."""
        count = ids.shape[-1]
        function = PREFILL if count > 1 else DECODE
        if count > 1 and not self._narrow:
            ids = torch.nn.functional.pad(ids, (0, self.contract.interface.prefill - count))
        own, shared = {INPUT_IDS: ids}, {POSITION: torch.tensor([position], dtype=torch.int32)}
        if function == PREFILL:
            shared[LAST_TOKEN] = torch.arange(count - max(rows, 1), count, dtype=torch.int32)
        wanted: tuple[str, ...] = (TOKEN, VALUE) if self.contract.interface.argmax and rows else ()
        wanted += self.contract.scores[function] if scores else ()
        states: States = {}
        if self.contract.interface.cache_io:
            own |= _cut(caches, max(position, 1)) if self._narrow else caches
            wanted += tuple(self.contract.caches.values())
        else:
            states = _cut(caches, position + count) if self._narrow else caches
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

    def _scores(self, results: dict[str, Tensor], ids: Tensor) -> Tensor:
        return torch.cat([results[name] for name in self.contract.scores[PREFILL if ids.shape[-1] > 1 else DECODE]], -1)


def _cut(caches: States, tokens: int) -> States:
    """Views of the first `tokens` tokens, of one sequence or a batch."""
    return {name: cache[..., :tokens, :] for name, cache in caches.items()}


def _check_most_likely(scores: Tensor, results: dict[str, Tensor]) -> None:
    """Numbers that are not finite have no order, and are the self-check's business."""
    values, tokens = scores.max(-1)
    if torch.isfinite(scores).all() and not (torch.equal(tokens.int(), results[TOKEN]) and torch.equal(values, results[VALUE])):
        raise VerificationError("the package's token is not the one with the largest logit, or its value another; report it as a bug")


class CoreMLEngine:
    """Core ML, on macOS 15 or later: the packages one after another. Not run on Apple hardware."""

    name = "core ml"
    narrowed = False

    def __init__(self, programs: Sequence[Program], contract: Contract) -> None:
        with quiet_coremltools():
            from coremltools.models import MLModel

        self.contract = contract
        self._packages = [_Package(program, contract, MLModel) for program in programs]

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
