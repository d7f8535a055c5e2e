"""What the program says where memory cannot be had; `tests.endurance.faults --fault memory` takes it away for good."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from elmexport.errors import out_of_memory
from elmexport.models.openelm.catalog import TINY_FOLDER
from tests.cli.conftest import Run

# As the libraries word them.
LACKING = {
    "python": MemoryError(),
    "torch": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    ),
    "loader": ImportError("pydantic_core.so: failed to map segment from shared object"),
    "ctypes": OSError("libggml-base.so: failed to map segment from shared object"),
    "system": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "c++": RuntimeError("std::bad_alloc"),
    "threads": RuntimeError("can't start new thread"),
}


@pytest.mark.parametrize("error", LACKING.values(), ids=LACKING)
def test_a_lack_of_memory_is_said(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def lack(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("elmexport.evaluation.evaluate.evaluate", lack)
    outcome = run("eval", str(TINY_FOLDER))
    found = f" ({error})" if str(error) else ""
    wanted = f"error: not enough memory{found}; close other programs, raise the process's limit, or take a smaller model\n"
    assert (outcome.code, outcome.err) == (3, wanted)


def test_numpys_is_one() -> None:
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 50)
    assert "not enough memory (Unable to allocate 8.00 PiB" in (out_of_memory(caught.value) or "")


def test_what_followed_from_it_is_one_and_others_are_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    followed = ValueError("no such thing")
    followed.__context__ = MemoryError()
    assert out_of_memory(followed) is not None and out_of_memory(ValueError("no such thing")) is None

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr("elmexport.evaluation.evaluate.evaluate", fail)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        run("eval", str(TINY_FOLDER))
