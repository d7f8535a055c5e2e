"""Cores that may be used, and threads that were asked for."""

from __future__ import annotations

import os

import pytest

from elmexport.cores import VARIABLE, asked_threads, available_cores
from elmexport.errors import ElmExportError
from elmexport.runtimes import open_artifact
from tests.conftest import SmallArtifact


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_only_cores_that_may_be_used_count() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert available_cores() == len(allowed)


def test_asked_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert asked_threads() is None
    monkeypatch.setenv(VARIABLE, "")
    assert asked_threads() is None
    monkeypatch.setenv(VARIABLE, "3")
    assert asked_threads() == 3


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²"])
def test_no_number_of_threads(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ElmExportError, match="must be a number of threads"):
        asked_threads()


def test_engines_take_it(monkeypatch: pytest.MonkeyPatch, small_artifact: SmallArtifact) -> None:
    import llama_cpp
    import onnxruntime

    monkeypatch.setenv(VARIABLE, "3")
    options = []
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, **rest: (options.append(given[1]), session(*given, **rest))[1])
    open_artifact(small_artifact("onnx", "int4"))
    assert options[0].intra_op_num_threads == 3
    runtime = open_artifact(small_artifact("gguf", "int4"))
    assert llama_cpp.llama_n_threads(runtime._handle) == 3  # type: ignore[attr-defined]
