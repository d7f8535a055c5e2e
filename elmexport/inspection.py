"""What an artifact holds: whether its files are those of its manifest, and its tensors as the format's own reader finds them.

How to list the tensors of a format stands in its row, `elmexport.formats.Format.reader`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elmexport.artifact import MANIFEST, Artifact
from elmexport.errors import ElmExportError
from elmexport.formats import find_format, load
from elmexport.weights import Role


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an artifact's files."""

    name: str  # in the file
    role: Role | None  # None for what is no weight of the model: tables of angles, masks, constants of the graph
    scheme: str  # how it is stored, in the format's words: "Q4_0", "4-bit, blocks of 32", "float16"
    shape: tuple[int, ...]  # logical, outermost axis first: [out, in] for a matrix
    bytes: int  # in the file, scales included


@dataclass(frozen=True)
class Inspection:
    """An artifact, what is wrong with its files (nothing, it is to be hoped), and its tensors where they were asked for."""

    artifact: Artifact
    problems: tuple[str, ...]
    tensors: tuple[StoredTensor, ...] | None


def inspect_artifact(path: Path, *, tensors: bool = False) -> Inspection:
    """Verify every file of the artifact folder `path` against its manifest and, with `tensors`, list what they hold.

    Files that have been altered are not read any further: `tensors` is then None.

    Raises:
        ElmExportError: not an artifact folder, a damaged manifest, or files that the format's reader cannot make sense of.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ElmExportError(f"{path} {found}; give the folder that an export printed, the one that holds {MANIFEST}")
    artifact = Artifact.open(path)
    problems = tuple(artifact.verify())
    listing = list_tensors(artifact) if tensors and not problems else None
    return Inspection(artifact, problems, listing)


def list_tensors(artifact: Artifact) -> tuple[StoredTensor, ...]:
    """What the files of `artifact` hold, unverified.

    Raises:
        ElmExportError: files that the format's reader cannot make sense of.
    """
    return tuple(load(find_format(artifact.target).reader)(artifact.path))


def role_of(name: str) -> Role | None:
    """The role of a tensor that goes by one of Apple's names (the dots may have become underscores); None for any other."""
    words = name.replace(".", "_")
    return next((role for ending, role in _ENDINGS.items() if words.endswith(ending)), None)


_ENDINGS = {
    "token_embeddings_weight": Role.EMBEDDING,
    "qkv_proj_weight": Role.ATTENTION_QKV,
    "out_proj_weight": Role.ATTENTION_OUT,
    "ffn_proj_1_weight": Role.FFN_GATE_UP,
    "ffn_proj_2_weight": Role.FFN_DOWN,
    "lm_head_weight": Role.LM_HEAD,
    "norm_weight": Role.NORM,
}
