"""ONNX target: a folder as onnxruntime's ecosystem expects it (`config.json`, tokenizer, `onnx/model*.onnx` with external data)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.quantization.schemes import Float, Integer, PerBlock, Scheme
from elmexport.target import ExportJob, Target, Usage, option
from elmexport.weights import Role

# The file names by which transformers.js finds a quantization; to it, all that is 4-bit and computes in fp32 is "q4".
_INT4 = ("int4", "int4-block64", "int4-block128", "int4-asym", "int4-all")
STEMS: Mapping[str, str] = {"fp32": "model", "fp16": "model_fp16", "int8": "model_quantized", **dict.fromkeys(_INT4, "model_q4")}
BLOCKS = (16, 32, 64, 128, 256)  # of MatMulNBits; of versions before it refused others, some gave zeros
HEAD_MULTIPLE = 16  # GroupQueryAttention rotates head dimensions in steps of this


@dataclass(frozen=True)
class OnnxTarget(Target):
    """ONNX with weights in one external data file."""

    ops: str = field(
        default="fast",
        metadata=option(
            "fast: onnxruntime's own operators; standard: operators of ONNX opset 24 alone, for other engines.",
            choices=("fast", "standard"),
        ),
    )

    name: ClassVar[str] = "onnx"
    example: ClassVar[str] = "--model 450M --quant int8 --out 450M-onnx"
    quants: ClassVar[tuple[str, ...]] = (*_INT4, "int8", "fp16", "fp32")

    def refuses(self, scheme: Scheme, role: Role) -> str | None:
        match scheme:
            case Float(dtype="fp32" | "fp16"):
                return None
            case Integer(width=4 | 8, granularity=PerBlock(size=size), symmetric=symmetric) if size in BLOCKS:
                # The gather wants zero points in other bytes than the product, and a tied table is read by both.
                return None if symmetric or role is not Role.EMBEDDING else "stores asymmetric integers in every matrix but the embedding"
        return f"stores fp32, fp16, and integers of 4 or 8 bits in blocks of {', '.join(map(str, BLOCKS))}"

    def usage(self, files: Sequence[str]) -> Sequence[Usage]:
        return (
            Usage(
                "onnxruntime-genai",
                "import onnxruntime_genai as og\n\n"
                'model = og.Model(".")\n'
                "tokenizer = og.Tokenizer(model)\n"
                "params = og.GeneratorParams(model)\n"
                "params.set_search_options(max_length=64)\n"
                "generator = og.Generator(model, params)\n"
                'generator.append_tokens(tokenizer.encode("Once upon a time"))\n'
                "while not generator.is_done():\n"
                "    generator.generate_next_token()\n"
                "print(tokenizer.decode(generator.get_sequence(0)))",
                "python",
            ),
        )

    def check(self, config: ModelConfig, context: int) -> None:
        if config.dims.head_dim % HEAD_MULTIPLE:
            raise ElmExportError(
                f"head_dim is {config.dims.head_dim}; onnxruntime's attention takes multiples of {HEAD_MULTIPLE}. Export this model with another target"
            )

    def write(self, job: ExportJob, folder: Path) -> None:
        from targets.onnx.builder import ExternalData, GraphBuilder, save
        from targets.onnx.companions import write_companions
        from targets.onnx.families import ALIASES
        from targets.onnx.lowering import Lowering
        from targets.onnx.standard import StandardLowering

        job.write_description(folder, ALIASES.get(job.config.model_type))
        path = folder / "onnx" / f"{STEMS.get(job.recipe.name, f'model_{job.recipe.name}')}.onnx"
        path.parent.mkdir()
        with ExternalData(path.with_name(path.name + "_data")) as data:
            model = {"fast": Lowering, "standard": StandardLowering}[self.ops](job, GraphBuilder(data)).run()
        save(model, path)
        write_companions(job, path, folder)

    def tools(self) -> Mapping[str, str]:
        return {name: version(name) for name in ("onnx", "onnx-ir")}
