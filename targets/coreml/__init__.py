"""The Core ML target: an `.mlpackage` for iOS 18 and macOS 15, in the form that the Neural Engine runs best.

Quantized weights are written as they are (`constexpr_blockwise_shift_scale`, `constexpr_lut_to_dense`), the KV cache is a state, prefill and decode are two functions
over one weight file. Nothing here needs a Mac.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from elmexport import __version__
from elmexport.errors import ElmExportError
from elmexport.models.openelm_config import OpenELMConfig
from elmexport.quantization.schemes import Float, Integer, Lut, Scheme
from elmexport.runtimes.mil.coremltools_import import quiet_coremltools
from elmexport.target import ExportJob, Target
from elmexport.weights import Role
from targets.coreml.interface import CONTEXT_MULTIPLE, MAX_DIM, functions


class CoreMLTarget(Target):
    name = "coreml"
    quants = ("int4", "int8", "lut4", "lut6", "lut8", "fp16")

    def refuses(self, scheme: Scheme, role: Role) -> str | None:
        if scheme == Float("fp16") or isinstance(scheme, Lut) or (isinstance(scheme, Integer) and scheme.symmetric):
            return None
        return "stores fp16, symmetric integers per channel or in blocks, and indices into look-up tables"

    def check(self, config: OpenELMConfig, context: int) -> None:
        if context % CONTEXT_MULTIPLE:
            below = min(context, config.rope_max_length) // CONTEXT_MULTIPLE * CONTEXT_MULTIPLE
            above = below + CONTEXT_MULTIPLE
            allowed = [str(value) for value in (below, above) if 0 < value <= config.rope_max_length]
            raise ElmExportError(
                f"context is {context}; the cache of a Core ML model must hold a multiple of {CONTEXT_MULTIPLE} tokens: "
                f"pass --context {' or '.join(allowed) or CONTEXT_MULTIPLE}"
            )
        if config.head_dim % CONTEXT_MULTIPLE:
            raise ElmExportError(
                f"head_dim is {config.head_dim}; the cache of a Core ML model takes multiples of {CONTEXT_MULTIPLE}: export this model to onnx or gguf"
            )
        widths = {"model_dim": config.model_dim}
        for i, layer in enumerate(config.layers):
            widths[f"the query, key and value projection of layer {i}"] = (layer.query_heads + 2 * layer.kv_heads) * config.head_dim
            widths[f"the feed-forward width of layer {i}"] = layer.ffn_dim
        for what, width in widths.items():
            if width > MAX_DIM:
                raise ElmExportError(f"{what} is {width}; the Neural Engine takes at most {MAX_DIM}: export this model to onnx or gguf")

    def write(self, job: ExportJob, folder: Path) -> None:
        with quiet_coremltools():
            from targets.coreml.package import MODEL_FOLDER, write_package_manifest, write_specification
            from targets.coreml.packing import WeightFile

        package = folder / f"{job.name}-{job.recipe.name}.mlpackage"
        data = package / MODEL_FOLDER
        with _write_errors():
            file = WeightFile(data, job.weights, job.advance)
            write_specification(job.graph, file, _metadata(job), data / "model.mlmodel")
            file.close()
        write_package_manifest(package)
        job.write_description(folder)

    def tools(self) -> Mapping[str, str]:
        return {"coremltools": version("coremltools"), "numpy": version("numpy")}


def _metadata(job: ExportJob) -> dict[str, str]:
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
        "functions": json.dumps(functions(job.graph)),
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
