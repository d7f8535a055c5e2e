"""Bytes that a decoded token reads, against the files themselves."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from gguf import GGUFReader

from elmexport.bench.traffic import Traffic, traffic
from elmexport.inspection import inspect_artifact
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.weights import Role
from tests.conftest import ExportTo, SmallArtifact
from tests.memory_checkpoint import random_checkpoint
from tests.moe_models import random_moe


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
    assert found.cache_bytes == 2 * (1 + 2 + 3) * small_config.head_dim * width


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


@pytest.mark.parametrize(("target", "quant"), [("onnx", "int4"), ("onnx", "fp32"), ("gguf", "int8")])
def test_of_experts_a_token_reads_its_own(export_to: ExportTo, target: str, quant: str) -> None:
    folder = export_to(random_moe(), target, quant)
    found, tensors = traffic(folder), inspect_artifact(folder, tensors=True).tensors
    assert found is not None and tensors is not None
    experts = sum(tensor.bytes for tensor in tensors if tensor.role is not None and tensor.role.is_expert)
    others = sum(tensor.bytes for tensor in tensors if tensor.role not in (None, Role.EMBEDDING)) - experts
    assert experts > 1000
    assert found.weight_bytes == pytest.approx(others + experts * 3 / 6, abs=100)


def test_a_bare_file_describes_nothing(small_artifact: SmallArtifact) -> None:
    path = next(small_artifact("onnx", "int4").glob("onnx/*.onnx"))
    assert onnx.load(path, load_external_data=False).graph.name == "small"
    assert traffic(path) is None
