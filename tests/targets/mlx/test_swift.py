"""mlx-swift's formula for OpenELM's layers: the published models' are those of their configuration; others are told apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elmexport.checkpoint.base import Checkpoint
from elmexport.models import known_models
from elmexport.models.openelm.config import OpenELMConfig
from targets.mlx.swift import openelm_layers, openelm_notes

PUBLISHED = [known for known in known_models() if known.hub_id is not None and isinstance(known.config, OpenELMConfig)]


@pytest.mark.parametrize("known", PUBLISHED, ids=lambda known: known.alias)
def test_published_shapes(known: object) -> None:
    config = known.config  # type: ignore[attr-defined]
    dims = config.dims
    found = openelm_layers(len(dims.layers), dims.model_dim, dims.head_dim, config.ffn_dim_divisor)
    assert found == dims.layers
    assert openelm_notes(config, 1.0) == ()


def test_first_layers_of_270m_by_hand() -> None:
    """modelDim 1280, head size 64: round(1280 * 0.5 / 256) * 256 = 768, 12 heads; then 0.53 * 1280 = 678, again 768."""
    layers = openelm_layers(16, 1280, 64, 256)
    assert [(layer.query_heads, layer.kv_heads, layer.ffn_dim) for layer in layers[:2]] == [(12, 3, 768), (12, 3, 1024)]
    assert (layers[-1].query_heads, layers[-1].ffn_dim) == (20, 5120)


def test_what_differs_is_said(tiny: Checkpoint, small_config: OpenELMConfig) -> None:
    (note,) = openelm_notes(small_config, 1.0)
    assert note == (
        "mlx-swift's OpenELM cannot run this artifact, mlx-lm can: it computes other numbers of heads or other widths than this model's layers have"
    )
    config = PUBLISHED[0].config
    assert isinstance(config, OpenELMConfig)
    (note,) = openelm_notes(config, 2.0**-5)
    assert "reads no rms_norm_eps, which alpha 0.03125 changes here; --quant bf16 has no alpha" in note
    (note,) = openelm_notes(replace(config, rope_freq_constant=500000), 1.0)
    assert "its rotary base is 10000, this model's 500000" in note
