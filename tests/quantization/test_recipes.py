"""Recipes: reading TOML, the messages for what is wrong in it, and resolving rules to schemes."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from elmexport.errors import ElmExportError
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.quantization.recipes import Recipe, load_recipe, resolve

TEXT = """
name = "mixed"
words = "a recipe for tests"
activations = "fp32"
norms = "fp32"
scales = "fp16"
fallback = "fp16"
max_self_check_kl = 0.5

[[rule]]
roles = ["embedding", "lm_head"]
scheme = "int8-block32"

[[rule]]
layers = "1-2"
roles = ["ffn.down"]
scheme = "fp16"

[[rule]]
layers = "0-1"
scheme = "int8-channel"

[[rule]]
scheme = "int4-block32"
"""


def load(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "mixed.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def schemes(recipe: Recipe, config: OpenELMConfig) -> dict[str, str]:
    return {name: scheme.recipe_name for name, scheme in resolve(recipe, config).schemes.items()}


def test_the_first_matching_rule_decides(tmp_path: Path, deep_config: OpenELMConfig) -> None:
    found = schemes(load(tmp_path, TEXT), deep_config)
    assert list(found) == [spec.name for spec in deep_config.weights()]
    assert found["transformer.token_embeddings.weight"] == "int8-block32"
    # Layer 1 matches the second and the third rule, layer 0 only the third, layer 2 only the second for ffn.down.
    down = [found[f"transformer.layers.{i}.ffn.proj_2.weight"] for i in range(5)]
    assert down == ["int8-channel", "fp16", "fp16", "int4-block32", "int4-block32"]
    qkv = [found[f"transformer.layers.{i}.attn.qkv_proj.weight"] for i in range(5)]
    assert qkv == ["int8-channel", "int8-channel", "int4-block32", "int4-block32", "int4-block32"]


def test_a_layer_range_does_not_match_tensors_outside_layers(tmp_path: Path, deep_config: OpenELMConfig) -> None:
    untied = replace(deep_config, share_input_output_layers=False)
    recipe = load(tmp_path, TEXT.replace('roles = ["embedding", "lm_head"]', 'roles = ["embedding"]'))
    assert schemes(recipe, untied)["lm_head.weight"] == "int4-block32"


def test_norms_are_never_quantized(tmp_path: Path, deep_config: OpenELMConfig) -> None:
    found = schemes(load(tmp_path, TEXT), deep_config)
    assert {found[spec.name] for spec in deep_config.weights() if spec.role.is_norm} == {"fp32"}


def test_a_shape_that_does_not_fit_falls_back_and_is_reported(tmp_path: Path, deep_config: OpenELMConfig) -> None:
    config = replace(deep_config, ffn_dim_divisor=8, ffn_multipliers=(0.5, 1.0, 1.5, 1.25, 2.0))  # layer 3: 240, not a multiple of 32
    assert config.layers[3].ffn_dim == 240
    plan = resolve(load(tmp_path, TEXT), config)
    name = "transformer.layers.3.ffn.proj_2.weight"
    assert plan.schemes[name].recipe_name == "fp16"
    assert plan.fallbacks == ((name, "rows of 240 values do not divide into blocks of 32: kept as fp16"),)


def test_bits_per_weight(tmp_path: Path, deep_config: OpenELMConfig) -> None:
    plain = TEXT[: TEXT.index("[[rule]]")] + '[[rule]]\nscheme = "int4-block32"\n'
    plan = resolve(load(tmp_path, plain), deep_config)
    matrices = sum(spec.size for spec in deep_config.weights() if not spec.role.is_norm)
    norms = deep_config.parameter_count - matrices
    assert plan.bits_per_weight == pytest.approx((4.5 * matrices + 32 * norms) / deep_config.parameter_count)


def test_no_rule_matches(tmp_path: Path, deep_config: OpenELMConfig) -> None:
    recipe = load(tmp_path, TEXT.replace('\n[[rule]]\nscheme = "int4-block32"\n', ""))
    with pytest.raises(
        ElmExportError, match=r"recipe mixed: no rule matches transformer\.layers\.2\.attn\.qkv_proj\.weight \(attention\.qkv\)"
    ):
        resolve(recipe, deep_config)


def test_what_a_manifest_records_is_the_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path, TEXT)
    assert json.loads(json.dumps(recipe.to_dict())) == tomllib.loads(TEXT)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name =", "name ", r"mixed\.toml: not valid TOML \("),
        ("norms =", "norm =", r"mixed\.toml: unknown key 'norm'; known: activations, .*norms"),
        ('norms = "fp32"\n', "", r"mixed\.toml: 'norms' is missing"),
        ('norms = "fp32"', 'norms = "int4-block32"', r"mixed\.toml: norms is 'int4-block32'; it must be fp32, fp16 or bf16"),
        ('roles = ["embedding", "lm_head"]', 'roles = "embedding"', r"rule: roles is 'embedding'; it must be a list"),
        ("max_self_check_kl = 0.5", 'max_self_check_kl = "low"', r"max_self_check_kl is 'low'; it must be a number"),
        ('layers = "1-2"', "layers = 1", r"layers is 1; it must be a string"),
        ('fallback = "fp16"', 'fallback = "fp17"', "unknown scheme 'fp17'; known: fp32"),
        ('scheme = "int4-block32"', 'scheme = "int4-blocks31"', "unknown scheme 'int4-blocks31'; known: fp32"),
        ('scheme = "int4-block32"', "", r"mixed\.toml, rule: 'scheme' is missing"),
        (
            'scheme = "int4-block32"',
            'scheme = "int4-block32"\nrole = "norm"',
            r"mixed\.toml, rule: unknown key 'role'; known: experts, imatrix, layers, min_gqa, roles, scheme",
        ),
        ('"lm_head"', '"norm"', r"unknown role 'norm'; known: embedding, .* \(norms and routers are never quantized\)"),
        ('"lm_head"', "[1]", r"unknown role \[1\]; known: embedding"),
        ('"lm_head"', '"head"', "unknown role 'head'; known: embedding, .*lm_head"),
        ('"1-2"', '"2-1"', r"layers is '2-1'; write a range like \"0-3\""),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ElmExportError, match=message):
        load(tmp_path, TEXT.replace(old, new))


def test_every_scheme_can_stand_in_a_rule(tmp_path: Path, deep_config: OpenELMConfig) -> None:
    for name in ("fp32", "bf16", "int8-channel", "int4-block64", "int4-asym-block32", "lut4-group8", "lut6-tensor"):
        found = schemes(load(tmp_path, TEXT.replace('scheme = "int4-block32"', f'scheme = "{name}"')), deep_config)
        assert found["transformer.layers.4.ffn.proj_1.weight"] == name
