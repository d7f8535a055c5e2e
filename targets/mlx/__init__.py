"""MLX: a folder that mlx-lm loads as it is (`config.json`, `model*.safetensors`, tokenizer).

Covered: affine quantization of 3, 4, 5, 6 and 8 bits, mxfp4, mixtures by module. Not covered: 2 bits, mxfp8, nvfp4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.quantization.mxfp4 import Mxfp4
from elmexport.quantization.recipes import Recipe
from elmexport.quantization.schemes import CodedScheme, Float, Integer, PerBlock, Scheme
from elmexport.target import ExportJob, Target, Usage, Written, option
from elmexport.weights import Role

GROUPS = (32, 64, 128)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
ROUGH = 0.005  # relative error of a scale from which on the user is told


@dataclass(frozen=True)
class MlxTarget(Target):
    """A folder in Hugging Face's layout, weights in MLX's packing."""

    max_shard_size: str = field(
        default="5G", metadata=option("Split the weights into files of at most so many bytes each: 500M, 2G.", metavar="SIZE")
    )

    name: ClassVar[str] = "mlx"
    quants: ClassVar[tuple[str, ...]] = (
        *("int4", "int4-group64", "int4-group128", "int4-asym"),
        *("int3", "int5", "int6", "int8", "mxfp4", "fp16", "bf16"),
    )
    quants_note: ClassVar[str] = (
        "Each group of values has a scale and a bias, 32 bits in all; groups of 32 but where the name says otherwise."
    )
    example: ClassVar[str] = "--model 450M --quant int4-group64 --method gptq"

    def stored_recipe(self, quant: str) -> Recipe:
        return _with_biases(super().stored_recipe(quant))

    def adapt(self, recipe: Recipe) -> Recipe:
        """As `Target.adapt`; MLX has no activation type of its own, it follows from the stored ones.

        Raises:
            ElmExportError: types of which MLX would compute in another one than the recipe says.
        """
        computed = recipe.activations
        kinds = {"norms": recipe.norms, "fallback": recipe.fallback}
        for rule in recipe.rules:
            kinds[f"scheme {rule.scheme.recipe_name}"] = rule.scheme if isinstance(rule.scheme, Float) else Float("fp16")
        odd = [f"{words} has {kind}" for words, kind in kinds.items() if kind != computed]
        if computed.dtype == "fp32" or odd:
            raise ElmExportError(
                f"recipe {recipe.name}: activations are {computed}{', but ' + odd[0] if odd else ''}; MLX computes in the type of what is stored. "
                "Give norms, fallback and floating-point schemes the type of the activations: fp16, which scales have, or bf16 where nothing is quantized"
            )
        return _with_biases(recipe.given(imatrix=False))

    def refuses(self, scheme: Scheme, role: Role) -> str | None:
        match scheme:
            case Float(dtype="fp16" | "bf16"):
                return None
            case Integer(granularity=PerBlock(size=size)) if size in GROUPS:
                return None
            case Mxfp4():
                # A row that is read from it would come out as bf16, and everything after it.
                return None if role is not Role.EMBEDDING else "stores mxfp4 in every matrix but the embedding"
        return f"stores fp16, bf16, mxfp4, and integers in blocks of {', '.join(map(str, GROUPS))}"

    def usage(self, files: Sequence[str]) -> Sequence[Usage]:
        return (Usage("mlx-lm", 'pip install mlx-lm\nmlx_lm.generate --model . --prompt "Once upon a time"'),)

    def check(self, config: ModelConfig, context: int) -> None:
        from targets.mlx.families import model_class

        model_class(config).check(config)
        _ = self._shard_bytes

    def write(self, job: ExportJob, folder: Path) -> Written:
        from targets.mlx.companions import write_companions
        from targets.mlx.families import model_class
        from targets.mlx.lowering import lower
        from targets.mlx.writer import write_weights

        norm = next(spec for spec in job.graph.weight_specs() if spec.role is Role.NORM_FINAL)
        peak = float(job.weights.numbers(norm).abs().max())
        modules = lower(job.graph, job.config.head_name.removesuffix(".weight"), peak)
        error = write_weights(modules, job.weights, folder, self._shard_bytes, job.advance)
        write_companions(job, modules, folder)
        notes = list(model_class(job.config).swift_notes(job.config, modules.alpha))
        if error > ROUGH:
            notes.append(
                f"alpha {modules.alpha:g} takes scales below fp16's normal range: they are rounded by up to {error:.1%}, which the self-check measures"
            )
        if modules.tied != job.graph.dims.tied:
            notes.append("the head has a table of its own: with the embedding's, times alpha, its input might leave fp16")
        return Written(notes=tuple(notes))

    @cached_property
    def _shard_bytes(self) -> int:
        match = re.fullmatch(r"([1-9]\d*)([KMG]?)", self.max_shard_size.upper())
        if match is None:
            raise ElmExportError(f'--max-shard-size is {self.max_shard_size!r}; give bytes, or thousands of them, like "500M" or "2G"')
        return int(match[1]) * _UNITS[match[2]]


def _with_biases(recipe: Recipe) -> Recipe:
    return replace(recipe, biases=any(isinstance(rule.scheme, CodedScheme) for rule in recipe.rules))
