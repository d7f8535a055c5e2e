"""Next-token distributions of a reference, kept on disk: every artifact of a model is compared with the same pass.

Log-probabilities are stored as 16-bit codes between the smallest and the largest of each token, and normalized again when read. The step is
some 5e-4 nats; what that costs is second order, about 1e-8 nats of KL divergence per token, and a relative 1e-3 of a single token's
divergence, of either sign, which averages out. What is fresh goes through the same codes, so a result does not depend on the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmexport.cache import cached_file
from elmexport.divergence import log_softmax, token_nll
from elmexport.errors import ElmExportError, VerificationError
from elmexport.evaluation.windows import Windows
from elmexport.progress import Progress
from elmexport.runtimes.base import Runtime

FOLDER_LIMIT = 4 << 30  # bytes of all passes kept; the ones longest unused go first
_SCHEME = "log-probabilities, scheme 1"  # to be raised with any change of the layout
_CODES = 65535


@dataclass(frozen=True)
class Distributions:
    """Next-token distributions on one window of a pass, `tokens` = window - 1 predictions."""

    log_probs: NDArray[np.float32]  # [tokens, vocab], normalized up to the rounding of the codes
    top: NDArray[np.int64]  # [tokens], the most likely next token, before rounding
    nll: NDArray[np.float64]  # [tokens], of the text's own next token in nats, before rounding


class ReferencePass:
    """Next-token distributions of one reference, by window.

    `identity` stands for the model, its precision and its engine; `open_runtime` is called only where the pass is not in `folder` yet. The
    runtime stays open: closing it is its owner's business.
    """

    def __init__(self, identity: str, open_runtime: Callable[[], Runtime], folder: Path, *, limit: int = FOLDER_LIMIT) -> None:
        self._identity, self._open, self._folder, self._limit = identity, open_runtime, folder, limit

    def windows(self, windows: Windows, vocab_size: int, progress: Progress) -> Iterator[Distributions]:
        """Every window's distributions, in order, one in memory at a time. The pass is on disk when this returns.

        Raises:
            ElmExportError: a text too long to be kept, a reference with another vocabulary or with logits that are not finite, or a cache folder
                that cannot be written.
        """
        key = hashlib.sha256(f"{_SCHEME} {self._identity} {windows.hash} {vocab_size}".encode()).hexdigest()
        path = self._folder / f"{key[:32]}.npy"
        shape = (len(windows.ids), windows.length - 1)
        stored = _load(path, vocab_size, shape)
        if stored is None:
            self._write(path, windows, vocab_size, shape, progress)
            stored = _load(path, vocab_size, shape)
            if stored is None:
                raise ElmExportError(f"{path} cannot be read back after writing; check the disk, or set ELMEXPORT_CACHE to another folder")
        else:
            with contextlib.suppress(OSError):  # a folder that may only be read serves as well
                os.utime(path)  # used now: the last to go
        return (_decode(record) for record in stored)

    def _write(self, path: Path, windows: Windows, vocab_size: int, shape: tuple[int, int], progress: Progress) -> None:
        dtype = _record(vocab_size)
        per_window = dtype.itemsize * shape[1]
        if per_window * shape[0] > self._limit:
            raise ElmExportError(
                f"the reference's distributions on {windows.ids.size} tokens take {per_window * shape[0] / 2**30:.1f} GiB of disk, "
                f"{self._limit / 2**30:g} GiB are allowed; use at most {self._limit // per_window * windows.length} tokens of the text"
            )
        runtime = self._open()
        if runtime.vocab_size != vocab_size:
            raise ElmExportError(
                f"the reference has a vocabulary of {runtime.vocab_size}, the artifact one of {vocab_size}; they were not made from the same model, "
                "and their distributions cannot be compared"
            )
        _make_room(self._folder, self._limit - per_window * shape[0])
        progress.stage("reference text pass", windows.ids.size)
        try:
            with cached_file(path) as partial, partial.open("wb") as file:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(file, header)
                for ids in windows.ids:
                    file.write(_encode(runtime, ids).tobytes())
                    progress.advance(len(ids))
        except OSError as error:
            raise ElmExportError(
                f"cannot write {path}: {error.strerror or error}; free space, or set ELMEXPORT_CACHE to another folder"
            ) from None


def window_logits(runtime: Runtime, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits `[tokens - 1, vocab]` of one window, row t the prediction of token t + 1.

    Raises:
        VerificationError: they are not finite.
    """
    logits = runtime.logits(ids[:-1])
    if not np.isfinite(logits).all():
        raise VerificationError(
            f"{runtime.name} gives logits that are not finite; the artifact's numbers overflow or its weights are damaged: export it again"
        )
    return logits


def _record(vocab_size: int) -> np.dtype[Any]:
    return np.dtype([("nll", "<f8"), ("low", "<f4"), ("step", "<f4"), ("top", "<i4"), ("codes", "<u2", (vocab_size,))])


def _encode(runtime: Runtime, ids: NDArray[np.int64]) -> NDArray[Any]:
    logits = window_logits(runtime, ids)
    record = np.empty(len(logits), _record(logits.shape[1]))
    record["nll"], record["top"] = token_nll(logits, ids[1:]), logits.argmax(axis=-1)
    for row, one in zip(record, logits, strict=True):  # row by row: each fits the processor's cache
        log_probs = log_softmax(one[None])[0]
        low, high = log_probs.min(), log_probs.max()
        row["low"], row["step"] = low, (high - low) / _CODES
        row["codes"] = np.rint((log_probs - low) * (_CODES / (high - low)) if high > low else np.zeros_like(log_probs))
    return record


def _decode(record: NDArray[Any]) -> Distributions:
    log_probs = record["codes"] * record["step"][:, None] + record["low"][:, None]
    return Distributions(log_probs, record["top"].astype(np.int64), record["nll"].astype(np.float64))


def _load(path: Path, vocab_size: int, shape: tuple[int, int]) -> NDArray[Any] | None:
    """The stored pass, mapped; None where there is none, or something else."""
    try:
        stored = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return stored if isinstance(stored, np.ndarray) and stored.dtype == _record(vocab_size) and stored.shape == shape else None


def _make_room(folder: Path, allowed: int) -> None:
    """Remove the passes longest unused until the rest takes `allowed` bytes at most."""
    found = []
    for path in folder.glob("*.npy"):
        with contextlib.suppress(OSError):  # gone in the meantime
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= allowed:
            return
        path.unlink(missing_ok=True)
        total -= size
