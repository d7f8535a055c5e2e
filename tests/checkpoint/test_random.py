"""Random weights: the same whatever the order, of the promised distribution, one tensor at a time."""

from __future__ import annotations

import pytest
import torch

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.random import CHUNK, RandomCheckpoint
from elmexport.errors import ElmExportError
from elmexport.models.openelm.config import OpenELMConfig


def test_deterministic_whatever_the_order(small_config: OpenELMConfig) -> None:
    first, second, other = (RandomCheckpoint(small_config, "x", seed) for seed in (3, 3, 4))
    forward = {name: first.tensor(name) for name in first.specs}
    backward = {name: second.tensor(name) for name in reversed(list(second.specs))}
    assert all(torch.equal(forward[name], backward[name]) for name in forward)
    assert not any(torch.equal(forward[name], other.tensor(name)) for name in forward)
    assert first.identity() == second.identity() != other.identity()
    same_shape = [name for name in forward if name.endswith("attn_norm.weight")]
    assert not torch.equal(forward[same_shape[0]], forward[same_shape[1]])


def test_values_are_kept_from_version_to_version() -> None:
    """A change of the values is a new scheme: artifacts of a seed would no longer compare."""
    tensor = open_checkpoint("tiny", random_weights=0).tensor("transformer.norm.weight")
    assert tensor[:4].tolist() == [1.0703125, 1.046875, 1.0703125, 0.875]


def test_distribution() -> None:
    checkpoint = open_checkpoint("270M", random_weights=0)
    table = checkpoint.tensor("transformer.token_embeddings.weight")
    assert table.dtype == torch.bfloat16 and table.shape == (32000, 1280) and table.numel() > CHUNK
    assert table.float().std().item() == pytest.approx(1280**-0.5, rel=2e-3)
    assert abs(table.float().mean().item()) < 1e-4
    assert len({table.flatten()[start : start + 8].sum().item() for start in range(0, table.numel(), CHUNK)}) > 30  # no chunk repeats
    down = checkpoint.tensor("transformer.layers.0.ffn.proj_2.weight")
    assert down.shape == (1280, 768) and down.float().std().item() == pytest.approx(768**-0.5, rel=5e-3)
    norm = checkpoint.tensor("transformer.norm.weight").float()
    assert norm.mean().item() == pytest.approx(1, abs=0.02) and norm.std().item() == pytest.approx(0.1, rel=0.1)


def test_names_and_tokenizers() -> None:
    tiny, large = open_checkpoint("tiny", random_weights=0), open_checkpoint("1_1b-instruct", random_weights=7)
    assert (tiny.source.name, tiny.source.origin) == ("OpenELM-tiny-random0", "random weights, seed 0")
    assert tiny.tokenizer_path is not None and tiny.tokenizer_path.name == "tokenizer.model"
    assert large.source.name == "OpenELM-1_1B-Instruct-random7" and large.tokenizer_path is None
    assert large.stored_shapes() == {spec.name: spec.shape for spec in large.config.weights()}


def test_refusals() -> None:
    with pytest.raises(ElmExportError, match="--random-weights is -1; a seed is a whole number from 0 up"):
        open_checkpoint("tiny", random_weights=-1)
    with pytest.raises(ElmExportError, match=r"'someone/model' is neither a known model .* nor a folder with a config.json"):
        open_checkpoint("someone/model", random_weights=0)


def test_readable_in_inference_mode(small_config: OpenELMConfig) -> None:
    """The mode is per thread, and values are drawn in several: exports read their reference pass in it."""
    name = "transformer.norm.weight"
    with torch.inference_mode():
        found = RandomCheckpoint(small_config, "x", 3).tensor(name)
    assert torch.equal(found, RandomCheckpoint(small_config, "x", 3).tensor(name))
