"""Packages of one model that run one after another: their names, and how the manifest and each package say how to chain them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from elmexport.graph.ir import Graph
from elmexport.manifest import Chain, ChainedPackage, Joint
from elmexport.runtimes.coreml_chain import CHAIN
from elmexport.runtimes.coreml_contract import HIDDEN, HIDDEN_OUT
from targets.coreml.chunks import MEGABYTE
from targets.coreml.interface import Form
from targets.coreml.package import MODEL_FOLDER
from targets.coreml.packing import WEIGHT_FILE


def file_names(stem: str, count: int) -> list[str]:
    """Of `count` packages in the order in which they run, which is the order of the names too."""
    if count == 1:
        return [f"{stem}.mlpackage"]
    digits = len(str(count))
    return [f"{stem}-{number:0{digits}d}of{count}.mlpackage" for number in range(1, count + 1)]


def metadata(names: Sequence[str], index: int, part: Graph) -> dict[str, str]:
    """What package `index` says of its place, so that it can be understood without the manifest; nothing if it is the only one."""
    if len(names) == 1:
        return {}
    return {CHAIN: json.dumps({"index": index, "files": list(names), "layers": _layers(part)})}


def described(folder: Path, names: Sequence[str], parts: Sequence[Graph], features: Sequence[Mapping[str, list[str]]], form: Form) -> Chain:
    """How to run the packages in `folder`, in order: each one's layers, bytes of weights, and features (`last_token` in `prefill` only).

    `joints` says which output is which input of the next package; all other inputs come from the caller, and `position` is the same for all.
    """
    packages = tuple(
        ChainedPackage(
            name, _layers(part), weight_bytes(folder / name), tuple(found["inputs"]), tuple(found["outputs"]), tuple(found["states"])
        )
        for name, part, found in zip(names, parts, features, strict=True)
    )
    joints = tuple(Joint((before, HIDDEN_OUT), (after, HIDDEN)) for before, after in pairwise(names))
    return Chain(form.functions, packages, joints)


def note(folder: Path, names: Sequence[str], max_mb: float) -> str:
    """What the user should know of a model that was cut."""
    sizes = [f"{weight_bytes(folder / name) / MEGABYTE:.4g}" for name in names]
    return (
        f"the weights take more than {max_mb:g} MB, so the model is cut into {len(names)} packages that run one after another "
        f"({', '.join(sizes[:-1])} and {sizes[-1]} MB; chain in the manifest says how); iPhones load packages up to about 1000 MB, "
        "Macs up to about 2000: see --max-package-mb"
    )


def weight_bytes(package: Path) -> int:
    """Size of the weight file."""
    return (package / MODEL_FOLDER / WEIGHT_FILE).stat().st_size


def _layers(part: Graph) -> tuple[int, int]:
    """The first and the last."""
    return min(part.kv_heads), max(part.kv_heads)
