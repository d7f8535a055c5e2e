"""The floor plan: layers, and families and formats that are known in their own places only."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import elmexport

ROOT = Path(elmexport.__file__).parents[1]
# A family's package, the registry's row, the targets' own tables of families, and what other programs call the model.
FAMILIES = {
    "openelm": re.compile(
        r"^(elmexport/models/openelm/|elmexport/models/__init__\.py|targets/\w+/(families|swift)\.py|elmexport/integrations/)"
    ),
    "olmoe": re.compile(r"^(elmexport/models/olmoe/|elmexport/models/__init__\.py|targets/\w+/families\.py)"),
}


def sources() -> list[Path]:
    return [path for folder in ("elmexport", "targets", "calibration") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_named_in_its_own_places_only(family: str) -> None:
    named = [path.relative_to(ROOT).as_posix() for path in sources() if family in path.read_text(encoding="utf-8").casefold()]
    assert [name for name in named if not FAMILIES[family].match(name)] == []
    registry = (ROOT / "elmexport/models/__init__.py").read_text(encoding="utf-8").casefold()
    assert sum(family in line for line in registry.splitlines()) == 1


def test_imports_go_down_only() -> None:
    """The contracts of pyproject.toml."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_that_the_guides_name_exist() -> None:
    """CONTRIBUTING.md and docs/architecture.md, but for names that hold a <placeholder>."""
    for guide in ("CONTRIBUTING.md", "docs/architecture.md"):
        text = (ROOT / guide).read_text(encoding="utf-8")
        for name in re.findall(r"`((?:elmexport|targets|calibration|tests|benchmarks|docs)/[\w./]+)`", text):
            assert (ROOT / name).exists(), f"{guide} names {name}"
