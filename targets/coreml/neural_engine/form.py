"""The form for the Neural Engine: its checks, and the writing of its packages, one or several that run one after another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from elmexport.contracts.coreml import Interface
from elmexport.errors import ElmExportError
from elmexport.graph.dims import ModelDims
from elmexport.graph.ir import Graph
from elmexport.graph.partition import partition
from elmexport.mil.coremltools_import import quiet_coremltools
from elmexport.quantization.recipes import Plan
from elmexport.target import ExportJob, Written
from targets.coreml.chunks import plan_cuts
from targets.coreml.form import Form, disk_errors, own_metadata, package_metadata
from targets.coreml.interface import MAX_DIM, PREFILL_MULTIPLE, PREFILL_TOKENS


@dataclass(frozen=True)
class NeuralEngineForm(Form):
    """Form for the Neural Engine: two functions of fixed shape, prefill and decode, with no dimension above the Neural Engine's largest."""

    default_max_package_mb: ClassVar[float] = 1000.0  # what iPhones load

    def interface(self, context: int) -> Interface:
        """Interface of the package."""
        return Interface(self.prompt_tokens(context), cache_io=self.kv == "io", argmax=self.argmax)

    def prompt_tokens(self, context: int) -> int:
        return min(PREFILL_TOKENS, context) if self.prefill is None else self.prefill

    def check_sizes(self, dims: ModelDims, context: int) -> None:
        self._check_tokens(dims, context)
        widths = {"model_dim": dims.model_dim}
        for i, layer in enumerate(dims.layers):
            widths[f"the query, key and value projection of layer {i}"] = (layer.query_heads + 2 * layer.kv_heads) * dims.head_dim
            widths[f"the feed-forward width of layer {i}"] = layer.ffn_dim
        for what, width in widths.items():
            if width > MAX_DIM:
                raise ElmExportError(f"{what} is {width}; the Neural Engine takes at most {MAX_DIM}: export this model to onnx or gguf")

    def _check_tokens(self, dims: ModelDims, context: int) -> None:
        prefill = self.prompt_tokens(context)
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
        group = max(layer.queries_per_kv_head for layer in dims.layers)
        if prefill * group > MAX_DIM:
            raise ElmExportError(
                f"--prefill is {prefill}, with {group} queries for each key; the Neural Engine takes at most {MAX_DIM} queries at once: pass "
                f"--prefill {MAX_DIM // group // PREFILL_MULTIPLE * PREFILL_MULTIPLE} or less"
            )
        seen = context + prefill if self.kv == "io" else context
        if seen > MAX_DIM:
            raise ElmExportError(f"tokens attend to {seen} others; the Neural Engine takes at most {MAX_DIM}: pass a smaller --context")

    def check_plan(self, graph: Graph, plan: Plan) -> None:
        plan_cuts(graph, plan, self.max_package_bytes)

    def write(self, job: ExportJob, folder: Path) -> Written | None:
        with quiet_coremltools():
            from targets.coreml.neural_engine import chain
            from targets.coreml.neural_engine.package import write_package

        interface = self.interface(job.graph.context)
        parts = partition(job.graph, plan_cuts(job.graph, job.weights.plan, self.max_package_bytes))
        names = chain.file_names(f"{job.name}-{job.recipe.name}", len(parts))
        called = own_metadata(
            {
                "functions": json.dumps(interface.functions),
                "kv": "io" if interface.cache_io else "state",
                "outputs": "argmax" if interface.argmax else "logits",
            }
        )
        features = []
        with disk_errors():
            for index, (name, part) in enumerate(zip(names, parts, strict=True)):
                metadata = package_metadata(job) | called | chain.metadata(names, index, part)
                features.append(write_package(folder / name, part, interface, job.weights, metadata, job.advance))
        job.write_description(folder)
        if len(parts) == 1:
            return None
        return Written(chain.described(folder, names, parts, features, interface), (chain.note(folder, names, self.max_package_bytes),))
