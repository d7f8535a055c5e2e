"""Runs the Core ML packages that we export: by the MIL executor, or on macOS by Core ML itself. Their interface: `elmexport.contracts.coreml`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmexport.mil.executor import Precision
from elmexport.runtimes import coreml_gpu
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.batching import in_padded_batches
from elmexport.runtimes.coreml_chain import join, load_chain
from elmexport.runtimes.coreml_contract import Contract, read_contract
from elmexport.runtimes.coreml_engines import CoreMLEngine, Engine, MilEngine


class CoreMLRuntime(Runtime):
    """Feeds chunks to `prefill`, single tokens to `decode`.

    Where `prefill` takes whole chunks only, the last one is padded, or goes token by token where a padded one would not fit the cache; and
    because it gives what follows one token only, everything after the first logits that are wanted goes token by token too. Padding, and
    entries of a sequence that was left by going back to a smaller position, lie in the cache behind the current token: the causal mask hides
    them, and they are overwritten before they come into sight.
    """

    def __init__(self, contract: Contract, engine: Engine) -> None:
        super().__init__()
        self.name = engine.name
        self.chunk, self.context, self.vocab_size = contract.interface.prefill, contract.context, contract.vocab_size
        self._contract, self._engine = contract, engine
        if contract.interface.argmax:
            self.only_greedy = "this package gives the most likely token and no logits; export it without --argmax"

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        first = len(ids) - last  # whose logits are wanted
        rows = []
        for start, stop in self._chunks(len(ids), position, first):
            rows.append(self._engine.logits(ids[start:stop].astype(np.int32), position + start, min(stop - start, max(0, stop - first))))
        return np.concatenate(rows)

    def _greedy(self, ids: NDArray[np.int64], position: int) -> int:
        if not self._contract.interface.argmax:
            return super()._greedy(ids, position)
        *before, (start, _) = self._chunks(len(ids), position, len(ids) - 1)
        for begin, end in before:
            self._engine.logits(ids[begin:end].astype(np.int32), position + begin, 0)
        return self._engine.token(ids[start:].astype(np.int32), position + start)

    def _chunks(self, count: int, position: int, first: int) -> Iterator[tuple[int, int]]:
        """Bounds of what is read at once, of `count` tokens; `first` is the first whose logits are wanted."""
        start = 0
        while start < count:
            if self._engine.narrowed:
                stop = min(start + self.chunk, count)
            elif start < first and position + start + self.chunk <= self.context:
                stop = min(start + self.chunk, first + 1)
            else:
                stop = start + 1
            yield start, stop
            start = stop

    def _continuations(self, continuations: list[NDArray[np.int64]], position: int) -> list[NDArray[np.float32]]:
        if not (isinstance(self._engine, MilEngine) and self._engine.narrowed):
            return super()._continuations(continuations, position)
        engine = self._engine
        return in_padded_batches(continuations, self.context, position, lambda ids: engine.batch(ids.astype(np.int32), position))


def open_runtime(path: Path, *, precision: Precision = "fp16") -> Runtime:
    """Open an artifact folder that holds one `.mlpackage`, or the package itself. `precision` is the MIL executor's.

    Raises:
        ElmExportError: no package, a damaged one, or one of another contract.
    """
    programs = load_chain(path)
    if coreml_gpu.matches(programs[0]):
        return coreml_gpu.open_program(programs[0], programs[0].path, precision)
    program = join(programs, path)
    contract = read_contract(program)  # before any engine, which says less clearly what is wrong with a package of another kind
    native = sys.platform == "darwin"
    return CoreMLRuntime(contract, CoreMLEngine(programs, contract) if native else MilEngine(program, contract, precision))


def open_for_check(path: Path) -> Runtime:
    """As `open_runtime`; of a package that gives the most likely token, the MIL executor reads the logits that it is taken from.

    Such a runtime's `logits` also compare the two, and raise VerificationError where they disagree.
    """
    program = join(load_chain(path), path)
    if coreml_gpu.matches(program) or not (contract := read_contract(program)).interface.argmax:
        return open_runtime(path)
    runtime = CoreMLRuntime(contract, MilEngine(program, contract, "fp16"))
    runtime.only_greedy = None
    return runtime
