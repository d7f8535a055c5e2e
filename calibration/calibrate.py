"""Calibration run: from a model's name and a text to a statistics file, as `elmexport calibrate` does it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from calibration.collect import collect
from calibration.statistics import FORMAT, Statistics
from calibration.text import Sample, bundled_sample, read_text, sample_windows
from calibration.work import FolderWork
from elmexport import __version__
from elmexport.checkpoint import open_checkpoint, open_tokenizer, require_tokenizer
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.files import check_writable, complete_file
from elmexport.progress import Progress, SilentProgress

DEFAULT_TOKENS = 32768
DEFAULT_WINDOW = 512


class TextOptions(TypedDict, total=False):
    """Options of the calibration text; `make_sample` says what each means and its default."""

    text: Sequence[Path]
    tokens: int
    window: int | None


@dataclass(frozen=True)
class CalibrationResult:
    """Finished calibration."""

    path: Path
    statistics: Statistics
    checkpoint: Checkpoint
    notes: tuple[str, ...]  # what the user should know that is not an error


def calibrate(
    model: str,
    *,
    out: Path | None = None,
    hessian: bool = False,
    force: bool = False,
    random_weights: int | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    adapter: Path | None = None,
    progress: Progress | None = None,
    **text: Unpack[TextOptions],
) -> CalibrationResult:
    """Measure `model` (an alias, hub id, or path; see `open_checkpoint`) and write its statistics to `out`.

    `out` is `./<model>-calibration.safetensors` where None. `adapter` is merged into the model, see `open_checkpoint`.

    Raises:
        ElmExportError: see `open_checkpoint`, `make_sample` and `calibrate_checkpoint`.
    """
    progress = progress or SilentProgress()
    if out is not None:
        check_output(out, force=force)
    texts = [read_text(path) for path in text.get("text", ())]  # a misspelt name must not cost a download
    checkpoint = open_checkpoint(
        model, revision=revision, tokenizer=tokenizer, random_weights=random_weights, adapter=adapter, progress=progress
    )
    if random_weights is None:
        checkpoint.tokenizer_path = require_tokenizer(checkpoint)
    out = out or Path(f"{checkpoint.source.name}-calibration.safetensors")
    sample = make_sample(checkpoint, texts, **text)
    wanted = text.get("tokens", DEFAULT_TOKENS)
    notes = list(checkpoint.notes)
    if sample.tokens < wanted:
        notes.append(f"the text holds {sample.tokens:,} tokens, fewer than the {wanted:,} asked for; all of it was read")
    statistics = calibrate_checkpoint(checkpoint, sample, out, hessian=hessian, force=force, progress=progress)
    return CalibrationResult(out, statistics, checkpoint, tuple(notes))


def make_sample(
    checkpoint: Checkpoint, texts: Sequence[str] = (), *, text: Sequence[Path] = (), tokens: int = DEFAULT_TOKENS, window: int | None = None
) -> Sample:
    """Cut a calibration text into windows: `texts`, the contents of the files `text`, or the bundled text where there is none.

    About `tokens` tokens in windows of `window`, 512 or the model's maximum, whichever is less, where None.

    Raises:
        ElmExportError: numbers that make no sense, a tokenizer of another model, or see `sample_windows`.
    """
    config = checkpoint.config
    window = min(DEFAULT_WINDOW, config.dims.context) if window is None else window
    if not 2 <= window <= config.dims.context:
        raise ElmExportError(f"--window is {window}; {checkpoint.source.name} takes 2 to {config.dims.context} tokens at once")
    if tokens < 1:
        raise ElmExportError(f"--tokens is {tokens}; calibration reads at least 1 token ({DEFAULT_TOKENS:,} is the default)")
    tokenizer = open_tokenizer(checkpoint)
    if not texts:
        return bundled_sample(tokenizer, config, "calibration", tokens=tokens, window=window)
    if tokenizer is None:
        raise ElmExportError(f"{checkpoint.source.name} has no tokenizer to read the text with; pass one with --tokenizer PATH")
    return sample_windows(tokenizer, texts, ", ".join(path.name for path in text), tokens=tokens, window=window)


def calibrate_checkpoint(
    checkpoint: Checkpoint, sample: Sample, out: Path, *, hessian: bool = False, force: bool = False, progress: Progress | None = None
) -> Statistics:
    """Measure statistics into the file `out`, with a work folder beside it until `out` is complete; see `collect`.

    A run that was killed leaves that folder, and the next with the same model, sample and kind of statistics goes on from there.

    Raises:
        ElmExportError: `out` exists and `force` is false, it cannot be written, or see `collect`.
    """
    check_output(out, force=force)
    key = [FORMAT, __version__, checkpoint.identity(progress), sample.sha256, hessian]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    prefix = f".{out.name}.calibrating-"
    folder = out.with_name(prefix + digest)
    try:
        for other in out.parent.iterdir() if out.parent.is_dir() else ():
            if other.name.startswith(prefix) and other != folder:
                shutil.rmtree(other, ignore_errors=True)
        work = FolderWork(folder, sample.window, checkpoint.config.dims.model_dim)
        statistics = collect(checkpoint, sample, hessian=hessian, work=work, progress=progress)
        # Within the folder, so that a kill leaves nothing else; the folder is on the disk of `out`.
        with complete_file(folder / "statistics.safetensors") as partial:
            statistics.save(partial)
        os.replace(folder / "statistics.safetensors", out)
    except ElmExportError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        raise ElmExportError(
            f"cannot write {out}: {error.strerror or error}; free space or choose another --out. Run the same command again to go on from where it stopped"
        ) from error
    work.remove()
    return Statistics.load(out)


def check_output(out: Path, *, force: bool) -> None:
    """Refuse, before any work, an output file that would overwrite something.

    Raises:
        ElmExportError: `out` exists and `force` is false, or it is a folder.
    """
    if out.is_dir():
        raise ElmExportError(f"{out} is a folder; --out is the file to write")
    if out.exists() and not force:
        raise ElmExportError(f"{out} exists already; pass --force to replace it, or choose another --out")
    check_writable(out)
