"""Fixtures that every part of the suite shares. All are read-only and live for the whole session."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch is loaded; see elmexport.cli.main
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # every worker would use every core: they share them instead, programs that tests start too
    _threads = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    os.environ.setdefault("OMP_NUM_THREADS", _threads)
    os.environ.setdefault("ELMEXPORT_THREADS", _threads)

from elmexport.checkpoint.base import Checkpoint
from elmexport.models.openelm.config import OpenELMConfig
from tests.clients import llama_cpp_tools as tools_of_llama_cpp
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.small_tokenizer import train_tokenizer

# What torch, lm-eval and coremltools bring stays: looking through it so often is a tenth of the suite's time.
gc.set_threshold(100_000, 20, 50)

# The files that take longest, in that order: the others fill the gaps, so that no worker waits for another at the end.
LONGEST = (
    *("documentation/test_blocks", "targets/gguf/test_moe_parity", "targets/gguf/test_llama_cpp_parity", "clients/test_onnx_runtimes"),
    *("evaluation/test_hub", "evaluation/test_against_lm_eval", "clients/test_mlx_lm", "targets/coreml/test_palettized"),
    *("clients/test_bit_identity", "checkpoint/test_hub", "calibration/test_awq_experts", "runtimes/test_speculation"),
    *("sweep/test_sweep", "mil/test_foreign", "targets/coreml/neural_engine/test_package", "targets/coreml/test_lint"),
    *("runtimes/test_coreml", "targets/coreml/neural_engine/test_chain", "targets/onnx/test_onnx_target", "calibration/test_distill"),
    *("calibration/test_mixed", "endurance/test_kills_and_faults", "evaluation/test_quality_gate", "test_export"),
    *("test_interrupted_export", "test_artifact_bytes", "cli/test_ending", "targets/coreml/test_verify", "test_packaging"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    """The embedded trained model, tokenizer included."""
    from elmexport.checkpoint import open_checkpoint

    return open_checkpoint("tiny")


@pytest.fixture(scope="session")
def small_config() -> OpenELMConfig:
    """Three layers of 3, 6, 9 query heads over 1, 2, 3 KV heads, each with its own FFN width; every size a multiple of 32."""
    return OpenELMConfig(
        vocab_size=512,
        max_context_length=128,
        rope_max_length=256,
        num_transformer_layers=3,
        model_dim=192,
        head_dim=32,
        num_gqa_groups=3,
        qkv_multipliers=(0.5, 1.0, 1.5),
        ffn_multipliers=(2.0, 1.0, 0.5),
        ffn_dim_divisor=32,
        normalize_qk_projections=True,
        share_input_output_layers=True,
    )


@pytest.fixture(scope="session")
def deep_config(small_config: OpenELMConfig) -> OpenELMConfig:
    """The small model with five layers, for what goes by layers and costs little: 3, 6, 9, 3, 6 query heads over 1, 2, 3, 1, 2 KV heads."""
    return replace(
        small_config,
        num_transformer_layers=5,
        qkv_multipliers=(0.5, 1.0, 1.5, 0.5, 1.0),
        ffn_multipliers=(0.5, 1.0, 1.5, 2.0, 2.5),
    )


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of Llama's kind (BPE, byte fallback, BOS 1, EOS 2) with the 512 pieces of `small_config`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder)
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def small_checkpoint(small_config: OpenELMConfig, small_tokenizer: Path) -> MemoryCheckpoint:
    """Random float32 weights for `small_config`; `.arrays` is what `tests.reference.reference_logits` takes."""
    return random_checkpoint(small_config, tokenizer_path=small_tokenizer)


@pytest.fixture(scope="session")
def deep_checkpoint(deep_config: OpenELMConfig, small_tokenizer: Path) -> MemoryCheckpoint:
    """Random float32 weights for `deep_config`."""
    return random_checkpoint(deep_config, tokenizer_path=small_tokenizer)


class ExportTo(Protocol):
    def __call__(self, checkpoint: Checkpoint, target: str, quant: str, **options: Any) -> Path: ...


@pytest.fixture(scope="session")
def export_to(tmp_path_factory: pytest.TempPathFactory) -> ExportTo:
    """`export_to(checkpoint, target, quant, **options)` exports into a fresh folder and returns the artifact's path.

    Options are `export_checkpoint`'s; unlike there, `verify` is false unless asked for.
    """
    from elmexport.exporting import export_checkpoint

    def call(checkpoint: Checkpoint, target: str, quant: str, **options: Any) -> Path:
        out = tmp_path_factory.mktemp("export") / f"{checkpoint.source.name}-{target}-{quant}"
        return export_checkpoint(checkpoint, target, quant, **{"out": out, "verify": False} | options).path

    return call


MadeOnce = Callable[[str, str], Path]
SmallArtifact = MadeOnce


@pytest.fixture(scope="session")
def small_artifact(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> SmallArtifact:
    """`small_artifact(target, quant)`: the artifact of the small checkpoint, made once."""
    return cache(partial(export_to, small_checkpoint))


@pytest.fixture(scope="session")
def tiny_artifact(tiny: Checkpoint, export_to: ExportTo) -> MadeOnce:
    """`tiny_artifact(target, quant)`: the artifact of the embedded model, made once; to be read, or copied."""
    return cache(partial(export_to, tiny))


@pytest.fixture(scope="session")
def llama_cpp_tools() -> tools_of_llama_cpp.LlamaCppTools:
    """llama.cpp's own programs and converter, built on first use."""
    return tools_of_llama_cpp.llama_cpp_tools()
