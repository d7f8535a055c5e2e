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
from quantization_quality import Judge
from torch import Tensor

from calibration import sequential
from calibration.calibrate import make_sample
from calibration.calibrated import distilled_weights
from calibration.dequantized import Dequantized
from calibration.gptq import gptq
from calibration.held_out import Half, fit, mean_of
from calibration.text import Sample
from calibration.weight_set import StoredWeights
from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.base import Checkpoint
from elmexport.progress import SilentProgress
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan, Recipe, Rule, resolve
from elmexport.quantization.schemes import CodedScheme, find_scheme
from elmexport.target import find_target
from elmexport.weights import Role

SMALL = 0.01  # of the mean diagonal: the constant that GPTQ is published with
Weights = dict[str, Tensor]
Change = Callable[[], AbstractContextManager[Any]]


def in_order(checkpoint: Checkpoint, plan: Plan, sample: Sample) -> Weights:
    return {spec.name: q.dequantize() for spec, q in sequential.quantize_in_order(checkpoint, plan, sample, SilentProgress())}


def nearest(checkpoint: Checkpoint, plan: Plan) -> Weights:
    found = {}
    for spec in checkpoint.specs.values():
        if isinstance(scheme := plan.schemes[spec.name], CodedScheme):
            found[spec.name] = quantize(checkpoint.tensor(spec.name).to(torch.float32), scheme, "rtn").dequantize()
    return found


def distilled(checkpoint: Checkpoint, plan: Plan, sample: Sample) -> Weights:
    with torch.inference_mode(False):
        return dict(Dequantized(StoredWeights(checkpoint, plan, distilled_weights(checkpoint, plan, sample, SilentProgress()))).items())


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
        int4 = find_target("gguf").recipe("int4")
        rules = (Rule(find_scheme("int8-block32"), frozenset({Role.EMBEDDING, Role.LM_HEAD})), Rule(find_scheme("int4-block32")))
        plan = resolve(Recipe("int4", "int4", int4.activations, int4.norms, int4.scales, int4.fallback, 1.0, rules), checkpoint.config)
        sample = make_sample(checkpoint, tokens=given.tokens)
        print("| | " + " | ".join(judge.ids) + " |\n|---" + "|---:" * len(judge.ids) + "|", flush=True)

        def show(name: str, make: Callable[[], Weights], change: Change = nullcontext) -> None:
            start = time.process_time()
            with change():
                weights = make()
            spent = time.process_time() - start
            cells = [f"{figures['kl']:.4f}, × {figures['perplexity_ratio']:.3f}" for figures in judge.figures(weights).values()]
            print(f"| {name} | " + " | ".join(cells) + f" | <!-- {spent:.0f} CPU s -->", flush=True)

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
