"""Rows of different lengths in one batch, and the tokens whose logits are computed, in both forms, held against a float64 forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from tests.conftest import ExportTo
from tests.graph.test_forward import token_ids
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import log_probs, reference_logits

CONTEXT = 64


class Session:
    """Plain onnxruntime over the cache that the model asks for: of fixed length, or growing."""

    def __init__(self, folder: Path, batch: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(next(folder.glob("onnx/*.onnx")), options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        self.caches: dict[str, Any] = {}
        for entry in self.session.get_inputs():
            if entry.name.startswith("past_key_values."):
                length = entry.shape[2] if isinstance(entry.shape[2], int) else 0
                self.caches[entry.name] = np.zeros((batch, entry.shape[1], length, entry.shape[3]), np.float32)

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64], keep: int | None) -> NDArray[np.float32]:
        feed = {"input_ids": ids, "attention_mask": mask, **self.caches}
        if keep is not None:
            feed["logits_to_keep"] = np.array(keep)
        out = dict(zip(self.names, self.session.run(self.names, feed), strict=True))
        self.caches = {name: out[name.replace("past_key_values", "present")] for name in self.caches}
        logits: NDArray[np.float32] = out["logits"]
        return logits


@pytest.fixture(scope="module", params=["fast", "standard"])
def operators(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(operators: str, small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> Path:
    return export_to(small_checkpoint, "onnx", "fp32", context=CONTEXT, settings={"ops": operators})


@pytest.fixture(scope="module")
def expected(small_checkpoint: MemoryCheckpoint) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    return lambda ids: log_probs(reference_logits(small_checkpoint.config, small_checkpoint.arrays, ids))


def rows(lengths: list[int], small_checkpoint: MemoryCheckpoint) -> list[NDArray[np.int64]]:
    return [
        token_ids(length, small_checkpoint.config)[::-1].copy() if i % 2 else token_ids(length, small_checkpoint.config)
        for i, length in enumerate(lengths)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [None, 0, 1, 3])
def test_padding(folder: Path, small_checkpoint: MemoryCheckpoint, expected: Any, side: str, keep: int | None) -> None:
    lengths, width, more = [12, 5, 9], 12, 4
    texts = rows([length + more for length in lengths], small_checkpoint)
    session = Session(folder, len(texts))
    ids, mask = np.zeros((3, width), np.int64), np.zeros((3, width), np.int64)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        columns = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, columns], mask[row, columns] = text[:length], 1
    logits = session.run(ids, mask, keep)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        wanted = expected(text[:length])
        if keep == 0:  # every column, where the caller put it
            found = logits[row, mask[row] == 1]
        else:
            found, wanted = logits[row], wanted[-(keep or 1) :]
        assert np.abs(log_probs(found) - wanted).max() < 2e-3
    for step in range(more):  # one token at a time from there, each row at a length of its own
        new = np.array([[text[length + step]] for text, length in zip(texts, lengths, strict=True)])
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)
        logits = session.run(new, mask, keep)
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            assert np.abs(log_probs(logits[row, -1:]) - expected(text[: length + step + 1])[-1:]).max() < 2e-3


@pytest.mark.parametrize("batch", [1, 2])
def test_prefill_in_chunks(folder: Path, operators: str, small_checkpoint: MemoryCheckpoint, expected: Any, batch: int) -> None:
    texts = rows([40] * batch, small_checkpoint)
    session = Session(folder, batch)

    def run(start: int, end: int) -> NDArray[np.float32]:
        return session.run(np.stack([text[start:end] for text in texts]), np.ones((batch, end), np.int64), 0)

    found = [run(0, 7), run(7, 8)]
    if batch > 1 and operators == "fast":  # a limit of onnxruntime's kernel, which says so
        with pytest.raises(
            onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="batch_size must be 1 when sequence_length > 1"
        ):
            run(8, 30)
        return
    found += [run(8, 30), run(30, 40)]
    for row, text in enumerate(texts):
        assert np.abs(log_probs(np.concatenate([part[row] for part in found])) - expected(text)).max() < 2e-3


def test_logits_to_keep_may_be_left_out(folder: Path) -> None:
    session = Session(folder, 1).session
    assert "logits_to_keep" not in {entry.name for entry in session.get_inputs()}
    assert [(entry.name, entry.type, entry.shape) for entry in session.get_overridable_initializers()] == [
        ("logits_to_keep", "tensor(int64)", [])
    ]
