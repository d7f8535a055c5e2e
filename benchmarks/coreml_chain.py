"""Large models cut into Core ML packages: export time and peak memory, and logits of the chain against torch, on random weights.

python benchmarks/coreml_chain.py                          1.1B fp16 and 3B int4, packages of at most 1000 MB
python benchmarks/coreml_chain.py --jobs 1.1B:int8 --max-package-mb 500 --json

The reference runs the same quantized weights, dequantized, through the model's graph in float32, one tensor in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import report, run_python

COLUMNS = {
    "model": "{model}",
    "quant": "{quant}",
    "packages MB": "{packages_mb}",
    "export s": "{export_s:.1f}",
    "export peak MiB": "{export_peak_mib:.0f}",
    "run s": "{run_s:.1f}",
    "run peak MiB": "{run_peak_mib:.0f}",
    "kl mean": "{kl_mean:.2g}",
    "same token": "{same_token:.0%}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="*", default=["1.1B:fp16", "3B:int4"], metavar="MODEL:QUANT")
    parser.add_argument("--max-package-mb", type=float, default=1000.0)
    parser.add_argument("--tokens", type=int, default=16, help="how many are compared; the last four one by one")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=4, metavar=("MODEL", "QUANT", "ARTIFACT", "OUT"), help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--reference", nargs=4, metavar=("MODEL", "QUANT", "ARTIFACT", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run or given.reference:
        (_chain if given.run else _reference)(*(given.run or given.reference), given.tokens)
        return 0
    rows = []
    for job in given.jobs:
        row = _measure(*job.split(":"), given)
        if row is None:
            return 1
        rows.append(row)
    report("coreml_chain", rows, COLUMNS, as_json=given.json)
    return 0


def _measure(model: str, quant: str, given: argparse.Namespace) -> dict[str, Any] | None:
    folder = Path(tempfile.mkdtemp())
    out = folder / "artifact"
    export = ["-m", "elmexport", "coreml", "--model", model, "--quant", quant, "--random-weights", "0", "--no-verify", "--out", str(out)]
    export += ["--calibrate", "none", "--max-package-mb", str(given.max_package_mb)]
    own = [__file__, "--tokens", str(given.tokens)]
    try:
        done = []
        for command in (
            export,
            [*own, "--run", model, quant, str(out), str(folder / "chain.npy")],
            [*own, "--reference", model, quant, str(out), str(folder / "reference.npy")],
        ):
            print(f"python {' '.join(command)}", file=sys.stderr, flush=True)
            done.append(run_python(*command))
            if done[-1].exit_code:
                print(done[-1].stderr, file=sys.stderr)
                return None
        sizes = [f"{path.stat().st_size / 1e6:.0f}" for path in sorted(out.rglob("weight.bin"))]
        kl, same = _compare(folder / "reference.npy", folder / "chain.npy")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "model": model,
        "quant": quant,
        "packages_mb": " + ".join(sizes),
        "export_s": round(done[0].wall_s, 2),
        "export_peak_mib": round(done[0].peak_bytes / 2**20, 1),
        "run_s": round(done[1].wall_s, 2),
        "run_peak_mib": round(done[1].peak_bytes / 2**20, 1),
        "kl_mean": kl,
        "same_token": same,
    }


def _ids(tokens: int, vocab: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab, tokens)


def _chain(model: str, quant: str, artifact: str, out: str, tokens: int) -> None:
    import numpy as np

    from elmexport.runtimes import open_artifact

    runtime = open_artifact(artifact)
    ids = _ids(tokens, runtime.vocab_size)
    first = tokens - 4
    np.save(out, np.concatenate([runtime.logits(ids[:first]), *(runtime.logits(ids[i : i + 1], i) for i in range(first, tokens))]))


def _reference(model: str, quant: str, artifact: str, out: str, tokens: int) -> None:
    import numpy as np
    import torch

    from elmexport.checkpoint import open_checkpoint
    from elmexport.graph.forward import KVCaches, forward
    from elmexport.models import trace
    from elmexport.quantization.recipes import resolve
    from elmexport.quantization.weight_source import CheckpointWeights
    from elmexport.target import find_target
    from elmexport.weights import WeightSpec

    checkpoint = open_checkpoint(model, random_weights=0)
    context = json.loads((Path(artifact) / "manifest.json").read_text(encoding="utf-8"))["context"]
    graph = trace(checkpoint.config, context)
    weights = CheckpointWeights(checkpoint, resolve(find_target("coreml").recipe(quant), checkpoint.config))

    def weight(spec: WeightSpec) -> torch.Tensor:
        tensor = weights.get(spec)
        return tensor.to(torch.float32) if isinstance(tensor, torch.Tensor) else tensor.dequantize()

    ids = torch.from_numpy(_ids(tokens, checkpoint.config.vocab_size))[None]
    with torch.inference_mode():
        np.save(out, forward(graph, weight, ids, 0, KVCaches(graph))[0].numpy())


def _compare(reference: Path, chain: Path) -> tuple[float, float]:
    import numpy as np

    def log_softmax(x: Any) -> Any:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    a, b = log_softmax(np.load(reference)), log_softmax(np.load(chain))
    return float((np.exp(a) * (a - b)).sum(-1).mean()), float((a.argmax(-1) == b.argmax(-1)).mean())


if __name__ == "__main__":
    sys.exit(main())
