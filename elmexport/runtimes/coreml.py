"""Runs the Core ML packages that we export: by the MIL executor, or on macOS by Core ML itself.

The contract of a package: functions `prefill` (a fixed number T of tokens) and `decode` (one token); inputs `input_ids` int32 `[1, T]` and
`position` int32 `[1]`; states `key_cache` and `value_cache` `[1, KV heads, context, head_dim]`; output `logits` fp16 `[1, T, vocab]`. Sizes are
read from the program's types. The part that calls Core ML (`_CoreML`) has not been run on Apple hardware.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.batching import batches, copies, padded
from elmexport.runtimes.mil.coremltools_import import quiet_coremltools
from elmexport.runtimes.mil.executor import MilModel, Precision, States
from elmexport.runtimes.mil.narrowing import CannotNarrowError
from elmexport.runtimes.mil.program import MilFunction, Program, load_program

PREFILL, DECODE = "prefill", "decode"
INPUT_IDS, POSITION, LOGITS = "input_ids", "position", "logits"
KEY_CACHE, VALUE_CACHE = "key_cache", "value_cache"


class _Engine(Protocol):
    name: str

    @property
    def narrowed(self) -> bool:
        """Whether `prefill` takes any number of tokens up to T; otherwise a short chunk is padded."""

    def logits(self, function: str, ids: NDArray[np.int32], position: int, wanted: bool) -> NDArray[np.float32]:
        """`[T, vocab]` of `ids` `[T]`; unless `wanted`, rows may be missing."""


class CoreMLRuntime(Runtime):
    """Feeds chunks to `prefill`, single tokens to `decode`.

    Where `prefill` takes whole chunks only, the last one is padded, or goes token by token where a padded one would not fit the cache.
    Padding, and entries of a sequence that was left by going back to a smaller position, lie in the cache behind the current token: the
    causal mask hides them, and they are overwritten before they come into sight.
    """

    def __init__(self, program: Program, engine: _Engine) -> None:
        super().__init__()
        self.name = engine.name
        self.chunk, self.context, self.vocab_size = _sizes(program)
        self._engine = engine

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        rows = []
        start = 0
        while start < len(ids):
            left = len(ids) - start
            if left == 1 or (not self._engine.narrowed and position + start + self.chunk > self.context):
                count, function = 1, DECODE
            else:
                count, function = min(left, self.chunk), PREFILL
            chunk = ids[start : start + count]
            if function == PREFILL and not self._engine.narrowed:
                chunk = np.pad(chunk, (0, self.chunk - count))
            wanted = min(count, max(0, start + count - (len(ids) - last)))  # rows of this chunk
            logits = self._engine.logits(function, chunk.astype(np.int32), position + start, wanted > 0)
            if wanted:
                rows.append(logits[count - wanted : count])
            start += count
        return np.concatenate(rows)

    def _continuations(self, continuations: list[NDArray[np.int64]], position: int) -> list[NDArray[np.float32]]:
        if not (isinstance(self._engine, _MilEngine) and self._engine.narrowed):
            return super()._continuations(continuations, position)
        results: dict[int, NDArray[np.float32]] = {}
        for group in batches([len(ids) for ids in continuations], rows=copies(self.context, position)):
            ids = padded([continuations[index] for index in group])
            logits = self._engine.batch(ids.astype(np.int32), position)
            results |= {index: row[: len(continuations[index])] for index, row in zip(group, logits, strict=True)}
        return [results[index] for index in range(len(continuations))]


class _MilEngine:
    """The MIL executor. `fp32` rounds nothing.

    Padding and the cache behind the last token are not computed, where the program's axes can be followed: in a causal model they change
    nothing. That this model's results are the same without them is checked before it is relied on; if they are not, or an axis cannot be
    followed, the functions run at their full sizes, as Core ML runs them.
    """

    def __init__(self, program: Program, precision: Precision) -> None:
        self.name = "mil executor" if precision == "fp16" else "mil executor, fp32"
        self.model = MilModel(program, precision=precision)
        self.chunk, self.context, self.vocab_size = _sizes(program)
        self._states = self.model.make_states(PREFILL)

    @cached_property
    def narrowed(self) -> bool:
        if self.chunk <= 3 or self.context <= self.chunk:
            return False
        ids = torch.arange(self.chunk, dtype=torch.int32)[None] % self.vocab_size
        position, lengths = 1, (3, self.chunk - 1)  # so near the beginning, one token too many in sight makes a difference
        states = {name: torch.randn(state.shape, generator=torch.Generator().manual_seed(0)) for name, state in self._states.items()}
        one = self._run(DECODE, ids[:, :1], position, states, True)
        full = self._run(PREFILL, ids, position, states, True)
        if not torch.isfinite(full).all():
            return False  # broken, and nothing to compare by
        cache = [(KEY_CACHE, 2), (VALUE_CACHE, 2)]
        try:
            self.model.narrow({"tokens": [(INPUT_IDS, 1)], "context": cache}, PREFILL)
            self.model.narrow({"context": cache}, DECODE)
        except CannotNarrowError:
            return False
        checks = [(DECODE, one), *((PREFILL, full[:, :length]) for length in lengths)]
        tolerance = 1e-2 * float(full.abs().max())  # sums in another order round to another fp16 value here and there
        return all(
            torch.allclose(
                self._run(function, ids[:, : rows.shape[1]], position, _cut(states, position + rows.shape[1]), True),
                rows,
                rtol=0,
                atol=tolerance,
            )
            for function, rows in checks
        )

    def logits(self, function: str, ids: NDArray[np.int32], position: int, wanted: bool) -> NDArray[np.float32]:
        if not self.narrowed:
            return self._run(function, torch.from_numpy(ids[None]), position, self._states, wanted)[0].numpy()
        cut = _cut(self._states, position + len(ids))
        logits = self._run(function, torch.from_numpy(ids[None]), position, cut, wanted)
        _put_back(cut, self._states)
        return logits[0].numpy()

    def _run(self, function: str, ids: Tensor, position: int, states: States, wanted: bool) -> Tensor:
        inputs = {INPUT_IDS: ids, POSITION: torch.tensor([position], dtype=torch.int32)}
        results = self.model.run(inputs, states, function, outputs=(LOGITS,) if wanted else ())
        return results[LOGITS] if wanted else torch.empty(1, 0, self.vocab_size)

    def batch(self, ids: NDArray[np.int32], position: int) -> NDArray[np.float32]:
        """`[batch, tokens, vocab]` of `ids` `[batch, tokens]`, each row after the first `position` tokens; only if `narrowed`."""
        batch, length = ids.shape
        states = {name: state.new_zeros(batch, *state[..., : position + length, :].shape) for name, state in self._states.items()}
        for name, state in states.items():
            state[..., :position, :] = self._states[name][..., :position, :]
        parts = []
        for start in range(0, length, self.chunk):
            part = torch.from_numpy(ids[:, None, start : start + self.chunk])
            here, end = torch.tensor([position + start], dtype=torch.int32), position + start + part.shape[2]
            cut = _cut(states, end)
            function = DECODE if part.shape[2] == 1 else PREFILL
            parts.append(self.model.run_batch({INPUT_IDS: part}, {POSITION: here}, cut, function)[LOGITS][:, 0])
            _put_back(cut, states)
        return torch.cat(parts, 1).numpy()


def _cut(states: States, tokens: int) -> States:
    """Views of the first `tokens` tokens, of one sequence or a batch."""
    return {name: state[..., :tokens, :] for name, state in states.items()}


def _put_back(cut: States, states: States) -> None:
    """Where the executor made a new tensor instead of writing into the view."""
    for name, view in cut.items():
        if view.data_ptr() != states[name].data_ptr():
            states[name][..., : view.shape[-2], :] = view


class _CoreML:
    """Core ML, on macOS 15 or later. Not run on Apple hardware."""

    name = "core ml"
    narrowed = False

    def __init__(self, path: Path) -> None:
        with quiet_coremltools():
            import coremltools

        self._models = {name: coremltools.models.MLModel(str(path), function_name=name) for name in (PREFILL, DECODE)}
        self._state = self._models[DECODE].make_state()

    def logits(self, function: str, ids: NDArray[np.int32], position: int, wanted: bool) -> NDArray[np.float32]:
        inputs = {INPUT_IDS: ids[None], POSITION: np.array([position], np.int32)}
        return np.asarray(self._models[function].predict(inputs, state=self._state)[LOGITS][0], dtype=np.float32)


def open_runtime(path: Path, *, precision: Precision = "fp16") -> CoreMLRuntime:
    """Open an artifact folder that holds one `.mlpackage`, or the package itself. `precision` is the MIL executor's.

    Raises:
        ElmExportError: no package, a damaged one, or one of another contract.
    """
    package = _find_package(path)
    program = load_program(package)
    _sizes(program)  # first: an engine says less clearly what is wrong with a package of another kind
    return CoreMLRuntime(program, _CoreML(package) if sys.platform == "darwin" else _MilEngine(program, precision))


def _find_package(path: Path) -> Path:
    if path.suffix == ".mlpackage":
        return path
    packages = sorted(path.glob("*.mlpackage"))
    if len(packages) != 1:
        found = ", ".join(package.name for package in packages) or "none"
        raise ElmExportError(f"{path} should hold one .mlpackage, and holds {found}; give the package itself")
    return packages[0]


def _sizes(program: Program) -> tuple[int, int, int]:
    """Tokens of `prefill`, context, vocabulary.

    Raises:
        ElmExportError: not a package of the contract above.
    """
    problem = _problem(program.functions)
    if problem is not None:
        raise ElmExportError(
            f"{program.path} is not a language model as this version exports them ({problem}); run it with elmexport.runtimes.mil directly"
        )
    prefill = program.functions[PREFILL]
    (_, tokens), (*_, context, _), (*_, vocab) = (
        prefill.inputs[INPUT_IDS].shape,
        prefill.states[KEY_CACHE].shape,
        prefill.output_types()[LOGITS].shape,
    )
    assert tokens is not None and context is not None and vocab is not None
    return tokens, context, vocab


def _problem(functions: Mapping[str, MilFunction]) -> str | None:
    """How the functions differ from the contract; None if they do not."""
    if set(functions) != {PREFILL, DECODE}:
        return f"its functions are {', '.join(functions)}, not {PREFILL} and {DECODE}"
    for name, function in functions.items():
        for what, found, wanted in (
            ("inputs", function.inputs, (INPUT_IDS, POSITION)),
            ("states", function.states, (KEY_CACHE, VALUE_CACHE)),
            ("outputs", function.outputs, (LOGITS,)),
        ):
            if set(found) != set(wanted):
                return f"{what} of {name} are {', '.join(found) or 'none'}, not {', '.join(wanted)}"
        kinds = dict(function.inputs) | dict(function.states) | function.output_types()
        ranks = {INPUT_IDS: 2, POSITION: 1, KEY_CACHE: 4, VALUE_CACHE: 4, LOGITS: 3}
        if any(None in kind.shape or len(kind.shape) != ranks[key] for key, kind in kinds.items()):
            return f"shapes of {name} are {', '.join(f'{key} {list(kind.shape)}' for key, kind in kinds.items())}"
    if functions[DECODE].inputs[INPUT_IDS].shape != (1, 1):
        return f"{DECODE} does not take one token"
    return None
