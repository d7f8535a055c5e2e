"""What an export's weights are made of: options that fit together, statistics or text, the cache, weight sets, and what is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration import calibrated
from calibration.calibrate import make_sample
from calibration.collect import collect
from calibration.method import Prepared
from calibration.options import WeightOptions
from calibration.preparation import prepare
from calibration.second_moments import upper_factor
from calibration.statistics import Statistics
from calibration.text import Sample, sample_ids
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.evaluation.self_check import TOKENS as TOKENS_READ
from elmexport.evaluation.self_check import reference_pass
from elmexport.importance import read_importance, write_importance
from elmexport.models import trace
from elmexport.progress import SilentProgress
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Recipe, Rule
from elmexport.quantization.schemes import Float, find_scheme
from elmexport.target import find_target
from elmexport.weights import Role
from tests.memory_checkpoint import MemoryCheckpoint

RECIPE = Recipe("int4", "", Float("fp32"), Float("fp32"), Float("fp16"), Float("fp32"), 1.0, (Rule(find_scheme("int4-block32")),))
DOWN = "transformer.layers.2.ffn.proj_2.weight"
NORM = "transformer.layers.2.attn_norm.weight"
TOKENS = 1024


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture(scope="module")
def statistics(small_checkpoint: MemoryCheckpoint) -> Statistics:
    return collect(small_checkpoint, make_sample(small_checkpoint, tokens=TOKENS), hessian=True)


def prepared(checkpoint: MemoryCheckpoint, **options: Any) -> Prepared:
    chosen = WeightOptions(**options)
    importance = None if chosen.importance_matrix is None else read_importance(chosen.importance_matrix, checkpoint)
    return prepare(checkpoint, find_target("onnx"), RECIPE, chosen, SilentProgress(), importance=importance)


def codes(found: Prepared, name: str = DOWN) -> torch.Tensor:
    weight = found.weights.get(found.weights.specs[name])
    assert isinstance(weight, IntegerTensor)
    return weight.codes


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"method": "magic"}, "--method magic does not exist; choose mse, rtn, gptq, distill, awq"),
    "calibrated without calibration": ({"method": "gptq", "calibrate": "none"}, "--method gptq is calibrated; leave --calibrate none out"),
    "tokens of no text": ({"tokens": 5}, "--tokens is how much of a calibration text to read, and none is read here"),
    "tokens of statistics": ({"method": "gptq", "calibrate": Path("a.safetensors"), "tokens": 5}, "none is read here"),
    "two sources": ({"method": "gptq", "weights_from": Path("a.safetensors")}, "--weights-from brings the codes; leave --method"),
    "size and drop": ({"bits_per_weight": 5.0, "max_drop": 1.0}, "--bits-per-weight gives the size, --max-drop finds it"),
    "drop below zero": ({"max_drop": -1.0}, "--max-drop is -1; it is in percentage points of accuracy"),
    "tokens of an importance matrix": ({"calibrate": Path("a.gguf"), "tokens": 5}, "none is read here"),
    "nothing to save": ({"save_weights_to": Path("a.safetensors")}, "--method mse finds codes as it writes them"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_do_not_fit_are_refused(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ElmExportError, match=message.replace("(", r"\(")):
        WeightOptions(**options)


@pytest.mark.parametrize(("target", "quant"), [("gguf", "q4_k_m"), ("coreml", "lut4")])
def test_rtn_of_searched_parameters_is_refused_before_any_work(tiny: Checkpoint, target: str, quant: str) -> None:
    chosen = find_target(target)
    with pytest.raises(ElmExportError, match=r"--method rtn does not exist for .*choose --method mse"):
        prepare(tiny, chosen, chosen.recipe(quant), WeightOptions(method="rtn"), SilentProgress())


def test_mse_and_rtn_read_nothing(small_checkpoint: MemoryCheckpoint) -> None:
    for method in ("mse", "rtn"):
        found = prepared(small_checkpoint, method=method)
        expected = quantize(small_checkpoint.tensor(DOWN), find_scheme("int4-block32"), method)
        assert torch.equal(codes(found), expected.codes)
        assert found.facts == {"method": method, "calibration": None}
        assert found.statistics is None


def test_statistics_weight_the_squares(small_checkpoint: MemoryCheckpoint, statistics: Statistics, tmp_path: Path) -> None:
    statistics.save(tmp_path / "s.safetensors")
    found = prepared(small_checkpoint, calibrate=tmp_path / "s.safetensors")
    spec = small_checkpoint.specs[DOWN]
    expected = quantize(small_checkpoint.tensor(DOWN), find_scheme("int4-block32"), "mse", statistics.moments(spec).mean_square)
    assert torch.equal(codes(found), expected.codes)
    assert not torch.equal(codes(found), codes(prepared(small_checkpoint)))
    assert found.facts["calibration"] == {
        "text": "bundled calibration text",
        "text_sha256": statistics.facts.text_sha256,
        "tokens": statistics.facts.tokens,
        "sequential": False,
    }
    assert found.statistics is not None and found.statistics.residual_peak == statistics.residual_peak


@pytest.mark.slow
def test_the_pass_of_every_export_weights_the_squares(small_checkpoint: MemoryCheckpoint) -> None:
    """Where nothing else does; with the mean squares that a calibration on its text finds."""
    reference = reference_pass(small_checkpoint, trace(small_checkpoint.config), None, SilentProgress())
    ids, _ = sample_ids(None, small_checkpoint.config.vocab_size, "weighting", TOKENS_READ)
    assert not np.array_equal(ids, reference.ids)  # the artifact is checked on another text
    measured = collect(small_checkpoint, Sample(ids[None], "the same"))
    spec = small_checkpoint.specs[DOWN]
    own, expected = reference.statistics.moments(spec), measured.moments(spec)
    assert own is not None and expected is not None
    torch.testing.assert_close(own.mean_square, expected.mean_square, rtol=1e-4, atol=1e-6)
    assert reference.statistics.moments(small_checkpoint.specs[NORM]) is None

    def weighted(recipe: Recipe = RECIPE, **options: Any) -> Prepared:
        return prepare(
            small_checkpoint,
            find_target("onnx"),
            recipe,
            WeightOptions(**options),
            SilentProgress(),
            short_pass=lambda: reference.statistics,
        )

    q = quantize(small_checkpoint.tensor(DOWN), find_scheme("int4-block32"), "mse", own.mean_square)
    assert torch.equal(codes(weighted()), q.codes)
    assert weighted().facts["calibration"]["text_sha256"] == measured.facts.text_sha256
    for options in ({"calibrate": "none"}, {"method": "rtn"}):
        assert weighted(**options).facts["calibration"] is None
    eight = Recipe("8", "", Float("fp32"), Float("fp16"), Float("fp32"), Float("fp16"), 1.0, (Rule(find_scheme("int8-block32")),))
    assert weighted(eight).facts["calibration"] is None  # nothing to search


@pytest.mark.slow
def test_an_importance_matrix_weights_the_squares(small_checkpoint: MemoryCheckpoint, statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_importance(statistics, small_checkpoint.config, path)
    found = prepared(small_checkpoint, calibrate=path)
    expected = quantize(
        small_checkpoint.tensor(DOWN), find_scheme("int4-block32"), "mse", statistics.moments(small_checkpoint.specs[DOWN]).mean_square
    )
    assert (codes(found) != expected.codes).float().mean() < 0.001  # the file holds sums in float32
    assert found.facts["calibration"]["text"] == "bundled calibration text"
    assert found.statistics is not None and found.statistics.residual_peak is None
    assert codes(prepared(small_checkpoint, calibrate=path, method="awq")).shape == expected.codes.shape
    with pytest.raises(ElmExportError, match="hold no Hessians, which gptq needs"):
        prepared(small_checkpoint, calibrate=path, method="gptq")


@pytest.mark.slow
def test_more_damping_than_usual_is_said(small_checkpoint: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the codes are computed, and when they come from the cache."""
    attempts = iter([None])

    def failing(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor | None:
        found = upper_factor(matrix, order)
        return next(attempts, found) if len(matrix) == small_checkpoint.specs[DOWN].shape[1] else found

    assert prepared(small_checkpoint, method="gptq", tokens=256).notes == ()
    monkeypatch.setattr("calibration.sequential.fit", lambda halves, start: (None, start))
    monkeypatch.setattr("calibration.sequential.choose_damping", lambda first, second, start: 0.01)
    monkeypatch.setattr("calibration.gptq.upper_factor", failing)
    first = prepared(small_checkpoint, method="gptq", tokens=512)
    assert len(first.notes) == 1 and "took 0.1 of its mean diagonal as damping" in first.notes[0]
    assert prepared(small_checkpoint, method="gptq", tokens=512).notes == first.notes


def test_a_text_is_measured(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 40)
    found = prepared(small_checkpoint, calibrate=tmp_path / "mine.txt", tokens=256)
    assert found.facts["calibration"]["text"] == "mine.txt"
    assert not torch.equal(codes(found), codes(prepared(small_checkpoint)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_gptq_is_computed_once(small_checkpoint: MemoryCheckpoint, cache: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    first = prepared(small_checkpoint, method=method, tokens=TOKENS)
    assert first.facts["calibration"]["sequential"] is True
    assert len(list(cache.iterdir())) == 1

    def again(*_: object) -> None:
        pytest.fail("computed again")

    monkeypatch.setattr(calibrated, "quantize_in_order", again)
    second = prepared(small_checkpoint, method=method, tokens=TOKENS)
    assert torch.equal(codes(first), codes(second))
    assert second.facts == first.facts


@pytest.mark.slow
def test_each_method_and_text_has_a_set_of_its_own(
    small_checkpoint: MemoryCheckpoint, statistics: Statistics, cache: Path, tmp_path: Path
) -> None:
    statistics.save(tmp_path / "s.safetensors")
    options: list[dict[str, Any]] = [
        {"method": "gptq", "tokens": TOKENS},
        {"method": "gptq", "tokens": 256},
        {"method": "gptq", "calibrate": tmp_path / "s.safetensors"},
        {"method": "awq+gptq", "tokens": TOKENS},
    ]
    found = [codes(prepared(small_checkpoint, **chosen)) for chosen in options]
    assert len(list(cache.iterdir())) == len(options)
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.slow
def test_saved_weights_are_used_again(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    """With the norms that AWQ changed."""
    path = tmp_path / "kept" / "w.safetensors"
    first = prepared(small_checkpoint, method="awq+gptq", tokens=TOKENS, save_weights_to=path)
    second = prepared(small_checkpoint, weights_from=path)
    norm = small_checkpoint.specs[NORM]
    assert torch.equal(codes(first), codes(second))
    assert torch.equal(first.weights.get(norm), second.weights.get(norm))  # type: ignore[arg-type]
    assert not torch.equal(second.weights.get(norm), small_checkpoint.tensor(NORM))  # type: ignore[arg-type]
    held_out = first.facts["held_out"]
    assert first.facts == {**second.facts, "held_out": held_out}  # which nobody measures again
    assert held_out["kl"] <= held_out["mse_kl"]
    assert second.facts["method"] == "awq+gptq"


def test_gptq_needs_hessians(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    collect(small_checkpoint, make_sample(small_checkpoint, tokens=256)).save(tmp_path / "s.safetensors")
    with pytest.raises(ElmExportError, match="hold no Hessians, which gptq needs; make them with `elmexport calibrate --hessian`"):
        prepared(small_checkpoint, method="gptq", calibrate=tmp_path / "s.safetensors")


def test_a_cache_that_cannot_be_written(small_checkpoint: MemoryCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ElmExportError, match=r"cannot write .*ELMEXPORT_CACHE"):
        prepared(small_checkpoint, method="gptq", tokens=256)


@pytest.mark.parametrize(
    ("target", "scheme", "message"),
    [
        ("onnx", "lut4-group8", r"stores .* \(attention.qkv\) as .*; onnx stores .*integers of 4 or 8 bits in blocks of 16"),
        ("gguf", "int4-block64", r"\(attention.qkv\) as .*; gguf stores fp32, fp16, bf16, int8-block32"),
        ("onnx", "int5-block32", r"\(attention.qkv\) as 5-bit .*; onnx stores .*integers of 4 or 8 bits in blocks of 16"),
        ("coreml", "int6-block32", r"\(attention.qkv\) as 6-bit .*; coreml stores fp16, symmetric integers of 4 or 8 bits"),
        (
            "gguf",
            "int6-block32",
            r"\(attention.qkv\) as 6-bit .*; gguf stores .*int8-block32, int5-block32, int4-block32, and ggml's own types",
        ),
        ("coreml", "ggml-q4_k", r"\(attention.qkv\) as .*; coreml stores "),
    ],
)
def test_a_scheme_that_the_format_cannot_hold_is_refused_before_any_work(
    small_checkpoint: MemoryCheckpoint, target: str, scheme: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = (Rule(find_scheme(scheme), frozenset({Role.ATTENTION_QKV})), Rule(Float("fp16")))
    recipe = Recipe("mine", "", Float("fp16"), Float("fp16"), Float("fp16"), Float("fp16"), 1.0, rules)
    if scheme == "ggml-q4_k":
        monkeypatch.setattr(type(find_scheme(scheme)), "refuses", lambda self, shape: None)
    with pytest.raises(ElmExportError, match=message):
        prepare(small_checkpoint, find_target(target), recipe, WeightOptions(method="gptq"), SilentProgress())
