"""What onnxruntime says of calls that the model cannot answer, in sessions of anyone's: an error each time, no made-up logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint

CONTEXT, VOCABULARY = 32, 512


@pytest.fixture(
    scope="module", params=[(ops, quant) for ops in ("fast", "standard") for quant in ("fp32", "int4", "int4-all")], ids="-".join
)
def session(request: pytest.FixtureRequest, small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> onnxruntime.InferenceSession:
    ops, quant = request.param
    folder: Path = export_to(small_checkpoint, "onnx", quant, context=CONTEXT, settings={"ops": ops})
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(next(folder.glob("onnx/*.onnx")), options, providers=["CPUExecutionProvider"])


def call(session: onnxruntime.InferenceSession, ids: Any, total: int | None = None, rows: int | None = None) -> NDArray[np.float32]:
    """Logits of `ids`, `total` tokens with those in the cache, whose batch is `rows`."""
    ids = np.asarray(ids, np.int64)
    total = ids.shape[1] if total is None else total
    feed = {"input_ids": ids, "attention_mask": np.ones((len(ids), total), np.int64)}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):
            _, heads, fixed, head_dim = entry.shape
            length = fixed if isinstance(fixed, int) else total - ids.shape[1]
            feed[entry.name] = np.zeros((rows or len(ids), heads, length, head_dim), np.float32)
    logits: NDArray[np.float32] = session.run(["logits"], feed)[0]
    return logits


@pytest.mark.slow
def test_what_it_does_answer(session: onnxruntime.InferenceSession) -> None:
    assert call(session, np.arange(CONTEXT)[None]).shape == (1, 1, VOCABULARY)
    assert call(session, [[1], [VOCABULARY - 1]], CONTEXT).shape == (2, 1, VOCABULARY)


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(Exception) as raised:  # onnxruntime's exceptions share no base class of their own
        call(*arguments, **options)
    assert type(raised.value).__module__.startswith("onnxruntime.")
    return str(raised.value)


@pytest.mark.parametrize("beyond", [VOCABULARY, 10**9, -VOCABULARY - 1])
def test_ids_out_of_the_vocabulary(session: onnxruntime.InferenceSession, beyond: int) -> None:
    assert f"idx={beyond} must be within the inclusive range [-{VOCABULARY},{VOCABULARY - 1}]" in refused(session, [[1, beyond]])


def test_a_prompt_longer_than_the_context(session: onnxruntime.InferenceSession) -> None:
    message = refused(session, np.zeros((1, CONTEXT + 1)))
    assert "cos_cache dimension 0 shall not be less than total_sequence_length" in message or "TensorScatter" in message


def test_a_token_after_the_end_of_the_context(session: onnxruntime.InferenceSession) -> None:
    message = refused(session, [[1]], CONTEXT + 1)
    assert "cos_cache dimension 0 shall not be less than total_sequence_length" in message or "TensorScatter" in message


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_of_another_batch(session: onnxruntime.InferenceSession, rows: int) -> None:
    message = refused(session, [[1], [2]], 6, rows=rows)
    assert f"dimension 0 should be batch_size, got {rows}" in message or "TensorScatter" in message
