"""Files of mixtures of experts and llama.cpp's own, made of the same checkpoint: the same bytes, stacks of experts and all."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from pytest import TempPathFactory

from targets.gguf import LLAMA_CPPS
from tests.clients.kept import kept
from tests.clients.llama_cpp_tools import LlamaCppTools
from tests.conftest import ExportTo
from tests.moe_models import SMALL, random_moe
from tests.targets.gguf.llama_cpp_files import FLOATS, LlamaCppFiles, differences
from tests.targets.gguf.test_llama_cpp_parity import WITH_IMATRIX, export_saved, llama_cpps_imatrix

pytestmark = pytest.mark.slow
PACKAGE = "ai2-olmo==0.6.0"

# 9 layers: an eighth is 1. Rows of 256, which K-types take, and 8 experts, for which llama.cpp has rules of its own; else 12, rows that
# they do not take.
WIDE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 256}
CONFIGS = {
    "deep": replace(SMALL, **WIDE, num_hidden_layers=9, num_experts=4, num_experts_per_tok=2),
    "eight": replace(SMALL, **WIDE, num_hidden_layers=3, num_experts=8),
    "narrow": replace(SMALL, num_experts=12),
}
CASES = {
    "deep": (*FLOATS, *LLAMA_CPPS),
    "eight": ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "iq4_nl", "iq4_xs"),
    "narrow": ("q4_k_m", "q8_0", "iq4_xs"),
}


@pytest.fixture(scope="module")
def their_files(llama_cpp_tools: LlamaCppTools, tmp_path_factory: TempPathFactory) -> Callable[[str], LlamaCppFiles]:
    @cache
    def call(case: str) -> LlamaCppFiles:
        checkpoint = random_moe(CONFIGS[case], name=f"OLMoE-{case}")
        files = LlamaCppFiles(llama_cpp_tools, checkpoint, tmp_path_factory.mktemp("llama_cpp"), pre="olmo")
        files.save(torch.bfloat16)
        return files

    return call


@pytest.mark.parametrize(("case", "quant"), [(case, quant) for case, quants in CASES.items() for quant in quants])
def test_same_file(their_files: Callable[[str], LlamaCppFiles], export_to: ExportTo, case: str, quant: str) -> None:
    files = their_files(case)
    ours, theirs = export_saved(files, export_to, quant), files.file(quant)
    assert differences(ours, theirs) == []
    assert ours.name == theirs.name


@pytest.fixture(scope="module")
def published_tokenizer() -> Path:
    """The `tokenizer.json` of the published models, out of the package of those who trained them."""

    def fetch(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE], check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (folder / "tokenizer.json").write_bytes(archive.read("olmo_data/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"))
        wheel.unlink()

    return kept(PACKAGE, fetch) / "tokenizer.json"


def test_the_published_vocabulary(llama_cpp_tools: LlamaCppTools, published_tokenizer: Path, export_to: ExportTo, tmp_path: Path) -> None:
    """The converter knows its pre-tokenizer by itself; 24 rows of the embedding are no tokens."""
    checkpoint = random_moe(replace(SMALL, vocab_size=50304, eos_token_ids=(50279,)), name="OLMoE-vocabulary")
    checkpoint.tokenizer_path = published_tokenizer
    files = LlamaCppFiles(llama_cpp_tools, checkpoint, tmp_path, pre="olmo")
    files.save(torch.bfloat16)
    files.pre = ""
    assert differences(export_saved(files, export_to, "fp16"), files.file("fp16")) == []


@pytest.mark.parametrize("quant", WITH_IMATRIX)
def test_same_file_with_an_importance_matrix(their_files: Callable[[str], LlamaCppFiles], export_to: ExportTo, quant: str) -> None:
    """Each expert has a slice of the matrix, of the tokens that went to it."""
    files = their_files("deep")
    imatrix: Path = llama_cpps_imatrix(files)
    found = differences(export_saved(files, export_to, quant, imatrix=imatrix), files.file(quant, "--imatrix", imatrix))
    assert found == ["value of quantize.imatrix.file"]  # theirs has the whole path, ours the name alone
