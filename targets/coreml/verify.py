"""Check of this Core ML artifact on a Mac: comparison with its model, and speed. Not run on Apple hardware when it was written.

    pip install coremltools numpy
    python verify.py [FOLDER] [--compute-units all|cpu_and_ne|cpu_and_gpu|cpu_only] [--repeat 10]

macOS 15 or later. FOLDER is the artifact, by default where this file lies. `golden.npz` holds token ids, and the scores (logits) of the next
token at some of their positions: by the model itself in float32, and by this package in the engine that checked the export
(a reference executor in fp16, where that was no Mac). The prompt goes through `prefill`, the last tokens one by one through `decode`. Exit code 1 if Core ML is further from the model than
the export allowed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
UNITS = {"all": "ALL", "cpu_and_ne": "CPU_AND_NE", "cpu_and_gpu": "CPU_AND_GPU", "cpu_only": "CPU_ONLY"}


class Package:
    """One `.mlpackage`: its functions, and the cache of one sequence."""

    def __init__(self, coremltools: Any, path: Path, units: Any) -> None:
        description = coremltools.utils.load_spec(str(path)).description
        self.functions = {function.name: function for function in description.functions} or {"main": description}
        self.models = {
            name: coremltools.models.MLModel(str(path), compute_units=units, **({"function_name": name} if description.functions else {}))
            for name in self.functions
        }
        self.reset()

    def reset(self) -> None:
        """Forget what was read."""
        name, function = next(iter(self.functions.items()))
        self.state = self.models[name].make_state() if len(function.state) else None
        self.caches = {key: np.zeros(self.shape(name, key), np.float16) for key in self.inputs(name) if key in ("key_cache", "value_cache")}

    def inputs(self, function: str) -> list[str]:
        return [feature.name for feature in self.functions[function].input]

    def shape(self, function: str, feature: str) -> tuple[int, ...]:
        """Of an input, state or output."""
        found = self.functions[function]
        kinds = {feature.name: feature.type for feature in (*found.input, *found.output, *found.state)}
        kind = kinds[feature]
        array = kind.stateType.arrayType if kind.WhichOneof("Type") == "stateType" else kind.multiArrayType
        return tuple(array.shape)

    def run(self, function: str, values: Arrays, position: int, count: int) -> Arrays:
        """Read `count` tokens at `position`; `values` holds at least the inputs other than caches."""
        inputs = {name: self.caches[name] if name in self.caches else values[name] for name in self.inputs(function)}
        results: Arrays = self.models[function].predict(inputs, **({} if self.state is None else {"state": self.state}))
        for cache, new in (("key_cache", "new_keys"), ("value_cache", "new_values")):
            if cache in self.caches:
                self.caches[cache][:, :, position : position + count] = results[new][:, :, :count]
        return results


class Model:
    """The artifact's packages, one after another."""

    def __init__(self, coremltools: Any, folder: Path, manifest: Mapping[str, Any], units: Any) -> None:
        chain = manifest.get("chain", {}).get("packages")
        names = [package["file"] for package in chain] if chain else sorted(path.name for path in folder.glob("*.mlpackage"))
        self.packages = [Package(coremltools, folder / name, units) for name in names]
        first = self.packages[0]
        self.gpu = "main" in first.functions
        self.context: int = manifest["context"]
        self.chunk = min(64, self.context) if self.gpu else first.shape("prefill", "input_ids")[1]

    def reset(self) -> None:
        for package in self.packages:
            package.reset()

    def read(self, ids: NDArray[np.int32], position: int) -> Arrays:
        """The last package's outputs after `ids`: one token goes to `decode`, 2 to `chunk` tokens to `prefill`."""
        count = len(ids)
        if self.gpu:
            values: Arrays = {"inputIds": ids[None], "causalMask": np.zeros((1, 1, 1, position + count), np.float16)}
            return self.packages[0].run("main", values, position, count)
        function, size = ("decode", 1) if count == 1 else ("prefill", self.chunk)
        values = {
            "input_ids": np.pad(ids, (0, size - count))[None].astype(np.int32),
            "position": np.array([position], np.int32),
            "last_token": np.array([count - 1], np.int32),
        }
        for package in self.packages:
            values |= package.run(function, values, position, count)
            if "hidden_out" in values:
                values["hidden"] = values.pop("hidden_out")
        return values

    def scores(self, results: Arrays) -> NDArray[np.float64] | None:
        """`[vocab]` of the last token; None if the package gives the most likely token alone."""
        if "logits" in results:
            return np.asarray(results["logits"], np.float64)[0, -1]
        parts = sorted((name for name in results if name.startswith("logits_")), key=lambda name: int(name.rpartition("_")[2]))
        return np.concatenate([np.asarray(results[name], np.float64)[0, -1] for name in parts]) if parts else None


def log_softmax(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Compute log-probabilities `[vocab]`."""
    shifted = scores.astype(np.float64) - scores.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), np.float64)


def divergence(model: NDArray[Any], other: NDArray[Any]) -> float:
    """KL(model || other) in nats, of two `[vocab]` of scores."""
    p, q = log_softmax(model), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum())


def chunks(count: int, decoded: int, chunk: int, context: int) -> list[tuple[int, int]]:
    """Bounds of what is read at once: whole or padded chunks that fit the cache, then single tokens."""
    bounds, start = [], 0
    while start < count:
        prefilled = start < count - decoded - 1 and start + chunk <= context
        stop = min(start + chunk, count - decoded) if prefilled else start + 1
        bounds.append((start, stop))
        start = stop
    return bounds


def compare(model: Model, golden: Mapping[str, NDArray[Any]], limit: float) -> bool:
    """Read the golden ids; print how far Core ML is from the model and from the check. Whether it is near enough."""
    ids, positions = golden["ids"].astype(np.int32), golden["positions"].tolist()
    wanted = dict(zip(positions, zip(golden["model"], golden["artifact"], strict=True), strict=True))
    costs, others, checks, agree, agree_other = [], [], [], 0, 0
    model.reset()
    for start, stop in chunks(len(ids), int(golden["decoded"]), model.chunk, model.context):
        results = model.read(ids[start:stop], start)
        if stop - 1 not in wanted:
            continue
        reference, other = wanted.pop(stop - 1)
        scores = model.scores(results)
        token = int(np.asarray(results["token"]).reshape(-1)[0]) if scores is None else int(scores.argmax())
        agree += token == int(reference.argmax())
        agree_other += token == int(other.argmax())
        checks.append(divergence(reference, other))
        if scores is None:  # what choosing this token costs, instead of the distance of two distributions
            costs.append(float(reference.max() - reference[token]))
            others.append(float(other.max() - other[token]))
        else:
            costs.append(divergence(reference, scores))
            others.append(divergence(other, scores))
    if wanted:
        print(f"golden.npz has positions that this script did not reach: {sorted(wanted)}; it belongs to another export")
        return False
    what = "logit lost by its choice" if scores is None else "KL divergence"
    count, mean = len(costs), statistics.fmean(costs)
    print(f"{what} of Core ML, {count} positions (mean, largest), and tokens that agree with the most likely one")
    print(f"  from the model, float32:         {mean:.3g}, {max(costs):.3g}, {agree} of {count}")
    print(f"  from the check of the export:    {statistics.fmean(others):.3g}, {max(others):.3g}, {agree_other} of {count}")
    print(f"KL divergence of that check from the model: {statistics.fmean(checks):.3g}, {max(checks):.3g}")
    good = mean <= limit
    print(f"{'passed' if good else 'FAILED'}: the export allowed a mean of {limit:g} from the model")
    return good


def measure(model: Model, repeat: int) -> None:
    """Print tokens a second of each function, medians of `repeat` calls."""
    count = min(model.chunk, model.context - 1)
    prompt = np.ones(count, np.int32)

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    model.reset()
    prefill = statistics.median(seconds(lambda: model.read(prompt, 0)) for _ in range(repeat))
    decode = statistics.median(seconds(lambda: model.read(prompt[:1], count)) for _ in range(repeat))
    print(f"prefill: {count / prefill:.1f} tokens/s ({count} tokens in {1e3 * prefill:.1f} ms)")
    print(f"decode: {1 / decode:.1f} tokens/s ({1e3 * decode:.2f} ms a token)")


def main(arguments: list[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--compute-units", choices=list(UNITS), default="all")
    parser.add_argument("--repeat", type=int, default=10, help="calls of each function that are timed")
    given = parser.parse_args(arguments)
    if sys.platform != "darwin":
        print("Core ML runs on macOS only; elsewhere `elmexport eval` runs the package in a reference executor", file=sys.stderr)
        return 3
    try:
        import coremltools
    except ModuleNotFoundError:
        print("coremltools is missing: pip install coremltools", file=sys.stderr)
        return 3
    manifest = json.loads((given.folder / "manifest.json").read_text(encoding="utf-8"))
    with np.load(given.folder / "golden.npz") as file:
        golden = {name: file[name] for name in file.files}
    start = time.perf_counter()
    model = Model(coremltools, given.folder, manifest, getattr(coremltools.ComputeUnit, UNITS[given.compute_units]))
    print(
        f"{manifest['model']['name']}, {manifest['quant']['name']}, compute units {given.compute_units}: loaded in {time.perf_counter() - start:.1f} s"
    )
    good = compare(model, golden, manifest["quant"]["max_self_check_kl"])
    measure(model, given.repeat)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
