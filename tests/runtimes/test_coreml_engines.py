"""The choice between the MIL executor's two engines: narrowed where a package is causal and its axes can be followed, else padded."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb

from elmexport.mil.executor import MilModel
from elmexport.mil.narrowing import CannotNarrowError
from elmexport.runtimes.coreml import CoreMLRuntime, open_for_check, open_runtime
from elmexport.runtimes.coreml_engines import NarrowedMilEngine, PaddedMilEngine
from targets.coreml.neural_engine import cache
from tests.conftest import ExportTo, SmallArtifact
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import kl

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="on macOS Core ML itself runs the package, not the executor tested here")


@pytest.mark.slow
def test_our_packages_are_narrowed(small_artifact: SmallArtifact) -> None:
    for quant in ("fp16", "int4"):
        runtime = open_runtime(small_artifact("coreml", quant))
        assert isinstance(runtime, CoreMLRuntime)
        assert runtime._engine is None  # opening runs nothing
        assert isinstance(runtime.engine(), NarrowedMilEngine)
        assert runtime.engine() is runtime.engine()


class ShiftedMask:
    """The MIL builder, with a `greater` that lets each token see the one after it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(mb, name)

    def greater(self, x: Any, y: Any) -> Any:
        return mb.greater(x=x, y=mb.add(x=y, y=np.int32(1)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("_HIDDEN", 0.0), ("mb", ShiftedMask())], ids=["hides nothing", "one too many"])
def test_a_model_that_is_not_causal_is_run_in_full(
    small_checkpoint: MemoryCheckpoint, export_to: ExportTo, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    """With a mask like these, what lies behind the last token counts: the padded chunk's results are the package's."""
    monkeypatch.setattr(cache, name, value)
    path = export_to(small_checkpoint, "coreml", "fp16")
    runtime = open_runtime(path)
    assert isinstance(runtime, CoreMLRuntime)
    assert isinstance(runtime.engine(), PaddedMilEngine)
    (package,) = path.glob("*.mlpackage")
    model, ids = MilModel(package), np.arange(3, 13)
    padded = torch.from_numpy(np.pad(ids, (0, runtime.chunk - len(ids)))[None])
    inputs = {"input_ids": padded, "position": torch.zeros(1, dtype=torch.int32), "last_token": torch.tensor([len(ids) - 1])}
    expected = model.run(inputs, model.make_states(), "prefill")["logits"][0].numpy()
    assert kl(expected, runtime.logits(ids, last=1)).max() < 1e-6
    for row in runtime.continuations([ids[:4], ids[4:]], 0):
        assert np.isfinite(row).all()


def test_a_model_whose_axes_cannot_be_followed_is_run_in_full(small_artifact: SmallArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise CannotNarrowError("an axis is needed in full")

    path, ids = small_artifact("coreml", "fp16"), np.arange(3, 13)
    expected = open_runtime(path).logits(ids)
    monkeypatch.setattr(MilModel, "narrowed", refuse)
    runtime = open_runtime(path)
    assert isinstance(runtime, CoreMLRuntime)
    assert isinstance(runtime.engine(), PaddedMilEngine)
    assert kl(expected, runtime.logits(ids)).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"kv": "io"}, {"argmax": True}, {"device": "gpu"}], ids=["state", "io", "argmax", "gpu"])
def test_a_check_reads_what_an_evaluation_reads(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, options: dict[str, Any]) -> None:
    """In chunks and one by one, at the declared sizes, with no decompressed weight kept."""
    path = export_to(small_checkpoint, "coreml", "int4", settings=options)
    ids = np.random.default_rng(0).integers(0, small_checkpoint.config.vocab_size, 90)
    checked, evaluated = open_for_check(path), open_runtime(path)
    evaluated.only_greedy = None
    for start, stop in ((0, 84), (84, 85), (85, 90)):
        assert kl(evaluated.logits(ids[start:stop], start), checked.logits(ids[start:stop], start)).max() < 1e-4
    engine = checked.engine() if isinstance(checked, CoreMLRuntime) else checked._engine  # type: ignore[attr-defined]
    assert engine.model._store._kept == {}
