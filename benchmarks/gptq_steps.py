"""What each step of `--method gptq` is worth: KL on texts that calibration has not read, with one step changed at a time.

python benchmarks/gptq_steps.py --model DIR --text wiki.test.raw boolq.txt code.txt --novels novels.txt

`--novels` is a text of one kind to calibrate on in the place of the bundled one, which has many. Weights only, int4 in blocks of 32, embedding and head in
8 bits, in one float32 forward pass.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from quantization_quality import Judge, distilled, in_order, nearest, plan_of
from torch import Tensor

from calibration import sequential
from calibration.calibrate import make_sample
from calibration.gptq import gptq
from calibration.held_out import Half, fit, mean_of
from elmexport.checkpoint import open_checkpoint

SMALL = 0.01  # of the mean diagonal: the constant that GPTQ is published with
Weights = dict[str, Tensor]
Change = Callable[[], AbstractContextManager[Any]]


def with_small_ridge(halves: Sequence[Half], start: float) -> tuple[Tensor | None, float]:
    """`fit` with a constant ridge, of both halves together."""
    return fit([Half(mean_of([half.hessian for half in halves]), mean_of([half.missing for half in halves]))], SMALL)


def replaced(**changes: Any) -> Change:
    """Functions of `calibration.sequential` replaced by others."""
    return lambda: patch.multiple(sequential, **changes)


CHANGES: dict[str, Change] = {
    "all of it": nullcontext,
    "ridge and damping of 0.01": replaced(choose_damping=lambda first, second, start: SMALL, fit=with_small_ridge),
    "damping of 0.01": replaced(choose_damping=lambda first, second, start: SMALL),
    "no least-squares target": replaced(fit=lambda halves, start: (None, start)),
    "no correction of the stream's error": replaced(_gathered=lambda stage, exact, rounded: None),
    "scales and codes not refitted": replaced(gptq=partial(gptq, rounds=0)),
    "refitted twice": replaced(gptq=partial(gptq, rounds=2)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a checkpoint, as for exports (default tiny)")
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="texts to measure on")
    parser.add_argument("--novels", type=Path, metavar="FILE", help="text of one kind to calibrate on")
    parser.add_argument("--windows", type=int, default=8, help="of each text, of 512 tokens (default 8)")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text (default 16384)")
    given = parser.parse_args()
    with torch.inference_mode():
        checkpoint = open_checkpoint(given.model)
        judge = Judge(checkpoint, given.text, given.windows, 512)
        plan = plan_of(checkpoint, "int4-block32")
        sample = make_sample(checkpoint, tokens=given.tokens)
        print("| | " + " | ".join(judge.ids) + " | CPU s |\n|---" + "|---:" * (len(judge.ids) + 1) + "|", flush=True)

        def show(name: str, make: Callable[[], Weights], change: Change = nullcontext) -> None:
            start = time.process_time()
            with change():
                weights = make()
            spent = time.process_time() - start
            cells = [f"{figures['kl']:.4f}, × {figures['perplexity_ratio']:.3f}" for figures in judge.figures(weights).values()]
            print(f"| {name} | " + " | ".join(cells) + f" | {spent:.0f} |", flush=True)

        show("round to nearest", lambda: nearest(checkpoint, plan))
        for name, change in CHANGES.items():
            show(name, lambda: in_order(checkpoint, plan, sample), change)
        if given.novels is not None:
            novels = make_sample(checkpoint, [given.novels.read_text(encoding="utf-8")], text=[given.novels], tokens=given.tokens)
            show("calibrated on novels alone", lambda: in_order(checkpoint, plan, novels))
        show("distilled after it", lambda: distilled(checkpoint, plan, sample))
    return 0


if __name__ == "__main__":
    sys.exit(main())
