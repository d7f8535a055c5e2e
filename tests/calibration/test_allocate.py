"""The mix of schemes against the best of all mixes; its recipe, written and read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linprog

from calibration.allocate import allocate, candidates, choose_bits
from calibration.sensitivity import KLEvaluator, Sensitivity
from calibration.text import Sample
from elmexport.errors import ElmExportError
from elmexport.progress import SilentProgress
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipe_file import write_recipe
from elmexport.quantization.recipes import load_recipe, resolve
from elmexport.quantization.schemes import find_scheme
from elmexport.target import find_target
from elmexport.weights import Role
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import kl, reference_logits

BASE = find_target("onnx").recipe("int4")


def random_costs(checkpoint: MemoryCheckpoint, roles: set[Role], seed: int) -> list[Sensitivity]:
    """Divergences that fall with the bits, for the matrices of `roles` alone."""
    generator = np.random.default_rng(seed)
    found = []
    for name, schemes in candidates(find_target("onnx"), checkpoint.specs.values()).items():
        spec = checkpoint.specs[name]
        if spec.role in roles:
            found.append(Sensitivity(spec, dict(zip(schemes, sorted(generator.exponential(size=len(schemes)), reverse=True), strict=True))))
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [5.6, 6.5, 8.0])
def test_close_to_the_best_of_all_mixes(small_checkpoint: MemoryCheckpoint, seed: int, bits: float) -> None:
    """Between scipy's optimum of the linear relaxation, where schemes may be blended, and that plus what one matrix can save."""
    costs, specs = random_costs(small_checkpoint, {role for role in Role if not role.is_norm}, seed), list(small_checkpoint.specs.values())
    found = allocate(costs, small_checkpoint.config, BASE, bits)
    assert found.bits_per_weight <= bits
    options = [(i, scheme.bits(item.spec.shape, 32), value) for i, item in enumerate(costs) for scheme, value in item.kl.items()]
    budget = sum(bits * spec.size - (32 * spec.size if spec.role.is_norm else 0) for spec in specs)
    relaxed = linprog(
        [value for *_, value in options],
        A_ub=[[size for _, size, _ in options]],
        b_ub=[budget],
        A_eq=[[float(i == matrix) for i, *_ in options] for matrix in range(len(costs))],
        b_eq=[1] * len(costs),
        bounds=(0, 1),
    )
    assert relaxed.success
    assert relaxed.fun - 1e-9 <= found.predicted_kl <= relaxed.fun + max(max(item.kl.values()) - min(item.kl.values()) for item in costs)


def test_more_bits_never_cost_more(small_checkpoint: MemoryCheckpoint) -> None:
    costs = random_costs(small_checkpoint, {role for role in Role if not role.is_norm}, 0)
    found = [allocate(costs, small_checkpoint.config, BASE, bits) for bits in (5.2, 5.6, 6.0, 7.0, 8.0, 10.0)]
    assert [a.predicted_kl for a in found] == sorted((a.predicted_kl for a in found), reverse=True)
    assert found[-1].predicted_kl == pytest.approx(sum(min(item.kl.values()) for item in costs))


def test_the_recipe_can_be_written_and_read(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    costs = random_costs(small_checkpoint, {role for role in Role if not role.is_norm}, 1)
    recipe = allocate(costs, small_checkpoint.config, BASE, 6.5).recipe
    write_recipe(recipe, tmp_path / "recipe.toml", "for a test")
    read = load_recipe(tmp_path / "recipe.toml")
    assert read == recipe
    plan, again = (resolve(r, small_checkpoint.config) for r in (recipe, read))
    assert plan.schemes == again.schemes
    assert len(recipe.rules) > 3


def test_too_small_a_size_is_refused_before_any_work(small_checkpoint: MemoryCheckpoint) -> None:
    with pytest.raises(ElmExportError, match=r"--bits-per-weight 2 is less than the narrowest .* ask for 4\.\d\d or more"):
        choose_bits(small_checkpoint, find_target("gguf"), BASE, 2.0, None, SilentProgress())


def test_candidates_are_what_the_format_can_hold(small_checkpoint: MemoryCheckpoint) -> None:
    names = {
        target: set().union(*candidates(find_target(target), small_checkpoint.specs.values()).values())
        for target in ("gguf", "onnx", "mlx", "coreml")
    }
    assert names["gguf"] == {find_scheme(name) for name in ("int4-block32", "int5-block32", "int8-block32", "gguf-iq4_nl")}  # rows of 96
    assert names["onnx"] == {find_scheme(name) for name in ("int4-block128", "int4-block64", "int4-block32", "int8-block32")}
    assert names["mlx"] == {
        *(find_scheme(f"int{bits}-block{size}") for bits in (3, 4, 5, 6) for size in (32, 64)),
        *(find_scheme(name) for name in ("int4-block128", "int8-block32")),
    }
    assert not any(scheme.recipe_name.startswith(("int3", "int5", "int6")) for scheme in names["coreml"])


def test_the_evaluator_measures_the_divergence(small_checkpoint: MemoryCheckpoint) -> None:
    """Against the float64 forward pass, the changed tensor in the last layer: the layers before are not run again."""
    ids = np.random.default_rng(0).integers(0, small_checkpoint.config.vocab_size, (2, 16))
    evaluator = KLEvaluator(small_checkpoint, Sample(ids, "random ids"))
    name = "transformer.layers.2.ffn.proj_2.weight"
    changed = quantize(small_checkpoint.tensor(name), find_scheme("int4-block32")).dequantize()  # type: ignore[call-overload]
    arrays = small_checkpoint.arrays | {name: changed.numpy()}
    expected = [
        kl(reference_logits(small_checkpoint.config, small_checkpoint.arrays, row), reference_logits(small_checkpoint.config, arrays, row))
        for row in ids
    ]
    assert evaluator.divergence({name: changed}) == pytest.approx(float(np.mean(expected)), rel=1e-3)
    assert evaluator.divergence({}) < 1e-9
