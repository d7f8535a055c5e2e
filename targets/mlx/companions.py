"""The small files beside the weights: `config.json`, `generation_config.json`, tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import CodedScheme
from elmexport.target import ExportJob
from targets.mlx.families import model_class
from targets.mlx.lowering import Modules
from targets.mlx.packing import parameters

TORCH_NAMES = {"fp16": "float16", "bf16": "bfloat16"}


def write_companions(job: ExportJob, modules: Modules, folder: Path) -> None:
    """Write everything but the weights into `folder`."""
    job.write_description(folder)
    _write_json(folder / "config.json", _config(job, modules))
    _write_json(folder / "generation_config.json", {**job.special_ids, "do_sample": False})


def _config(job: ExportJob, modules: Modules) -> dict[str, Any]:
    kind = model_class(job.config)
    data = job.config.to_dict()
    data[kind.eps_key], data[kind.tied_key] = modules.eps, modules.tied
    data["torch_dtype"] = TORCH_NAMES[job.recipe.activations.dtype]
    quantization = _quantization(modules, job.weights.plan)
    if quantization:
        data |= {"quantization": quantization, "quantization_config": quantization}  # the second is what the hub looks at
    return dict(sorted(data.items()))


def _quantization(modules: Modules, plan: Plan) -> Mapping[str, Any]:
    """Describe the schemes: the one that most weights have, and by module each other one, `false` for floating point. Empty where none is quantized."""
    schemes = {entry.path: plan.schemes[entry.spec.name] for entry in modules.entries if not entry.spec.role.is_norm}
    sizes: dict[CodedScheme, int] = {}
    for entry in modules.entries:
        scheme = schemes.get(entry.path)
        if isinstance(scheme, CodedScheme):
            sizes[scheme] = sizes.get(scheme, 0) + entry.size
    if not sizes:
        return {}
    common = max(sizes, key=lambda scheme: sizes[scheme])
    others = {
        path: parameters(scheme) if isinstance(scheme, CodedScheme) else False for path, scheme in schemes.items() if scheme != common
    }
    return parameters(common) | others


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
