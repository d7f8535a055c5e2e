"""Reproducibility: one export under other surroundings, each in a process of its own; every file of the artifact must be the same.

    python -m tests.endurance.reproduce [--target gguf] [--quant int4] [--model tiny] [-- more options of the export]

Exit code 1 where a file differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from elmexport.artifact import file_sha256

# What is changed beside the folder, which is another one each time.
SURROUNDINGS: Mapping[str, Mapping[str, str]] = {
    "as it is": {"OMP_NUM_THREADS": "1", "ELMEXPORT_THREADS": "1", "PYTHONHASHSEED": "0"},
    "again": {"OMP_NUM_THREADS": "1", "ELMEXPORT_THREADS": "1", "PYTHONHASHSEED": "0"},
    "another hash seed": {"OMP_NUM_THREADS": "1", "ELMEXPORT_THREADS": "1", "PYTHONHASHSEED": "4711"},
    "a plain locale": {"OMP_NUM_THREADS": "1", "ELMEXPORT_THREADS": "1", "LC_ALL": "C", "LANG": "C", "TZ": "Asia/Tokyo"},
    "two threads": {"OMP_NUM_THREADS": "2", "ELMEXPORT_THREADS": "2"},
}


def export_in(folder: Path, surroundings: Mapping[str, str], command: Sequence[str]) -> dict[str, str]:
    """Export into `folder` with a cache of its own; SHA-256 of every file by its name."""
    environment = {key: value for key, value in os.environ.items() if key not in ("LC_ALL", "LANG", "PYTHONHASHSEED")}
    environment |= {"ELMEXPORT_CACHE": str(folder / "cache"), "PYTHONPATH": os.getcwd(), **surroundings}
    out = folder / "artifact"
    folder.mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-m", "elmexport", *command, "--out", str(out)], check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL
    )
    return {path.relative_to(out).as_posix(): file_sha256(path) for path in sorted(out.rglob("*")) if path.is_file()}


def differences(command: Sequence[str], surroundings: Mapping[str, Mapping[str, str]] = SURROUNDINGS) -> dict[str, list[str]]:
    """Files that differ from those of the first of `surroundings`, by what was changed."""
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="reproduce-") as root:
        for number, (name, changes) in enumerate(surroundings.items()):
            found[name] = export_in(Path(root) / ("folder" * number or "f"), changes, command)
    first, *others = found
    sound = found[first]
    assert sound
    return {name: sorted(file for file in sound.keys() | found[name].keys() if sound.get(file) != found[name].get(file)) for name in others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="gguf")
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("more", nargs="*", help="options of the export")
    given = parser.parse_args()
    found = differences((given.target, "--model", given.model, "--quant", given.quant, *given.more))
    for name, files in found.items():
        print(f"{name}: {', '.join(files) or 'the same bytes'}")
    sys.exit(1 if any(found.values()) else 0)


if __name__ == "__main__":
    main()
