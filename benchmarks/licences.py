"""Licences of what elmexport needs to run, and of what its extras add, as their own metadata say: `python benchmarks/licences.py > docs/licences.md`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("ggml", "llama", "mlx")
HEAD = """# Licences of the dependencies

What `pip install elmexport` brings, and what its extras add, with the licences that the packages' own metadata name, on Linux with the versions
of `constraints.txt`. elmexport itself is under Apache-2.0 and contains none of their code. The wheels of several (torch, numpy, coremltools, onnxruntime,
llama-cpp-python) contain further libraries, whose licences lie in the wheels. Made by `python benchmarks/licences.py`.
"""


def needed(lines: Iterable[str], extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """The requirements in `lines` that count here, with `extras`."""
    for line in lines:
        found = Requirement(line)
        if found.marker is None or any(found.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield found


def closure(lines: Iterable[str]) -> dict[str, Distribution]:
    """All packages that `lines` need, and that these need, by name; what is not installed is left out."""
    found: dict[str, Distribution] = {}
    open_ones, seen = list(needed(lines)), set[tuple[str, ...]]()
    while open_ones:
        requirement = open_ones.pop()
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        if (key, *sorted(requirement.extras)) not in seen:
            seen.add((key, *sorted(requirement.extras)))
            open_ones += needed(package.requires or (), requirement.extras)
        found[key] = package
    return found


def licence(package: Distribution) -> str:
    """The licence in a word or two: SPDX where the package gives it, else its classifiers, else the first line of its text."""
    metadata = package.metadata
    if metadata.get("License-Expression"):
        return metadata["License-Expression"]
    named = [
        one.rpartition(" :: ")[2] for one in metadata.get_all("Classifier", []) if one.startswith("License :: ") and one.count("::") > 1
    ]
    first = (metadata.get("License") or "").strip().splitlines()
    return ", ".join(named) or (first[0][:60] if first else "not named in its metadata")


def main() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    plain = closure(project["dependencies"])
    extras = closure(line for extra in EXTRAS for line in project["optional-dependencies"][extra])
    print(HEAD)
    for title, packages in (
        ("Always", plain),
        (f"With the extras {', '.join(EXTRAS)}", {name: extras[name] for name in extras.keys() - plain.keys()}),
    ):
        print(f"## {title}\n\n| package | licence |\n|---|---|")
        for name, package in sorted(packages.items()):
            print(f"| {name} | {licence(package)} |")
        print()


if __name__ == "__main__":
    main()
