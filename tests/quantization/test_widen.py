"""`benchmarks/widen.py`: the wider model computes what the model did, by a float64 reference, and its weights lie on another grid."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from elmexport.checkpoint.save import save_checkpoint
from elmexport.models.openelm.config import OpenELMConfig
from tests.memory_checkpoint import random_checkpoint
from tests.reference import reference_logits

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "widen.py"


def test_a_wider_model_computes_the_same(tmp_path: Path) -> None:
    config = OpenELMConfig(
        vocab_size=64,
        max_context_length=32,
        rope_max_length=64,
        num_transformer_layers=2,
        model_dim=96,
        head_dim=16,
        num_gqa_groups=3,
        ffn_multipliers=1.0,
        ffn_dim_divisor=32,
        normalize_qk_projections=False,
        share_input_output_layers=True,
    )
    arrays = dict(random_checkpoint(config).arrays)
    last = "transformer.norm.weight"
    arrays[last] = np.repeat(arrays[last][::2], 2)  # two channels have each weight: nothing is lost by making a pair's equal
    save_checkpoint(tmp_path / "narrow", config, {name: torch.from_numpy(array) for name, array in arrays.items()})
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "narrow"), str(tmp_path / "wide"), "--dim", "144"], check=True)
    wide = OpenELMConfig.from_dict(json.loads((tmp_path / "wide" / "config.json").read_text()))
    tensors = load_file(tmp_path / "wide" / "model.safetensors")
    assert (wide.dims.model_dim, wide.dims.layers[0].query_heads, wide.dims.layers[0].kv_heads) == (144, 9, 3)
    ids = np.random.default_rng(0).integers(0, 64, 20)
    expected, found = reference_logits(config, arrays, ids), reference_logits(wide, tensors, ids)
    np.testing.assert_allclose(found, expected, atol=0.01 * float(expected.std()))
    down = "transformer.layers.0.ffn.proj_2.weight"
    turned = np.abs(tensors[down][:96] * (96 / 144) ** 0.5 - arrays[down]).max(1) > 0.01  # rows, the stream's channels
    assert turned.all()
    assert not tensors[down][96:].any()
