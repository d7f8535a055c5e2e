"""Inspection of an artifact: its files against its manifest, its tensors as the format's own reader finds them.

How to list the tensors of a format stands in its row, `elmexport.formats.Format.reader`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elmexport.artifact import MANIFEST, Artifact, StoredTensor
from elmexport.errors import ElmExportError
from elmexport.formats import find_format, load
from elmexport.models import config_from_dict
from elmexport.progress import Progress


@dataclass(frozen=True)
class Inspection:
    """Result of an inspection: the artifact, problems of its files, and its tensors where they were asked for."""

    artifact: Artifact
    problems: tuple[str, ...]
    tensors: tuple[StoredTensor, ...] | None


def inspect_artifact(path: Path, *, tensors: bool = False, progress: Progress | None = None) -> Inspection:
    """Verify every file of the artifact folder `path` against its manifest and, with `tensors`, list what they hold.

    Files that have been altered are not read any further: `tensors` is then None.

    Raises:
        ElmExportError: not an artifact folder, a damaged manifest, or files that the format's reader cannot make sense of.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ElmExportError(f"{path} {found}; give the folder that an export printed, the one that holds {MANIFEST}")
    artifact = Artifact.open(path)
    problems = tuple(artifact.verify(progress))
    listing = list_tensors(artifact) if tensors and not problems else None
    return Inspection(artifact, problems, listing)


def list_tensors(artifact: Artifact) -> tuple[StoredTensor, ...]:
    """List the tensors in the files of `artifact`, unverified.

    Raises:
        ElmExportError: files that the format's reader cannot make sense of.
    """
    config = config_from_dict(artifact.manifest.model.config, where=str(artifact.path / MANIFEST))
    try:
        return tuple(load(find_format(artifact.target).reader)(artifact.path, config))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:  # of readers, where a file makes no sense
        raise ElmExportError(
            f"the files in {artifact.path} are damaged ({type(error).__name__}: {error}); copy the artifact again or export it again"
        ) from error
