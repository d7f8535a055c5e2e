"""ONNX: one folder, laid out as onnxruntime's ecosystem expects it (`config.json`, tokenizer, `onnx/model*.onnx` with external data)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from elmexport.errors import ElmExportError
from elmexport.models.openelm_config import OpenELMConfig
from elmexport.target import ExportJob, Target

# The file names by which transformers.js finds a quantization.
STEMS: Mapping[str, str] = {"fp32": "model", "fp16": "model_fp16", "int8": "model_quantized", "int4": "model_q4"}
HEAD_MULTIPLE = 16  # GroupQueryAttention rotates head dimensions in steps of this


class OnnxTarget(Target):
    """ONNX in its fast form: `com.microsoft` operators, weights in one external data file."""

    name: ClassVar[str] = "onnx"
    quants: ClassVar[tuple[str, ...]] = ("int4", "int8", "fp16", "fp32")

    def check(self, config: OpenELMConfig, context: int) -> None:
        if config.head_dim % HEAD_MULTIPLE:
            raise ElmExportError(
                f"head_dim is {config.head_dim}; onnxruntime's attention takes multiples of {HEAD_MULTIPLE}. Export this model with another target"
            )

    def write(self, job: ExportJob, folder: Path) -> None:
        from targets.onnx.builder import ExternalData, GraphBuilder, save
        from targets.onnx.lowering import Lowering

        job.write_description(folder)
        path = folder / "onnx" / f"{STEMS[job.recipe.name]}.onnx"
        path.parent.mkdir()
        with ExternalData(path.with_name(path.name + "_data")) as data:
            model = Lowering(job, GraphBuilder(data)).run()
        save(model, path)

    def tools(self) -> Mapping[str, str]:
        return {name: version(name) for name in ("onnx", "onnx-ir")}
