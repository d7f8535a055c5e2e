"""Activation statistics as llama.cpp's importance matrix, and back.

The file is what `llama-imatrix` writes, with one entry more: `token_embd.weight`, which serves as the head where it is tied. llama.cpp's own
tool leaves it out, but `llama-quantize` looks it up under this name and uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from calibration.statistics import MEAN_SQUARE, Facts, Statistics
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.files import complete_file
from elmexport.models import trace
from elmexport.models.base import ModelConfig
from targets.gguf import GgufTarget
from targets.gguf.imatrix import read_imatrix
from targets.gguf.lowering import matrices


def write_imatrix(statistics: Statistics, config: ModelConfig, path: Path, *, datasets: Sequence[str] | None = None) -> None:
    """Write `statistics` to `path` in llama.cpp's GGUF form, `datasets` as the texts' names (those of the statistics where None).

    Raises:
        ElmExportError: a model that llama.cpp cannot hold, or `path` cannot be written.
    """
    from gguf import GGUFWriter

    facts = statistics.facts
    GgufTarget().check(config, facts.window)

    class Writer(GGUFWriter):  # type: ignore[misc]
        def add_architecture(self) -> None:
            """An importance matrix has none."""

    def write(partial: Path) -> None:
        writer = Writer(partial, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(datasets or [facts.text]))
        writer.add_uint32("imatrix.chunk_count", facts.tokens // facts.window)
        writer.add_uint32("imatrix.chunk_size", facts.window)
        entries = {name: entry for entry in matrices(config) for name in entry.names}
        for name in sorted(entries):
            moments = statistics.moments(entries[name].spec)
            if moments is None:
                continue  # an importance matrix that came without the embedding
            sums = moments.mean_square.double().numpy() * moments.tokens
            writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32))
            writer.add_tensor(f"{name}.counts", np.full(1, moments.tokens, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(path) as partial:
            write(partial)
    except OSError as error:
        raise ElmExportError(f"cannot write {path}: {error.strerror or error}; free space or choose another place") from error


def statistics_from_imatrix(path: Path, checkpoint: Checkpoint) -> Statistics:
    """What the importance matrix `path`, ours or llama.cpp's, says of `checkpoint`: mean squares only, no peaks.

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
