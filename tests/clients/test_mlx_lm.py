"""A checkpoint that we write, opened by mlx-lm, which has its own OpenELM: the same logits as numpy's, and as our torch runtime's.

mlx-lm runs in a process of its own, with nothing of ours imported.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.save import save_checkpoint
from elmexport.runtimes import open_artifact
from tests.memory_checkpoint import random_checkpoint
from tests.reference import kl, log_probs, reference_logits

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mlx[cpu]' mlx-lm")
pytestmark = pytest.mark.slow

CLIENT = """
import sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

folder, ids_file, split, out = sys.argv[1:]
model, config = load_model(Path(folder))
ids = mx.array(np.load(ids_file))[None]
cache = make_prompt_cache(model)
parts = [model(ids[:, : int(split)], cache=cache)]
parts += [model(ids[:, i : i + 1], cache=cache) for i in range(int(split), ids.shape[1])]
np.save(out, np.array(mx.concatenate(parts, axis=1)[0].astype(mx.float32)))
assert not any(name.split(".")[0] in ("elmexport", "targets", "tests") for name in sys.modules)
"""


def mlx_logits(folder: Path, ids: NDArray[np.int64], *, decode: int = 4) -> NDArray[np.float32]:
    """Logits by mlx-lm: a prefill, then `decode` tokens one by one."""
    np.save(folder / "ids.npy", ids)
    arguments = [folder, folder / "ids.npy", len(ids) - decode, folder / "logits.npy"]
    done = subprocess.run([sys.executable, "-c", CLIENT, *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "logits.npy")


def arrays(checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    return {name: checkpoint.tensor(name).float().numpy() for name in checkpoint.specs}


def check(folder: Path, checkpoint: Checkpoint, **save_options: Any) -> None:
    """Save in float32, compare three implementations on the saved folder."""
    weights = arrays(checkpoint)
    save_checkpoint(folder, checkpoint.config, {name: torch.from_numpy(array) for name, array in weights.items()}, **save_options)
    ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 48)
    expected = reference_logits(checkpoint.config, weights, ids)
    for found in (mlx_logits(folder, ids), open_artifact(folder).logits(ids)):
        assert np.abs(log_probs(found) - log_probs(expected)).max() < 1e-4
        assert kl(expected, found).max() < 1e-9


def test_tiny(tiny: Checkpoint, tmp_path: Path) -> None:
    check(tmp_path, tiny)


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_qk_projections": False}, {"share_input_output_layers": False}, {"qkv_multipliers": 1.0, "ffn_multipliers": 2.0}],
    ids=["odd-heads", "no-qk-norm", "untied", "uniform"],
)
def test_random_weights(small_config: Any, options: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, random_checkpoint(replace(small_config, **options), seed=3))


def test_sharded(small_config: Any, tmp_path: Path) -> None:
    check(tmp_path, random_checkpoint(small_config), shards=3)


def test_bfloat16(small_config: Any, tmp_path: Path) -> None:
    """As the published checkpoints are stored. mlx-lm computes in bfloat16 then, so it can only agree to its 8 bits."""
    checkpoint = random_checkpoint(small_config)
    save_checkpoint(tmp_path, small_config, {name: torch.from_numpy(array).bfloat16() for name, array in checkpoint.arrays.items()})
    ids = np.random.default_rng(1).integers(0, small_config.vocab_size, 48)
    expected = reference_logits(small_config, arrays(open_checkpoint(str(tmp_path))), ids)
    assert kl(expected, open_artifact(tmp_path).logits(ids)).max() < 1e-9
    assert kl(expected, mlx_logits(tmp_path, ids)).mean() < 0.01
