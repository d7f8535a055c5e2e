"""Conversion between llama.cpp's importance matrix and statistics of activations, for the GGUF package and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.statistics import MEAN_SQUARE, Facts, Statistics
from elmexport.checkpoint.base import Checkpoint
from elmexport.models import trace
from elmexport.models.base import ModelConfig
from targets.gguf import GgufTarget
from targets.gguf.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from targets.gguf.lowering import matrices


def write_importance(statistics: Statistics, config: ModelConfig, path: Path, *, datasets: Sequence[str] | None = None) -> None:
    """Write `statistics` to `path` as an importance matrix, `datasets` as the texts' names (those of the statistics where None).

    Raises:
        ElmExportError: a model that llama.cpp cannot hold, or `path` cannot be written.
    """
    facts = statistics.facts
    GgufTarget().check(config, facts.window)
    entries: dict[str, NDArray[np.float32]] = {}
    for matrix in matrices(config):
        moments = statistics.moments(matrix.spec)
        if moments is not None:  # an importance matrix may have come without the embedding
            entries |= dict.fromkeys(matrix.names, moments.mean_square.numpy())
    chunks = facts.tokens // facts.window
    write_imatrix(ImportanceMatrix(path, entries, tuple(datasets or [facts.text]), chunks, facts.window), tokens=facts.tokens)


def read_importance(path: Path, checkpoint: Checkpoint) -> Statistics:
    """Read statistics of `checkpoint` from the importance matrix `path`, ours or llama.cpp's: mean squares only, no peaks.

    The file does not say which model it was measured on; sizes must fit.

    Raises:
        ElmExportError: see `read_imatrix` and `ImportanceMatrix.check`.
    """
    import torch

    imatrix = read_imatrix(path)
    entries = matrices(checkpoint.config)
    imatrix.check((name, entry.part_shape) for entry in entries for name in entry.names)
    activations = trace(checkpoint.config).linear_inputs
    inputs = {entry.spec.name: activations[entry.spec.name] for entry in entries if entry.names[0] in imatrix.entries}
    # Parts of one weight, gate and up, read the same activation.
    tensors = {
        f"{inputs[entry.spec.name]}.{MEAN_SQUARE}": torch.from_numpy(np.array(imatrix.entries[entry.names[0]]))
        for entry in entries
        if entry.spec.name in inputs
    }
    facts = Facts(
        model=checkpoint.source.name,
        identity="",
        text=", ".join(imatrix.datasets) or "a text unnamed",
        text_sha256="",
        tokens=imatrix.chunks * imatrix.chunk_size,
        window=imatrix.chunk_size,
        hessian=False,
        inputs=inputs,
        residual_peaks=(),
        norm_peaks={},
    )
    return Statistics(facts, tensors)
