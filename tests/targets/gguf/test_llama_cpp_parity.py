"""Our files and llama.cpp's own, made of the same checkpoint: the same bytes, from the first to the last, but for a listed few."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import TempPathFactory

from calibration.text import bundled_text
from elmexport.checkpoint.base import Checkpoint, Source
from elmexport.checkpoint.local import open_folder
from elmexport.models.openelm.config import OpenELMConfig
from targets.gguf import LLAMA_CPPS
from tests.clients.llama_cpp_tools import LlamaCppTools
from tests.conftest import ExportTo
from tests.memory_checkpoint import random_checkpoint
from tests.targets.gguf.llama_cpp_files import FLOATS, LlamaCppFiles, differences
from tests.targets.gguf.test_gguf_target import gguf_path

pytestmark = pytest.mark.slow

# 17 layers: more than 16, so that every rule on layers has some; an eighth of them is 2, a sixteenth 1.
DEEP = OpenELMConfig(
    vocab_size=512,
    max_context_length=128,
    rope_max_length=256,
    num_transformer_layers=17,
    model_dim=256,
    head_dim=64,
    num_gqa_groups=4,
    qkv_multipliers=1.0,
    ffn_multipliers=1.0,
    ffn_dim_divisor=256,
    normalize_qk_projections=True,
    share_input_output_layers=True,
)
# Rows of 48, 80, 112 … values, which fit no blocks, and 192, which fit those of 32.
RAGGED: dict[str, Any] = {
    "head_dim": 16,
    "num_gqa_groups": 1,
    "qkv_multipliers": 0.25,
    "ffn_multipliers": (1.0, 0.25, 1.0),
    "ffn_dim_divisor": 16,
}


# For each checkpoint, the quantizations that it is there to test: trained weights, and the rules on layers, want all of them; widths that
# are no multiples of 256 the K- and IQ-types, each with a fallback of its own; widths that are none of 32 one of each family.
CASES = {
    "tiny": (*FLOATS, *LLAMA_CPPS),
    "deep": LLAMA_CPPS,
    "deep-bf16": (*FLOATS, "q4_k_m"),
    "grouped-by-3": ("q2_k", "q3_k_m", "q5_k_m", "iq4_nl", "iq4_xs"),
    "ragged": ("fp16", "q8_0", "q4_0", "q4_k_m", "iq4_xs"),
}
WITH_IMATRIX = ("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_m", "q4_k_m", "q6_k", "iq4_nl", "iq4_xs")


@pytest.fixture(scope="module")
def their_files(
    tiny: Checkpoint, small_config: OpenELMConfig, small_tokenizer: Path, llama_cpp_tools: LlamaCppTools, tmp_path_factory: TempPathFactory
) -> Callable[[str], LlamaCppFiles]:
    """`their_files(case)`: the checkpoint in Apple's layout and what llama.cpp makes of it."""

    @cache
    def call(case: str) -> LlamaCppFiles:
        if case == "tiny":
            checkpoint = tiny
        else:
            name = case.split("-")[0]
            config = {"deep": DEEP, "grouped": small_config, "ragged": replace(small_config, **RAGGED)}[name]
            checkpoint = random_checkpoint(config, tokenizer_path=small_tokenizer)
            checkpoint.source = replace(checkpoint.source, name=f"OpenELM-{name}")
        files = LlamaCppFiles(llama_cpp_tools, checkpoint, tmp_path_factory.mktemp("llama_cpp"))
        files.save(torch.bfloat16 if case.endswith("bf16") else torch.float32)
        return files

    return call


def export_saved(files: LlamaCppFiles, export_to: ExportTo, quant: str, **settings: Any) -> Path:
    """Our file of the checkpoint as it was saved."""
    source = Source(files.checkpoint.source.name, "local folder")
    assert files.checkpoint.tokenizer_path is not None
    saved = open_folder(files.model, files.checkpoint.config, source, files.model / files.checkpoint.tokenizer_path.name)
    return gguf_path(export_to(saved, "gguf", quant, settings=settings))


@pytest.mark.parametrize(("case", "quant"), [(case, quant) for case, quants in CASES.items() for quant in quants])
def test_same_file(their_files: Callable[[str], LlamaCppFiles], export_to: ExportTo, case: str, quant: str) -> None:
    files = their_files(case)
    ours, theirs = export_saved(files, export_to, quant), files.file(quant)
    assert differences(ours, theirs) == []
    assert ours.name == theirs.name


def test_without_a_tokenizer_config(tiny: Checkpoint, llama_cpp_tools: LlamaCppTools, export_to: ExportTo, tmp_path: Path) -> None:
    """The converter then leaves to llama.cpp's defaults what we say: the same ids, and BOS but no EOS."""
    files = LlamaCppFiles(llama_cpp_tools, tiny, tmp_path)
    files.save(tokenizer_config=False)
    assert differences(export_saved(files, export_to, "fp32"), files.file("fp32")) == [
        f"key tokenizer.ggml.{name} is ours alone" for name in ("unknown_token_id", "add_bos_token", "add_eos_token")
    ]


def test_a_checkpoint_in_several_files(tiny: Checkpoint, llama_cpp_tools: LlamaCppTools, export_to: ExportTo, tmp_path: Path) -> None:
    """The converter goes file by file; its quantizer brings the tensors into one order again."""
    files = LlamaCppFiles(llama_cpp_tools, tiny, tmp_path)
    files.save(shards=3)
    assert differences(export_saved(files, export_to, "fp32"), files.file("fp32")) == ["names or order of tensors"]
    assert differences(export_saved(files, export_to, "q4_0"), files.file("q4_0")) == []


def test_a_chat_template(tiny: Checkpoint, llama_cpp_tools: LlamaCppTools, export_to: ExportTo, tmp_path: Path) -> None:
    files = LlamaCppFiles(llama_cpp_tools, tiny, tmp_path)
    files.save()
    template = files.model / "chat_template.jinja"
    template.write_text("{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}", encoding="utf-8")
    assert differences(export_saved(files, export_to, "q4_0", chat_template=template), files.file("q4_0")) == []


def llama_cpps_imatrix(files: LlamaCppFiles) -> Path:
    path = files.folder / "imatrix.gguf"
    if not path.exists():
        text = files.folder / "text.txt"
        text.write_text(bundled_text("weighting"), encoding="utf-8")
        files.tools.run("llama-imatrix", "-m", files.file("fp32"), "-f", text, "-o", path, "-c", 64, "--chunks", 4, "-t", 2)
    return path


@pytest.mark.parametrize(("case", "quant"), [("tiny", "q4_k_m"), *(("deep", quant) for quant in WITH_IMATRIX)])
def test_same_file_with_an_importance_matrix(
    their_files: Callable[[str], LlamaCppFiles], export_to: ExportTo, case: str, quant: str
) -> None:
    files = their_files(case)
    imatrix = llama_cpps_imatrix(files)
    found = differences(export_saved(files, export_to, quant, imatrix=imatrix), files.file(quant, "--imatrix", imatrix))
    assert found == ["value of quantize.imatrix.file"]  # theirs has the whole path, ours the name alone


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(their_files: Callable[[str], LlamaCppFiles], export_to: ExportTo, threads: int) -> None:
    files = their_files("tiny")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert export_saved(files, export_to, "iq4_xs").read_bytes() == files.file("iq4_xs").read_bytes()
    finally:
        torch.set_num_threads(before)


def test_perplexity_to_the_last_digit(their_files: Callable[[str], LlamaCppFiles], export_to: ExportTo) -> None:
    """As `llama-perplexity` prints it, KL divergence from F16 included."""
    files = their_files("tiny")
    text, base = files.folder / "prose.txt", files.folder / "base.kld"
    text.write_text(bundled_text("weighting"), encoding="utf-8")

    def measure(model: Path, *arguments: object) -> list[str]:
        out = files.tools.run("llama-perplexity", "-m", model, "-f", text, "-c", 128, "--chunks", 4, "-t", 2, *arguments)
        # Without the time that may stand before a line.
        return re.findall(r"Final estimate: .*|Maximum KLD: .*|Same top p: .*", out)

    measure(files.file("fp16"), "--kl-divergence-base", base)
    ours, theirs = (
        [*measure(model), *measure(model, "--kl-divergence-base", base, "--kl-divergence")]
        for model in (export_saved(files, export_to, "q4_k_m"), files.file("q4_k_m"))
    )
    assert ours == theirs
    assert len(ours) == 3
