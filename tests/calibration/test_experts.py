"""Calibration of mixtures of experts: statistics of the tokens that go to each, and GPTQ by them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.calibrated import gptq_weights, moments_of
from calibration.collect import collect
from calibration.experts import is_scarce
from calibration.gptq import output_error
from calibration.options import WeightOptions
from calibration.preparation import prepare
from calibration.statistics import Statistics
from calibration.text import Sample
from elmexport.artifact import Artifact
from elmexport.errors import ElmExportError
from elmexport.exporting import export_checkpoint
from elmexport.importance import read_importance, write_importance
from elmexport.progress import SilentProgress
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan, resolve
from elmexport.quantization.schemes import CodedScheme
from elmexport.target import find_target
from elmexport.weights import Role
from tests.memory_checkpoint import MemoryCheckpoint
from tests.moe_models import SMALL, random_moe, some_ids

SAMPLE = Sample(np.stack([some_ids(SMALL, 64, seed) for seed in range(4)]), "random ids")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))
    yield


@pytest.fixture(scope="module")
def checkpoint() -> MemoryCheckpoint:
    return random_moe()


@pytest.fixture(scope="module")
def statistics(checkpoint: MemoryCheckpoint) -> Statistics:
    return collect(checkpoint, SAMPLE, hessian=True)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return resolve(find_target("onnx").recipe("int4"), SMALL)


def hooked(checkpoint: MemoryCheckpoint) -> dict[str, np.ndarray]:
    """What every expert's gate reads in transformers' model, `[tokens, D]` by our names of the weights."""
    import tempfile

    from transformers import OlmoeForCausalLM

    from elmexport.checkpoint.save import save_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), checkpoint.config, {name: checkpoint.tensor(name) for name in checkpoint.specs})
        model = OlmoeForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    seen: dict[str, list[np.ndarray]] = {}

    def hook(layer: int):  # type: ignore[no-untyped-def]
        def call(module, arguments) -> None:  # type: ignore[no-untyped-def]
            rows, chosen, _ = arguments
            for expert in range(SMALL.num_experts):
                name = f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
                seen.setdefault(name, []).append(rows[(chosen == expert).any(-1)].double().numpy())

        return call

    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(hook(number))
    with torch.inference_mode():
        model(torch.from_numpy(SAMPLE.ids))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def test_moments_are_of_the_tokens_that_go_to_an_expert(checkpoint: MemoryCheckpoint, statistics: Statistics) -> None:
    for name, rows in hooked(checkpoint).items():
        moments = statistics.moments(checkpoint.specs[name])
        assert moments is not None and moments.hessian is not None
        assert moments.tokens == len(rows)
        np.testing.assert_allclose(moments.hessian, rows.T @ rows / max(len(rows), 1), rtol=1e-3, atol=1e-4)
    counts = statistics.routed(checkpoint.specs.values())
    assert list(counts) == [0, 1, 2]
    assert {sum(layer) for layer in counts.values()} == {SAMPLE.tokens * SMALL.num_experts_per_tok}


def test_statistics_are_read_as_they_were_written(checkpoint: MemoryCheckpoint, statistics: Statistics, tmp_path: Path) -> None:
    statistics.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    assert again.routed(checkpoint.specs.values()) == statistics.routed(checkpoint.specs.values())


def test_gptq_makes_less_error_where_its_tokens_are(checkpoint: MemoryCheckpoint, statistics: Statistics, plan: Plan) -> None:
    """Of each expert's own Hessian; where too few tokens came, the codes are those of weighted least squares."""
    found = gptq_weights(checkpoint, plan, statistics, SilentProgress())
    scarce = found.scarce()
    matrices = [spec for spec in checkpoint.specs.values() if spec.role.is_expert]
    assert 0 < len(scarce) < len(matrices)
    get = moments_of(checkpoint, statistics)
    for spec in matrices:
        weight, moments, scheme = checkpoint.tensor(spec.name), get(spec), plan.schemes[spec.name]
        assert moments is not None and moments.hessian is not None and isinstance(scheme, CodedScheme)
        plain = quantize(weight, scheme, "mse", moments.mean_square)
        assert (spec.name in scarce) == is_scarce(moments.tokens, weight)
        if spec.name in scarce:
            assert scarce[spec.name] == moments.tokens < weight.shape[1]
            assert torch.equal(found.get(spec).codes, plain.codes)
        else:
            errors = [output_error(weight - one.dequantize(), moments.hessian) for one in (found.get(spec), plain)]
            assert errors[0] < errors[1]


@pytest.mark.slow
def test_along_the_text_it_loses_less_and_says_which_experts_were_scarce(checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    """Of 40 experts some see few of so short a text: they are listed with their tokens, in the manifest and in a note."""
    many = random_moe(replace(SMALL, num_experts=40))
    result = export_checkpoint(many, "onnx", "int4", out=tmp_path / "out", verify=False, weights=WeightOptions(method="gptq", tokens=1024))
    scarce = Artifact.open(result.path).manifest.quant.scarce_experts
    assert scarce
    assert all(count < many.specs[name].shape[1] for name, count in scarce.items())
    (note,) = [note for note in result.notes if "matrices of experts" in note]
    name, count = next(iter(scarce.items()))
    assert note.startswith(f"{len(scarce)} matrices of experts were reached by fewer tokens than they have inputs")
    assert f"{name} ({count} tokens)" in note


@pytest.mark.parametrize("options", [WeightOptions(bits_per_weight=5.0), WeightOptions(max_drop=1.0)])
def test_refusals(checkpoint: MemoryCheckpoint, options: WeightOptions) -> None:
    target = find_target("onnx")
    with pytest.raises(ElmExportError, match=r"a search for bits .* does not take mixtures of experts: .* Choose a --quant"):
        prepare(checkpoint, target, target.recipe("int4"), options, SilentProgress())


def test_an_importance_matrix_has_a_slice_for_each_expert(checkpoint: MemoryCheckpoint, statistics: Statistics, tmp_path: Path) -> None:
    """Written and read again: the same mean squares; experts that no token reached count as ones, as in llama.cpp."""
    path = tmp_path / "imatrix.gguf"
    write_importance(statistics, SMALL, path)
    again = read_importance(path, checkpoint)
    for spec in (spec for spec in checkpoint.specs.values() if spec.role in (Role.MOE_EXPERTS_UP, Role.MOE_EXPERTS_DOWN)):
        before, after = statistics.moments(spec), again.moments(spec)
        assert before is not None and after is not None
        expected = before.mean_square if before.tokens else torch.ones_like(before.mean_square)
        torch.testing.assert_close(after.mean_square, expected, rtol=1e-6, atol=0)
