"""Golden files, by which an artifact is checked on a device: `golden.npz` and `verify.py`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np

from elmexport.target import Checked
from targets.coreml.verify import chunks

GOLDEN, VERIFY = "golden.npz", "verify.py"
DECODED = 4  # tokens at the end that are read one by one


def write_golden(folder: Path, checked: Checked, prefill: int) -> None:
    """Write both files into the artifact `folder`; `prefill` is the number of tokens of a prompt that are read at once.

    `golden.npz`: `ids` int32 `[tokens]`; `positions` int32 `[n]`, those of the ids after which scores are kept: the last of every chunk that
    `prefill` reads, and the last `decoded` (int32) tokens, which are read one by one; `model` float32 and `artifact` float16 `[n, vocab]`: the scores by
    the model, and by the artifact in the engine of the self-check.
    """
    ids = checked.ids.astype(np.int32)
    bounds = chunks(len(ids), DECODED, prefill, checked.context)
    ends = [stop - 1 for start, stop in bounds if stop - start > 1 or stop > len(ids) - DECODED]
    # The archive records no time: numpy gives every member the first one that the format has.
    np.savez_compressed(
        folder / GOLDEN,
        ids=ids,
        positions=np.array(ends, np.int32),
        decoded=np.array(DECODED, np.int32),
        model=checked.model[ends].astype(np.float32),
        artifact=checked.artifact[ends].astype(np.float16),
    )
    (folder / VERIFY).write_text(files(__package__).joinpath(VERIFY).read_text(encoding="utf-8"), encoding="utf-8")
