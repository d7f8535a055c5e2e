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
    counts: dict[str, list[int]] = {}
    for matrix in matrices(config):
        moments = [found for spec in matrix.specs if (found := statistics.moments(spec)) is not None]
        if not moments:  # an untied embedding multiplies nothing; an importance matrix may have come without a tied one
            continue
        entries |= dict.fromkeys(matrix.names, np.concatenate([one.mean_square.numpy() for one in moments]))
        if matrix.spec.expert is not None:
            counts[matrix.names[0]] = [one.tokens for one in moments]
    chunks = facts.tokens // facts.window
    imatrix = ImportanceMatrix(path, entries, tuple(datasets or [facts.text]), chunks, facts.window, counts=counts)
    write_imatrix(imatrix, tokens=facts.tokens)


def read_importance(path: Path, checkpoint: Checkpoint) -> Statistics:
    """Read statistics of `checkpoint` from the importance matrix `path`, ours or llama.cpp's: mean squares only, no peaks.

    The file does not say which model it was measured on; sizes must fit.

    Raises:
        ElmExportError: see `read_imatrix` and `ImportanceMatrix.check`.
    """
    import torch

    imatrix = read_imatrix(path)
    entries = matrices(checkpoint.config)
    imatrix.check((name, entry.tensor_shape) for entry in entries for name in entry.names)
    activations = trace(checkpoint.config).linear_inputs
    inputs: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for entry in entries:
        for spec in entry.specs:
            # Parts of one weight, gate and up, read the same activation.
            values = imatrix.of(entry.names[0], spec.expert, spec.shape[-1])
            if values is not None and spec.name in activations:
                inputs[spec.name] = activations[spec.name]
                tensors[f"{inputs[spec.name]}.{MEAN_SQUARE}"] = torch.from_numpy(np.array(values))
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
