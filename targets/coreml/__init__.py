"""The Core ML target: an `.mlpackage` for iOS 18 and macOS 15, in the form that the Neural Engine runs best.

Quantized weights are written as they are (`constexpr_blockwise_shift_scale`, `constexpr_lut_to_dense`), the KV cache is a state, prefill and decode are two functions
over one weight file. Nothing here needs a Mac.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from elmexport import __version__
from elmexport.checkpoint.tokenizer_json import write_tokenizer_files
from elmexport.errors import ElmExportError
from elmexport.graph.ir import Graph
from elmexport.graph.partition import partition
from elmexport.models.base import ModelConfig
from elmexport.quantization.recipes import Plan, Recipe, load_recipe
from elmexport.quantization.schemes import Float, Integer, Lut, Scheme
from elmexport.runtimes.mil.coremltools_import import quiet_coremltools
from elmexport.target import Checked, ExportJob, Target, Written
from elmexport.weights import Role
from targets.coreml.chunks import MEGABYTE, package_sizes, plan_cuts
from targets.coreml.golden import write_golden
from targets.coreml.gpu.interface import MODEL_NAME, hub_name
from targets.coreml.interface import CONTEXT_MULTIPLE, MAX_DIM, PREFILL_MULTIPLE, PREFILL_TOKENS, Form

DEVICES = ("neural-engine", "gpu")
CACHES = ("state", "io")
MAX_PACKAGE_MB = {"neural-engine": 1000.0, "gpu": 2000.0}  # what iPhones load, and what Macs load


@dataclass(frozen=True)
class CoreMLTarget(Target):
    """An `.mlpackage`.

    `device` is the form of the program, "neural-engine" or "gpu"; `kv` where the cache lives, "state" in Core ML's states or "io" in inputs
    and outputs; `prefill` the tokens of the prefill function (None: 64, or the context where that is shorter); `argmax` lets the package
    give the most likely token instead of logits; `max_package_mb` is the most that the weights of one package may take, in 10^6 bytes (None:
    1000, and 2000 for the GPU).
    """

    device: str = "neural-engine"
    kv: str = "state"
    prefill: int | None = None
    argmax: bool = False
    max_package_mb: float | None = None

    name: ClassVar[str] = "coreml"
    quants: ClassVar[tuple[str, ...]] = ("int4", "int8", "lut4", "lut6", "lut8", "fp16")

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
        for_gpu = files(__name__).joinpath("recipes", "gpu", f"{quant}.toml")
        if self.device == "gpu" and quant in self.quants and for_gpu.is_file():
            return self.adapt(load_recipe(for_gpu))
        return super().recipe(quant)

    def adapt(self, recipe: Recipe) -> Recipe:
        if recipe.activations != Float("fp16"):
            raise ElmExportError(
                f'activations is "{recipe.activations.dtype}" in recipe {recipe.name}; Core ML packages compute in fp16: write "fp16"'
            )
        return super().adapt(recipe)

    def check(self, config: ModelConfig, context: int) -> None:
        self._check_choices()
        if context % CONTEXT_MULTIPLE:
            below = min(context, config.dims.max_context) // CONTEXT_MULTIPLE * CONTEXT_MULTIPLE
            above = below + CONTEXT_MULTIPLE
            allowed = [str(value) for value in (below, above) if 0 < value <= config.dims.max_context]
            raise ElmExportError(
                f"context is {context}; the cache of a Core ML model must hold a multiple of {CONTEXT_MULTIPLE} tokens: "
                f"pass --context {' or '.join(allowed) or CONTEXT_MULTIPLE}"
            )
        dims = config.dims
        if dims.head_dim % CONTEXT_MULTIPLE:
            raise ElmExportError(
                f"head_dim is {dims.head_dim}; the cache of a Core ML model takes multiples of {CONTEXT_MULTIPLE}: export this model to onnx or gguf"
            )
        if self.device == "gpu":
            return
        self._check_tokens(config, context)
        widths = {"model_dim": dims.model_dim}
        for i, layer in enumerate(dims.layers):
            widths[f"the query, key and value projection of layer {i}"] = (layer.query_heads + 2 * layer.kv_heads) * dims.head_dim
            widths[f"the feed-forward width of layer {i}"] = layer.ffn_dim
        for what, width in widths.items():
            if width > MAX_DIM:
                raise ElmExportError(f"{what} is {width}; the Neural Engine takes at most {MAX_DIM}: export this model to onnx or gguf")

    def _check_choices(self) -> None:
        for name, value, allowed in (("device", self.device, DEVICES), ("kv", self.kv, CACHES)):
            if value not in allowed:
                raise ElmExportError(f"--{name} is {value!r}; choose {' or '.join(allowed)}")
        if self.device == "gpu":
            for option, given in (("--kv io", self.kv != "state"), ("--argmax", self.argmax), ("--prefill", self.prefill is not None)):
                if given:
                    raise ElmExportError(
                        f"{option} has no use with --device gpu, whose package has states, logits, and one function for any number of tokens: "
                        f"leave it out, or choose --device neural-engine"
                    )

    def _check_tokens(self, config: ModelConfig, context: int) -> None:
        prefill = self._form(context).prefill
        if prefill > context:
            raise ElmExportError(
                f"--prefill is {prefill} and the context {context} tokens; pass at most --prefill {context}, or a larger --context"
            )
        if prefill < 1 or prefill % PREFILL_MULTIPLE:
            below = prefill // PREFILL_MULTIPLE * PREFILL_MULTIPLE
            allowed = [str(value) for value in (below, below + PREFILL_MULTIPLE) if 0 < value <= context]
            raise ElmExportError(
                f"--prefill is {prefill}; the Neural Engine keeps tokens in units of {PREFILL_MULTIPLE}: pass --prefill {' or '.join(allowed) or PREFILL_MULTIPLE}"
            )
        group = max(layer.queries_per_kv_head for layer in config.dims.layers)
        if prefill * group > MAX_DIM:
            raise ElmExportError(
                f"--prefill is {prefill}, with {group} queries for each key; the Neural Engine takes at most {MAX_DIM} queries at once: pass "
                f"--prefill {MAX_DIM // group // PREFILL_MULTIPLE * PREFILL_MULTIPLE} or less"
            )
        seen = context + prefill if self.kv == "io" else context
        if seen > MAX_DIM:
            raise ElmExportError(f"tokens attend to {seen} others; the Neural Engine takes at most {MAX_DIM}: pass a smaller --context")

    def _form(self, context: int) -> Form:
        return Form(
            prefill=min(PREFILL_TOKENS, context) if self.prefill is None else self.prefill, cache_io=self.kv == "io", argmax=self.argmax
        )

    def check_plan(self, graph: Graph, plan: Plan) -> None:
        if self.device != "gpu":
            plan_cuts(graph, plan, self._max_package_mb * MEGABYTE)
            return
        size = math.ceil(package_sizes(graph, plan)[0, len(graph.kv_heads)] / MEGABYTE)
        if size > self._max_package_mb:
            raise ElmExportError(
                f"the weights take {size} MB in {plan.recipe.name}, and --max-package-mb is {self._max_package_mb:g}; with --device gpu a model is "
                f"one package, the one that swift-transformers loads: pass a --quant of fewer bits, --device neural-engine, which cuts, or "
                f"--max-package-mb {size}, knowing that Macs load about 2000 and iPhones about 1000"
            )

    @property
    def _max_package_mb(self) -> float:
        return MAX_PACKAGE_MB[self.device] if self.max_package_mb is None else self.max_package_mb

    def write(self, job: ExportJob, folder: Path) -> Written | None:
        self.check_plan(job.graph, job.weights.plan)
        if self.device == "gpu":
            _write_for_gpu(job, folder)
            return None
        with quiet_coremltools():
            from targets.coreml import chain
            from targets.coreml.package import write_package

        form = self._form(job.graph.context)
        parts = partition(job.graph, plan_cuts(job.graph, job.weights.plan, self._max_package_mb * MEGABYTE))
        names = chain.file_names(f"{job.name}-{job.recipe.name}", len(parts))
        features = []
        with _write_errors():
            for index, (name, part) in enumerate(zip(names, parts, strict=True)):
                metadata = _metadata(job, form) | chain.metadata(names, index, part)
                features.append(write_package(folder / name, part, form, job.weights, metadata, job.advance))
        job.write_description(folder)
        if len(parts) == 1:
            return None
        return Written(
            {chain.MANIFEST_KEY: chain.manifest(folder, names, parts, features, form)}, (chain.note(folder, names, self._max_package_mb),)
        )

    def finish(self, folder: Path, checked: Checked) -> None:
        write_golden(folder, checked, self.prefill)

    def tools(self) -> Mapping[str, str]:
        return {"coremltools": version("coremltools"), "numpy": version("numpy")}


def _write_for_gpu(job: ExportJob, folder: Path) -> None:
    with quiet_coremltools():
        from targets.coreml.gpu.package import write_specification
        from targets.coreml.package import MODEL_FOLDER, write_package_manifest
        from targets.coreml.packing import WeightFile

    package = folder / f"{job.name}-{job.recipe.name}.mlpackage"
    data = package / MODEL_FOLDER
    with _write_errors():
        file = WeightFile(data, job.weights, job.advance, rank=2, max_rows=None)
        write_specification(job.graph, file, _metadata(job, None) | {MODEL_NAME: hub_name(job.name)}, data / "model.mlmodel")
        file.close()
    write_package_manifest(package)
    job.write_description(folder)
    if job.tokenizer is not None:
        write_tokenizer_files(job.tokenizer, job.graph.context, folder)


def _metadata(job: ExportJob, form: Form | None) -> dict[str, str]:
    """What the package says of itself, under `elmexport.…` keys."""
    alpha = next(node.weight_scale for node in job.graph.nodes if node.op == "embed")
    facts = {
        "version": __version__,
        "model": job.name,
        "config": json.dumps(job.config.to_dict()),
        "quant": job.recipe.name,
        "quant_words": job.recipe.words,
        "context": str(job.graph.context),
        "alpha": repr(alpha),
    }
    if form is not None:
        facts |= {
            "functions": json.dumps(form.functions),
            "kv": "io" if form.cache_io else "state",
            "outputs": "argmax" if form.argmax else "logits",
        }
    return {f"elmexport.{key}": value for key, value in facts.items()}


@contextmanager
def _write_errors() -> Iterator[None]:
    """coremltools' weight writer tells of a full disk by a RuntimeError without an errno; make it the OSError that it is."""
    try:
        yield
    except RuntimeError as error:
        if "[MIL FileWriter]" not in str(error):
            raise
        raise OSError("the weight file could not be written") from error
