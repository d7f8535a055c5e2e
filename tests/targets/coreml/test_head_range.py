"""Logits beyond fp16: bounded from the weights, held at fp16's end by both forms, and named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from elmexport.errors import ElmExportError, VerificationError
from elmexport.exporting import export_checkpoint
from elmexport.models import trace
from elmexport.quantization.recipes import resolve
from elmexport.quantization.weight_source import CheckpointWeights
from elmexport.runtimes import open_artifact
from elmexport.target import find_target, wider_formats
from elmexport.weights import Role
from targets.coreml.head_range import LOGIT_SCALE, guard_head
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import reference_logits

TABLE, TOKEN = "transformer.token_embeddings.weight", 300


def with_row_times(checkpoint: MemoryCheckpoint, factor: float) -> MemoryCheckpoint:
    table = checkpoint.arrays[TABLE].copy()
    table[TOKEN] *= np.float32(factor)
    return MemoryCheckpoint(checkpoint.config, checkpoint.arrays | {TABLE: table}, tokenizer_path=checkpoint.tokenizer_path)


def weights_of(checkpoint: MemoryCheckpoint) -> CheckpointWeights:
    return CheckpointWeights(checkpoint, resolve(find_target("coreml").recipe("fp16"), checkpoint.config))


def test_no_logit_exceeds_the_bound(small_checkpoint: MemoryCheckpoint) -> None:
    checkpoint = with_row_times(small_checkpoint, 1e5)
    graph, found = guard_head(trace(checkpoint.config), weights_of(checkpoint))
    assert found is not None and found.tensor == TABLE and found.tokens == (TOKEN,)
    ids = np.random.default_rng(0).integers(0, 512, 64)
    logits = reference_logits(checkpoint.config, checkpoint.arrays, ids)
    assert 0.05 * found.bound < np.abs(logits[:, TOKEN]).max() <= found.bound
    (head,) = (node for node in graph.nodes if node.role is Role.LM_HEAD)
    assert found.bound * head.attrs[LOGIT_SCALE] < 65504


def test_ordinary_models_are_left_as_they_are(small_checkpoint: MemoryCheckpoint) -> None:
    graph = trace(small_checkpoint.config)
    assert guard_head(graph, weights_of(small_checkpoint)) == (graph, None)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"device": "gpu"}], ids=["neural-engine", "gpu"])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_infinite_logit_leaves_the_package(
    small_checkpoint: MemoryCheckpoint, tmp_path: Path, settings: dict[str, str], sign: int
) -> None:
    """Whatever it is asked afterwards: the text of the self-check is not the last word."""
    checkpoint = with_row_times(small_checkpoint, sign * 3e4)
    result = export_checkpoint(checkpoint, "coreml", "fp16", out=tmp_path / "out", settings=settings)
    (note,) = (note for note in result.notes if "beyond fp16's 65504" in note)
    assert note.startswith(f"the logit of token {TOKEN} (row {TOKEN} of {TABLE}) may reach ") and len(note) < 600
    ids = np.random.default_rng(1).integers(0, 512, 48)
    ids[5] = TOKEN
    expected = reference_logits(checkpoint.config, checkpoint.arrays, ids)
    assert np.abs(expected[:, TOKEN]).max() > 65504
    runtime = open_artifact(tmp_path / "out")
    try:
        logits = runtime.logits(ids)
    finally:
        runtime.close()
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[:, TOKEN], np.clip(expected[:, TOKEN], -65504, 65504), rtol=0.02, atol=500)
    others = np.delete(np.arange(512), TOKEN)
    assert np.abs(logits[:, others] - expected[:, others]).max() < 0.1


@pytest.mark.slow
def test_more_than_one_token_at_the_end_is_named(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    """Two logits that fp16 cannot tell apart are no answer any more."""
    table = small_checkpoint.arrays[TABLE].copy()
    table[TOKEN], table[TOKEN + 1] = 3e4 * table[TOKEN], 6e4 * table[TOKEN]
    checkpoint = MemoryCheckpoint(
        small_checkpoint.config, small_checkpoint.arrays | {TABLE: table}, tokenizer_path=small_checkpoint.tokenizer_path
    )
    with pytest.raises(VerificationError) as caught:
        export_checkpoint(checkpoint, "coreml", "fp16", out=tmp_path / "out")
    message = str(caught.value)
    assert f"the logit of token {TOKEN + 1} (and of 1 more) reaches" in message and f"row {TOKEN + 1} of {TABLE} is too large" in message
    assert "elmexport gguf --quant fp32" in message and "choose --quant" not in message and len(message) < 600
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "advice"),
    [
        (
            "coreml",
            "coreml files hold and compute fp16 whatever the --quant: correct the row in the checkpoint, or export with `elmexport onnx --quant fp32`",
        ),
        ("onnx", "choose --quant fp32"),
        ("gguf", "choose --quant bf16 or fp32"),
    ],
)
def test_weights_beyond_fp16_get_advice_that_the_format_has(
    small_checkpoint: MemoryCheckpoint, tmp_path: Path, target: str, advice: str
) -> None:
    checkpoint = with_row_times(small_checkpoint, 1e6)
    with pytest.raises(ElmExportError) as caught:
        export_checkpoint(checkpoint, target, "fp16", out=tmp_path / "out", verify=False)
    message = str(caught.value)
    assert f"{TABLE} reaches" in message and f"in row {TOKEN}, beyond fp16's 65504; {advice}" in message and len(message) < 600


@pytest.mark.slow
def test_a_large_row_counts_for_the_residual_stream(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    """A token that the measured text does not have."""
    checkpoint = with_row_times(small_checkpoint, 6e4)
    result = export_checkpoint(checkpoint, "coreml", "fp16", out=tmp_path / "out")
    largest = float(np.abs(checkpoint.arrays[TABLE]).max())
    calibration = result.manifest.calibration
    assert calibration is not None and calibration.residual_peak is not None
    assert calibration.residual_peak >= 0.999 * largest and 4 * largest * result.manifest.alpha <= 65504 * 1.001


def test_advice_names_what_exists() -> None:
    for name in ("coreml", "onnx", "gguf"):
        target = find_target(name)
        for quant in ("fp32", "bf16"):
            assert (f"choose --quant {quant}" in wider_formats(target) or f"or {quant}" in wider_formats(target)) is (
                quant in target.quants
            )


def test_the_head_of_an_untied_model(small_checkpoint: MemoryCheckpoint) -> None:
    config = replace(small_checkpoint.config, share_input_output_layers=False)
    head = small_checkpoint.arrays[TABLE].copy()
    head[TOKEN] *= np.float32(1e5)
    checkpoint = MemoryCheckpoint(config, small_checkpoint.arrays | {"lm_head.weight": head})
    _, found = guard_head(trace(config), weights_of(checkpoint))
    assert found is not None and (found.tensor, found.tokens) == ("lm_head.weight", (TOKEN,))
