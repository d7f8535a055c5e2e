"""Wall time and peak memory of `--method gptq` or `distill`, stage by stage, each model in a fresh process, on random weights.

python benchmarks/gptq_time.py                        270M, 450M and 1.1B, 32768 tokens
python benchmarks/gptq_time.py --models 270M --tokens 4096 --json
python benchmarks/gptq_time.py --models 270M --tokens 8192 --method distill

`forward` is both copies of the text going through the model, `products` the Hessians and what the targets are made from, `solve` the target
matrices, `round` GPTQ itself, `distill` training after it, `other` reading weights and the rest, all in CPU seconds, which a busy machine does not change much.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile

from measure import report, run_python

STAGES = ("forward", "products", "solve", "round", "distill", "other")
COLUMNS = {
    "model": "{model}",
    "tokens": "{tokens}",
    "wall s": "{wall_s:.0f}",
    "cpu s": "{cpu_s:.0f}",
    **{f"{stage} cpu s": f"{{{stage}_s:.0f}}" for stage in STAGES},
    "peak MiB": "{peak_mib:.0f}",
}
# The stages are functions of `calibration.sequential`; each is timed where it is called.
CODE = """
import json, sys, time
from collections import Counter

import torch

from calibration import calibrated, sequential
from calibration.calibrate import make_sample
from elmexport.checkpoint import open_checkpoint
from elmexport.progress import SilentProgress
from elmexport.quantization.recipes import resolve
from elmexport.target import find_target

spent = Counter()

def timed(stage, function):
    def call(*arguments, **options):
        start = time.process_time()
        result = function(*arguments, **options)
        spent[stage] += time.process_time() - start
        return result
    return call

sequential._run = timed("forward", sequential._run)
sequential._moments = timed("products", sequential._moments)
sequential.fit = timed("solve", sequential.fit)
sequential.choose_damping = timed("solve", sequential.choose_damping)
sequential.gptq = timed("round", sequential.gptq)
calibrated.distill = timed("distill", calibrated.distill)
checkpoint = open_checkpoint(sys.argv[1], random_weights=0, tokenizer="none")
plan = resolve(find_target("gguf").recipe("int4"), checkpoint.config)
sample, progress = make_sample(checkpoint, tokens=int(sys.argv[2])), SilentProgress()
start = time.process_time()
if sys.argv[3] == "distill":
    calibrated.distilled_weights(checkpoint, plan, sample, progress)
else:
    for _ in sequential.quantize_in_order(checkpoint, plan, sample, progress):
        pass
total = time.process_time() - start
spent["other"] = total - sum(spent.values())
print(json.dumps(spent))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["270M", "450M", "1.1B"], metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--method", choices=("gptq", "distill"), default="gptq")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    for model in given.models:
        print(f"{model}, {given.tokens} tokens", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as cache:  # weights that were found before would be read from there
            os.environ["ELMEXPORT_CACHE"] = cache
            run = run_python("-c", CODE, model, str(given.tokens), given.method)
        if run.exit_code:
            print(run.stderr, file=sys.stderr)
            return 1
        spent = json.loads(run.stdout)
        stages = {f"{stage}_s": spent.get(stage, 0.0) for stage in STAGES}
        rows.append(
            {"model": model, "tokens": given.tokens, "wall_s": run.wall_s, "cpu_s": run.cpu_s, **stages, "peak_mib": run.peak_bytes / 2**20}
        )
    report("gptq_time", rows, COLUMNS, as_json=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
