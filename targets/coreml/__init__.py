"""The Core ML target: an `.mlpackage` for iOS 18 and macOS 15, in one of two forms, for the Neural Engine or for GPUs.

Quantized weights are written as they are (`constexpr_blockwise_shift_scale`, `constexpr_lut_to_dense`), the KV cache is a state or an input.
Nothing here needs a Mac.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from elmexport.errors import ElmExportError
from elmexport.graph.ir import Graph
from elmexport.models.base import ModelConfig
from elmexport.quantization.recipes import Plan, Recipe, load_recipe
from elmexport.quantization.schemes import Float, Integer, Lut, Scheme
from elmexport.target import Checked, ExportJob, Target, Usage, Written, option
from elmexport.weights import Role
from targets.coreml.form import Form
from targets.coreml.golden import write_golden
from targets.coreml.gpu.form import GpuForm
from targets.coreml.neural_engine.form import NeuralEngineForm

FORMS: Mapping[str, type[Form]] = {"neural-engine": NeuralEngineForm, "gpu": GpuForm}  # by --device
CACHES = ("state", "io")


@dataclass(frozen=True)
class CoreMLTarget(Target):
    """An `.mlpackage`, or several that run one after another."""

    device: str = field(
        default="neural-engine",
        metadata=option("The form of the program: what the Neural Engine or what the GPU runs best.", choices=tuple(FORMS)),
    )
    kv: str = field(
        default="state",
        metadata=option(
            "Where the cache lives. state: in Core ML; io: in an input, and the caller writes new keys and values to it.", choices=CACHES
        ),
    )
    prefill: int | None = field(
        default=None,
        metadata=option("Tokens that the prefill function reads at once. [default: 64, at most the context]", metavar="TOKENS"),
    )
    argmax: bool = field(
        default=False, metadata=option("Give the most likely token instead of logits; such a package cannot be evaluated.")
    )
    max_package_mb: float | None = field(
        default=None,
        metadata=option(
            "Cut the model into packages of at most so many megabytes (10^6 bytes) of weights. [default: 1000; with --device gpu, which never cuts, 2000]",
            metavar="MB",
        ),
    )

    name: ClassVar[str] = "coreml"
    quants: ClassVar[tuple[str, ...]] = ("int4", "int8", "lut4", "lut6", "lut8", "fp16")
    example: ClassVar[str] = "--model tiny --quant int4"

    @property
    def form(self) -> Form:
        """The form of `device`, with the other settings.

        Raises:
            ElmExportError: a value of `device` or `kv` that does not exist.
        """
        for name, value, allowed in (("device", self.device, FORMS), ("kv", self.kv, CACHES)):
            if value not in allowed:
                raise ElmExportError(f"--{name} is {value!r}; choose {' or '.join(allowed)}")
        return FORMS[self.device](self.kv, self.prefill, self.argmax, self.max_package_mb)

    def refuses(self, scheme: Scheme, role: Role) -> str | None:
        if scheme == Float("fp16") or isinstance(scheme, Lut):
            return None
        if isinstance(scheme, Integer) and scheme.symmetric and scheme.width in (4, 8):
            return None
        return "stores fp16, symmetric integers of 4 or 8 bits per channel or in blocks, and indices into look-up tables"

    def recipe(self, quant: str) -> Recipe:
        if quant in ("fp32", "bf16"):
            raise ElmExportError(
                f"--quant {quant} is not available for coreml: the Neural Engine computes in fp16, and so does what is made for the GPU; choose {', '.join(self.quants)}"
            )
        return super().recipe(quant)

    def stored_recipe(self, quant: str) -> Recipe:
        own = self.form.recipe_file(quant)
        return super().stored_recipe(quant) if own is None else load_recipe(own)

    def adapt(self, recipe: Recipe) -> Recipe:
        if recipe.activations != Float("fp16"):
            raise ElmExportError(
                f'activations is "{recipe.activations.dtype}" in recipe {recipe.name}; Core ML packages compute in fp16: write "fp16"'
            )
        return super().adapt(recipe)

    def usage(self, files: Sequence[str]) -> Sequence[Usage]:
        return (Usage("Core ML, on a Mac: compares and times the package", "python verify.py"),) if "verify.py" in files else ()

    def check(self, config: ModelConfig, context: int) -> None:
        if any(layer.experts for layer in config.dims.layers):
            raise ElmExportError(
                "a mixture of experts cannot be exported to coreml: Core ML has no operation that computes only the experts a token goes to on the Neural "
                "Engine (a gather of their weights falls back to the CPU, and a choice between results computes all of them). "
                "Export it to onnx, gguf or mlx instead"
            )
        self.form.check(config.dims, context)

    def check_plan(self, graph: Graph, plan: Plan) -> None:
        self.form.check_plan(graph, plan)

    def write(self, job: ExportJob, folder: Path) -> Written | None:
        from targets.coreml.head_range import guard_head

        self.check_plan(job.graph, job.weights.plan)
        graph, overflow = guard_head(job.graph, job.weights)
        written = self.form.write(replace(job, graph=graph), folder)
        if overflow is None:
            return written
        written = written or Written()
        return replace(written, notes=(*written.notes, overflow.note()))

    def finish(self, folder: Path, checked: Checked) -> None:
        write_golden(folder, checked, self.form.prompt_tokens(checked.context))

    def tools(self) -> Mapping[str, str]:
        return {"coremltools": version("coremltools"), "numpy": version("numpy")}
