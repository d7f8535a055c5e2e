"""Runtime of the Core ML packages that we export: by the MIL executor, or on macOS by Core ML itself. Their interface: `elmexport.contracts.coreml`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmexport.mil.executor import Precision, executor_name
from elmexport.runtimes import coreml_gpu
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.batching import in_padded_batches
from elmexport.runtimes.coreml_chain import join, load_chain
from elmexport.runtimes.coreml_contract import Contract, read_contract
from elmexport.runtimes.coreml_engines import CoreMLEngine, Engine, NarrowedMilEngine, open_check_engine, open_mil_engine


class CoreMLRuntime(Runtime):
    """A Core ML package, or several in a chain, with one sequence in its cache: several tokens go to `prefill`, single ones to `decode`.

    Padding, and entries of a sequence that was left by going back to a smaller position, lie in the cache behind the current token: the
    causal mask hides them, and they are overwritten before they come into sight.
    """

    def __init__(self, contract: Contract, name: str, open_engine: Callable[[], Engine]) -> None:
        """`open_engine` is called when the first tokens come."""
        super().__init__()
        self.name = name
        self.chunk, self.context, self.vocab_size = contract.interface.prefill, contract.context, contract.vocab_size
        self._contract, self._open_engine = contract, open_engine
        self._engine: Engine | None = None
        if contract.interface.argmax:
            self.only_greedy = "this package gives the most likely token and no logits; export it without --argmax"

    def engine(self) -> Engine:
        """Open the engine that executes the package, at the first call."""
        if self._engine is None:
            self._engine = self._open_engine()
        return self._engine

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        engine, first = self.engine(), len(ids) - last  # the first whose logits are wanted
        rows = []
        for start, stop in engine.calls(len(ids), position, first):
            rows.append(engine.logits(ids[start:stop].astype(np.int32), position + start, min(stop - start, max(0, stop - first))))
        return np.concatenate(rows)

    def _greedy(self, ids: NDArray[np.int64], position: int) -> int:
        if not self._contract.interface.argmax:
            return super()._greedy(ids, position)
        engine = self.engine()
        *before, (start, _) = engine.calls(len(ids), position, len(ids) - 1)
        for begin, end in before:
            engine.logits(ids[begin:end].astype(np.int32), position + begin, 0)
        return engine.token(ids[start:].astype(np.int32), position + start)

    def _continuations(self, continuations: list[NDArray[np.int64]], position: int) -> list[NDArray[np.float32]]:
        engine = self.engine()
        if not isinstance(engine, NarrowedMilEngine):
            return super()._continuations(continuations, position)
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
    if sys.platform == "darwin":
        engine = CoreMLEngine(programs, contract)
        return CoreMLRuntime(contract, "core ml", lambda: engine)
    # Later, because the choice between the executor's two forms runs the model.
    return CoreMLRuntime(contract, executor_name(precision), lambda: open_mil_engine(program, contract, precision))


def open_for_check(path: Path) -> Runtime:
    """As `open_runtime`, in little memory: the MIL executor at the functions' declared sizes, which decompresses weights for every call.

    Of a package that gives the most likely token, it reads the logits that the token is taken from. Such a runtime's `logits` also compare
    the two, and raise VerificationError where they disagree. On macOS, Core ML runs all other packages.
    """
    programs = load_chain(path)
    if coreml_gpu.matches(programs[0]):
        return coreml_gpu.open_program(programs[0], programs[0].path, "fp16", budget=0)
    program = join(programs, path)
    contract = read_contract(program)
    if sys.platform == "darwin" and not contract.interface.argmax:
        return open_runtime(path)
    runtime = CoreMLRuntime(contract, executor_name("fp16"), lambda: open_check_engine(program, contract))
    runtime.only_greedy = None
    return runtime
