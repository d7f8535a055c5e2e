"""Chain of packages that run one after another: their names, and what manifest and metadata say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from elmexport.contracts.coreml import HIDDEN, HIDDEN_OUT, Interface, PackageIndex
from elmexport.graph.ir import Graph
from elmexport.manifest import Chain, ChainedPackage, Joint
from targets.coreml.chunks import MEGABYTE
from targets.coreml.package import MODEL_FOLDER
from targets.coreml.packing import WEIGHT_FILE


def file_names(stem: str, count: int) -> list[str]:
    """File names of `count` packages in the order in which they run, which is the order of the names too."""
    if count == 1:
        return [f"{stem}.mlpackage"]
    digits = len(str(count))
    return [f"{stem}-{number:0{digits}d}of{count}.mlpackage" for number in range(1, count + 1)]


def metadata(names: Sequence[str], index: int, part: Graph) -> dict[str, str]:
    """Metadata of package `index` on its place, by which it can be understood without the manifest; none if it is the only one."""
    if len(names) == 1:
        return {}
    return PackageIndex(index, list(names), list(_layers(part))).to_metadata()


def described(
    folder: Path, names: Sequence[str], parts: Sequence[Graph], features: Sequence[Mapping[str, list[str]]], interface: Interface
) -> Chain:
    """Entry of the manifest: how to run the packages in `folder`, in order.

    Of each, its layers, bytes of weights, and features (`last_token` in `prefill` only).

    `joints` says which output is which input of the next package; all other inputs come from the caller, and `position` is the same for all.
    """
    packages = tuple(
        ChainedPackage(
            name, _layers(part), weight_bytes(folder / name), tuple(found["inputs"]), tuple(found["outputs"]), tuple(found["states"])
        )
        for name, part, found in zip(names, parts, features, strict=True)
    )
    joints = tuple(Joint((before, HIDDEN_OUT), (after, HIDDEN)) for before, after in pairwise(names))
    return Chain(interface.functions, packages, joints)


def note(folder: Path, names: Sequence[str], max_bytes: float) -> str:
    """Note for the user on a model that was cut."""
    sizes = [f"{weight_bytes(folder / name) / MEGABYTE:.4g}" for name in names]
    return (
        f"the weights take more than {max_bytes / MEGABYTE:g} MB, so the model is cut into {len(names)} packages that run one after another "
        f"({', '.join(sizes[:-1])} and {sizes[-1]} MB; chain in the manifest says how); iPhones load packages up to about 1000 MB, "
        "Macs up to about 2000: see --max-package-mb"
    )


def weight_bytes(package: Path) -> int:
    """Size of the weight file."""
    return (package / MODEL_FOLDER / WEIGHT_FILE).stat().st_size


def _layers(part: Graph) -> tuple[int, int]:
    """First and last layer."""
    return min(part.kv_heads), max(part.kv_heads)
