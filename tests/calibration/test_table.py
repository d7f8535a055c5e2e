"""The tied embedding by GPTQ: both of its uses count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibration import table
from calibration.calibrate import make_sample
from calibration.collect import collect
from calibration.sensitivity import KLEvaluator
from calibration.table import head_moments, quantize_table
from calibration.text import Sample, bundled_text, sample_windows
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.graph import forward
from elmexport.progress import SilentProgress
from elmexport.quantization.quantize import quantize
from elmexport.quantization.schemes import Integer, find_scheme
from tests.memory_checkpoint import MemoryCheckpoint

TABLE = "transformer.token_embeddings.weight"


@pytest.mark.slow
def test_what_the_head_reads(small_checkpoint: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the whole pass over the same windows measures it."""
    monkeypatch.setattr(table, "TOKENS", 96)
    monkeypatch.setattr(forward, "BATCH_TOKENS", 64)
    ids = np.random.default_rng(0).integers(0, small_checkpoint.config.vocab_size, (7, 32))
    found = head_moments(small_checkpoint, Sample(ids, "random"), SilentProgress())
    expected = collect(small_checkpoint, Sample(ids[:6:2], "random"), hessian=True).moments(small_checkpoint.specs[TABLE])
    assert expected is not None and expected.hessian is not None
    torch.testing.assert_close(found, expected.hessian, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "margin"), [("int4-block32", 0.6), ("int4-block128", 0.6)])
def test_a_quarter_of_the_bits_cost_half_as_much(tiny: Checkpoint, name: str, margin: float) -> None:
    """In divergence on prose that neither `tiny` nor the calibration has read, the table alone quantized."""
    assert tiny.tokenizer_path is not None
    prose = sample_windows(load_tokenizer(tiny.tokenizer_path), [bundled_text("weighting")], "prose", tokens=1280, window=256)
    evaluator, scheme, weight = KLEvaluator(tiny, prose), find_scheme(name), tiny.tensor(TABLE)
    assert isinstance(scheme, Integer)
    hessian = head_moments(tiny, make_sample(tiny, tokens=4096), SilentProgress())
    plain, found = (
        evaluator.divergence({TABLE: q.dequantize()}) for q in (quantize(weight, scheme), quantize_table(weight, scheme, hessian))
    )
    assert found < margin * plain
