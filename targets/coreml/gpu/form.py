"""The form for GPUs: its checks, and the writing of its package with the files that swift-transformers wants beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from elmexport.contracts.coreml_gpu import HUB_NAME_METADATA
from elmexport.errors import ElmExportError
from elmexport.graph.ir import Graph
from elmexport.mil.coremltools_import import quiet_coremltools
from elmexport.quantization.recipes import Plan
from elmexport.target import ExportJob
from targets.coreml.chunks import MEGABYTE, package_sizes
from targets.coreml.form import Form, disk_errors, package_metadata
from targets.coreml.gpu.interface import hub_name
from targets.coreml.interface import PREFILL_TOKENS


@dataclass(frozen=True)
class GpuForm(Form):
    """Form for GPUs: one function for any number of tokens, in one package, as swift-transformers runs it."""

    default_max_package_mb: ClassVar[float] = 2000.0  # what Macs load

    def prompt_tokens(self, context: int) -> int:
        return min(PREFILL_TOKENS, context)

    def check_settings(self) -> None:
        for option, given in (("--kv io", self.kv != "state"), ("--argmax", self.argmax), ("--prefill", self.prefill is not None)):
            if given:
                raise ElmExportError(
                    f"{option} has no use with --device gpu, whose package has states, logits, and one function for any number of tokens: "
                    f"leave it out, or choose --device neural-engine"
                )

    def check_plan(self, graph: Graph, plan: Plan) -> None:
        size = math.ceil(package_sizes(graph, plan)[0, len(graph.kv_heads)] / MEGABYTE)
        if size * MEGABYTE > self.max_package_bytes:
            raise ElmExportError(
                f"the weights take {size} MB in {plan.recipe.name}, and --max-package-mb is {self.max_package_bytes / MEGABYTE:g}; with --device gpu a "
                f"model is one package, the one that swift-transformers loads: pass a --quant of fewer bits, --device neural-engine, which cuts, or "
                f"--max-package-mb {size}, knowing that Macs load about 2000 and iPhones about 1000"
            )

    def write(self, job: ExportJob, folder: Path) -> None:
        with quiet_coremltools():
            from targets.coreml.gpu.package import write_package

        metadata = package_metadata(job) | {HUB_NAME_METADATA: hub_name(job.name)}
        with disk_errors():
            write_package(folder / f"{job.name}-{job.recipe.name}.mlpackage", job.graph, job.weights, metadata, job.advance)
        job.write_description(folder)
