"""The GGUF target: one self-contained file for llama.cpp's `openelm` architecture.

Covered: F32, F16, BF16, Q8_0 and Q4_0 files, with the vocabulary inside. Not yet: K- and IQ-types, importance matrices, split files.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from elmexport.errors import ElmExportError
from elmexport.models.openelm_config import OpenELMConfig
from elmexport.quantization.recipes import Recipe
from elmexport.target import ExportJob, Target

# llama.cpp's own names for the same recipes.
ALIASES: Mapping[str, str] = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "q8_0": "int8", "q4_0": "int4"}


class GgufTarget(Target):
    """`<model>-<TYPE>.gguf`, nothing else: the file carries configuration and tokenizer."""

    name: ClassVar[str] = "gguf"
    quants: ClassVar[tuple[str, ...]] = ("int4", "int8", "fp16", "bf16", "fp32")

    def recipe(self, quant: str) -> Recipe:
        return super().recipe(ALIASES.get(quant.lower(), quant))

    def check(self, config: OpenELMConfig, context: int) -> None:
        # What llama.cpp's loader of `openelm` takes for granted: it reads no output.weight, and requires both norms and the gate.
        refused = [
            f"{field} is false ({reason})"
            for field, reason in (
                ("share_input_output_layers", "the output head is always the embedding table"),
                ("normalize_qk_projections", "queries and keys always pass a norm"),
                ("ffn_with_glu", "the feed-forward network always has a gate"),
            )
            if not getattr(config, field)
        ]
        if refused:
            raise ElmExportError(
                f"llama.cpp's openelm architecture cannot express this model: {'; '.join(refused)}. Export it to onnx instead"
            )

    def write(self, job: ExportJob, folder: Path) -> None:
        from targets.gguf.writer import write_gguf

        write_gguf(job, folder)

    def tools(self) -> Mapping[str, str]:
        return {"gguf": version("gguf")}
