"""Runs the Core ML packages that we export: by the MIL executor, or on macOS by Core ML itself.

The contract of a package: functions `prefill` (a fixed number T of tokens) and `decode` (one token); inputs `input_ids` int32 `[1, T]` and
`position` int32 `[1]`; states `key_cache` and `value_cache` `[1, KV heads, context, head_dim]`; output `logits` fp16 `[1, T, vocab]`. Sizes are
read from the program's types. The part that calls Core ML (`_CoreML`) has not been run on Apple hardware.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from elmexport.errors import ElmExportError
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.mil.coremltools_import import quiet_coremltools
from elmexport.runtimes.mil.executor import MilModel, Precision
from elmexport.runtimes.mil.program import MilFunction, Program, load_program

PREFILL, DECODE = "prefill", "decode"
INPUT_IDS, POSITION, LOGITS = "input_ids", "position", "logits"
KEY_CACHE, VALUE_CACHE = "key_cache", "value_cache"


class _Engine(Protocol):
    name: str

    def logits(self, function: str, ids: NDArray[np.int32], position: int) -> NDArray[np.float32]:
        """`[T, vocab]` of `ids` `[T]`, as many as `function` takes."""


class CoreMLRuntime(Runtime):
    """Feeds whole chunks to `prefill`, the rest padded; token by token through `decode` where a padded chunk would not fit the cache.

    Padding, and entries of a sequence that was left by going back to a smaller position, lie in the cache behind the current token: the
    causal mask hides them, and they are overwritten before they come into sight.
    """

    def __init__(self, program: Program, engine: _Engine) -> None:
        super().__init__()
        self.name = engine.name
        self.chunk, self.context, self.vocab_size = _sizes(program)
        self._engine = engine

    def _forward(self, ids: NDArray[np.int64], position: int, last_only: bool) -> NDArray[np.float32]:
        rows = []
        start = 0
        while start < len(ids):
            left = len(ids) - start
            if left == 1 or position + start + self.chunk > self.context:
                count, chunk, function = 1, ids[start : start + 1], DECODE
            else:
                count, function = min(left, self.chunk), PREFILL
                chunk = np.pad(ids[start : start + count], (0, self.chunk - count))
            logits = self._engine.logits(function, chunk.astype(np.int32), position + start)
            start += count
            if not last_only:
                rows.append(logits[:count])
            elif start == len(ids):
                rows.append(logits[count - 1 : count])
        return np.concatenate(rows)


class _MilEngine:
    """The MIL executor. `fp32` rounds nothing."""

    def __init__(self, program: Program, precision: Precision) -> None:
        self.name = "mil executor" if precision == "fp16" else "mil executor, fp32"
        self.model = MilModel(program, precision=precision)
        self._states = self.model.make_states(PREFILL)

    def logits(self, function: str, ids: NDArray[np.int32], position: int) -> NDArray[np.float32]:
        inputs = {INPUT_IDS: torch.from_numpy(ids[None]), POSITION: torch.tensor([position], dtype=torch.int32)}
        return self.model.run(inputs, self._states, function)[LOGITS][0].numpy()


class _CoreML:
    """Core ML, on macOS 15 or later. Not run on Apple hardware."""

    name = "core ml"

    def __init__(self, path: Path) -> None:
        with quiet_coremltools():
            import coremltools

        self._models = {name: coremltools.models.MLModel(str(path), function_name=name) for name in (PREFILL, DECODE)}
        self._state = self._models[DECODE].make_state()

    def logits(self, function: str, ids: NDArray[np.int32], position: int) -> NDArray[np.float32]:
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
