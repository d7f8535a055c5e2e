"""Bytes that a decoded token reads, against the files themselves."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from gguf import GGUFReader

from elmexport.bench.traffic import Traffic, traffic
from elmexport.models.openelm.config import OpenELMConfig
from tests.conftest import ExportTo, SmallArtifact
from tests.memory_checkpoint import random_checkpoint


def test_per_token_is_the_mean_over_the_tokens() -> None:
    each = [1000 + 10 * (7 + i) for i in (1, 2, 3)]  # the token being decoded is in the cache by then
    assert Traffic(1000, 10).per_token(7, 3) == sum(each) / 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "quant", "width"), [("onnx", "int4", 4), ("onnx", "fp16", 2), ("gguf", "fp16", 4), ("coreml", "int8", 2)]
)
def test_cache(small_artifact: SmallArtifact, small_config: OpenELMConfig, target: str, quant: str, width: int) -> None:
    found = traffic(small_artifact(target, quant))
    assert found is not None
    assert found.cache_bytes == 2 * (1 + 2 + 3 + 1 + 2) * small_config.head_dim * width


def test_weights_of_a_tied_model_are_all_tensors(small_artifact: SmallArtifact) -> None:
    folder = small_artifact("gguf", "int4")
    found = traffic(folder)
    assert found is not None
    assert found.weight_bytes == sum(int(tensor.n_bytes) for tensor in GGUFReader(next(folder.glob("*.gguf"))).tensors)


def test_of_a_table_that_the_head_does_not_share_a_row_is_read(small_config: OpenELMConfig, export_to: ExportTo) -> None:
    checkpoint = random_checkpoint(replace(small_config, share_input_output_layers=False))
    folder = export_to(checkpoint, "onnx", "fp32")
    found = traffic(folder)
    assert found is not None
    table = checkpoint.arrays["transformer.token_embeddings.weight"].nbytes
    assert found.weight_bytes == sum(array.nbytes for array in checkpoint.arrays.values()) - table


def test_a_bare_file_describes_nothing(small_artifact: SmallArtifact) -> None:
    path = next(small_artifact("onnx", "int4").glob("onnx/*.onnx"))
    assert onnx.load(path, load_external_data=False).graph.name == "small"
    assert traffic(path) is None
