"""What each way of quantizing a model costs, beside llama.cpp's, at true bits per weight: one table (Markdown, JSON) and one plot (SVG).

python benchmarks/quantization_quality.py --text heldout.txt wiki.test.raw --llama-cpp BUILD/bin --out docs/quality
python benchmarks/quantization_quality.py --model DIR --text wiki.test.raw novels.txt code.py --schemes int4-block32 --methods rtn gptq --out real

All rows are weights only, in one float32 forward pass: what llama.cpp wrote is read back with gguf and dequantized, so that no engine's
own rounding of activations is in the figures. Calibration reads the bundled calibration text, 32,768 tokens, for imatrix too. --text
should be texts that neither the model nor the calibration has seen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from calibration.allocate import measure_costs
from calibration.awq import awq_folds
from calibration.calibrate import make_sample
from calibration.calibrated import distilled_weights, gptq_weights
from calibration.collect import collect
from calibration.dequantized import Dequantized
from calibration.folding import FoldedCheckpoint
from calibration.gptq import gptq
from calibration.preparation import TRIAL_TOKENS, with_own_codes
from calibration.sequential import quantize_in_order
from calibration.statistics import Statistics, mean_square_of
from calibration.table import quantize_table
from calibration.text import Sample, bundled_text, sample_windows
from calibration.weight_set import StoredWeights
from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.evaluation.self_check import reference_pass
from elmexport.exporting import export_checkpoint
from elmexport.graph.forward import layer_stages
from elmexport.models import trace
from elmexport.progress import SilentProgress
from elmexport.quantization.ggml import GgmlType
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan, Recipe, Rule, resolve
from elmexport.quantization.schemes import CodedScheme, Float, find_scheme
from elmexport.quantization.weight_source import WeightSource
from elmexport.target import find_target
from elmexport.weights import Role, WeightSpec
from targets.gguf import ggml

WINDOW = 256
BATCH = 4096  # tokens whose logits are in memory at once
SCHEMES = ("int4-block32", "int4-block128", "lut4-group8")
METHODS = (
    "rtn",
    "mse",
    "mse, statistics",
    "awq",
    "mse, 128 tokens",
    "gptq, statistics",
    "awq+gptq, statistics",
    "gptq",
    "awq+gptq",
    "distill",
)
GGML_METHODS = ("llama.cpp", "llama.cpp+imatrix")  # for recipes of GGUF's
LLAMA_CPP = (
    *("Q4_0", "Q4_0+imatrix", "Q3_K_M", "Q3_K_M+imatrix", "IQ4_XS", "IQ4_XS+imatrix", "IQ4_NL+imatrix"),
    *("Q4_K_S", "Q4_K_S+imatrix", "Q4_K_M", "Q4_K_M+imatrix", "Q5_K_S+imatrix", "Q5_K_M", "Q5_K_M+imatrix", "Q6_K", "Q6_K+imatrix", "Q8_0"),
)
MIXED = (4.5, 4.9, 5.1, 5.36, 6.0, 6.6)
GGUF_NAMES = {
    "attn.qkv_proj": ("attn_qkv",),
    "attn.out_proj": ("attn_output",),
    "ffn.proj_1": ("ffn_gate", "ffn_up"),
    "ffn.proj_2": ("ffn_down",),
}
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Entry:
    name: str
    kind: str  # "elmexport" or "llama.cpp"
    scheme: str
    method: str
    bits_per_weight: float
    weights: Weights  # tensors that differ from the checkpoint's, float32


class Judge:
    """The model on held-out windows."""

    def __init__(self, checkpoint: Checkpoint, texts: list[Path], windows: int, window: int) -> None:
        assert checkpoint.tokenizer_path is not None
        tokenizer = load_tokenizer(checkpoint.tokenizer_path)
        self.checkpoint = checkpoint
        self.stages = layer_stages(trace(checkpoint.config, window))
        self.batch = max(1, BATCH // window)
        self.ids = {
            path.stem: torch.from_numpy(
                sample_windows(tokenizer, [path.read_text(encoding="utf-8")], path.name, tokens=windows * window, window=window).ids
            )
            for path in texts
        }
        self.reference = {name: list(self._log_probabilities(ids, {})) for name, ids in self.ids.items()}

    def figures(self, weights: Weights) -> dict[str, dict[str, float]]:
        """By text: mean KL in nats per token, its standard error, ratio of perplexities, share of tokens with the same first choice."""
        found = {}
        for name, ids in self.ids.items():
            kl, change, agree = [], [], []
            for batch, p, q in zip(ids.split(self.batch), self.reference[name], self._log_probabilities(ids, weights), strict=True):
                kl.append((p.exp() * (p - q)).sum(-1).mean(-1))
                next_ids = batch[:, 1:, None]
                change.append((p[:, :-1].gather(-1, next_ids) - q[:, :-1].gather(-1, next_ids)).mean())
                agree.append((p.argmax(-1) == q.argmax(-1)).double().mean())
            windows = torch.cat(kl).double()
            found[name] = {
                "kl": float(windows.mean()),
                "kl_error": float(windows.std() / len(windows) ** 0.5),
                "perplexity_ratio": float(torch.stack(change).double().mean().exp()),
                "top1_agreement": float(torch.stack(agree).mean()),
            }
        return found

    def _log_probabilities(self, ids: Tensor, weights: Weights) -> Iterator[Tensor]:
        def get(spec: WeightSpec) -> Tensor:
            return weights[spec.name] if spec.name in weights else self.checkpoint.tensor(spec.name)

        loaded = [stage.load(get) for stage in self.stages]
        for batch in ids.split(self.batch):
            x: Tensor = batch
            for stage in loaded:
                x = stage(x)
            yield x.log_softmax(-1)


def plan_of(checkpoint: Checkpoint, scheme: str) -> Plan:
    """The plan of a scheme of the matrices, with "+" and one of the table, or of a recipe of GGUF's with codes of ours."""
    gguf = find_target("gguf")
    if scheme in gguf.quants:
        return resolve(with_own_codes(gguf.recipe(scheme)), checkpoint.config)
    int4 = gguf.recipe("int4")
    matrices, _, table = scheme.partition("+")
    rules = (Rule(find_scheme(table or "int8-block32"), frozenset({Role.EMBEDDING, Role.LM_HEAD})), Rule(find_scheme(matrices)))
    return resolve(Recipe(scheme, scheme, int4.activations, int4.norms, int4.scales, int4.fallback, 1.0, rules), checkpoint.config)


def each(model: Checkpoint, plan: Plan, find: Callable[[Tensor, WeightSpec, CodedScheme], Tensor]) -> dict[str, Tensor]:
    found = {}
    for spec in model.specs.values():
        scheme, weight = plan.schemes[spec.name], model.tensor(spec.name).to(torch.float32)
        if isinstance(scheme, Float):
            found[spec.name] = weight  # norms, which a fold changes
        else:
            assert isinstance(scheme, CodedScheme)
            found[spec.name] = find(weight, spec, scheme)
    return found


def nearest(checkpoint: Checkpoint, plan: Plan) -> dict[str, Tensor]:
    return each(checkpoint, plan, lambda weight, spec, scheme: quantize(weight, scheme, "rtn").dequantize())


def in_order(model: Checkpoint, plan: Plan, sample: Sample) -> dict[str, Tensor]:
    norms = {spec.name: model.tensor(spec.name).to(torch.float32) for spec in model.specs.values() if spec.role.is_norm}
    return norms | {spec.name: q.dequantize() for spec, q in quantize_in_order(model, plan, sample, SilentProgress())}


def distilled(checkpoint: Checkpoint, plan: Plan, sample: Sample) -> dict[str, Tensor]:
    with torch.inference_mode(False):
        weights = StoredWeights(checkpoint, plan, distilled_weights(checkpoint, plan, sample, SilentProgress()))
    return dict(Dequantized(weights).items())


def ours(checkpoint: Checkpoint, sample: Sample, schemes: list[str], chosen: list[str]) -> Iterator[Entry]:
    int4 = find_target("gguf").recipe("int4")
    assert checkpoint.tokenizer_path is not None
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    reference = reference_pass(checkpoint, trace(checkpoint.config), tokenizer, SilentProgress())

    gguf = find_target("gguf")

    @cache
    def statistics() -> Statistics:
        return collect(checkpoint, sample, hessian=any("awq" in method or method == "gptq, statistics" for method in chosen))

    def moments(model: Checkpoint, spec: WeightSpec) -> Any:
        found = statistics().moments(spec)
        return model.moments(spec, found) if isinstance(model, FoldedCheckpoint) and found is not None else found

    def by_hessian(weight: Tensor, spec: WeightSpec, scheme: CodedScheme, hessian: Tensor) -> Tensor:
        if spec.role is not Role.EMBEDDING:
            return gptq(weight, scheme, hessian).dequantize()
        return (quantize_table(weight, scheme, hessian) if scheme.is_coarse else quantize(weight, scheme)).dequantize()

    def llama_cpp_codes(scheme: str, *, weighted: bool) -> dict[str, Tensor]:
        """The codes of llama-quantize, by its library: also of models that its architecture does not take."""
        plan, found = resolve(gguf.recipe(scheme), checkpoint.config), {}
        for spec in checkpoint.specs.values():
            kind = plan.schemes[spec.name]
            if isinstance(kind, GgmlType):
                moments = statistics().moments(spec) if weighted else None
                codes = ggml.quantize(
                    checkpoint.tensor(spec.name).to(torch.float32), kind, None if moments is None else moments.mean_square.numpy()
                )
                found[spec.name] = torch.from_numpy(quants.dequantize(codes, GGMLQuantizationType[kind.name]))
            elif isinstance(kind, CodedScheme):
                raise SystemExit(f"{scheme} is not of ggml's types: {spec.name} is {kind}")
        return found

    def methods(scheme: str, plan: Plan) -> dict[str, Callable[[], dict[str, Tensor]]]:
        @cache
        def folded() -> FoldedCheckpoint:
            return FoldedCheckpoint(checkpoint, awq_folds(checkpoint, lambda spec: plan.schemes[spec.name], statistics()))

        return {
            "rtn": lambda: nearest(checkpoint, plan),
            "mse": lambda: each(checkpoint, plan, lambda w, s, k: quantize(w, k).dequantize()),
            "mse, statistics": lambda: each(
                checkpoint, plan, lambda w, s, k: quantize(w, k, "mse", mean_square_of(statistics().moments)(s)).dequantize()
            ),
            "awq": lambda: each(folded(), plan, lambda w, s, k: quantize(w, k, "mse", moments(folded(), s).mean_square).dequantize()),
            "mse, 128 tokens": lambda: each(
                checkpoint, plan, lambda w, s, k: quantize(w, k, "mse", mean_square_of(reference.statistics.moments)(s)).dequantize()
            ),
            "gptq, statistics": lambda: each(checkpoint, plan, lambda w, s, k: by_hessian(w, s, k, moments(checkpoint, s).hessian)),
            "awq+gptq, statistics": lambda: each(folded(), plan, lambda w, s, k: by_hessian(w, s, k, moments(folded(), s).hessian)),
            "gptq": lambda: in_order(checkpoint, plan, sample),
            "awq+gptq": lambda: in_order(folded(), plan, sample),
            "distill": lambda: distilled(checkpoint, plan, sample),
            "llama.cpp": lambda: llama_cpp_codes(scheme, weighted=False),
            "llama.cpp+imatrix": lambda: llama_cpp_codes(scheme, weighted=True),
        }

    for scheme in schemes:
        plan = plan_of(checkpoint, scheme)
        for method, make in methods(scheme, plan).items():
            if (
                method in chosen
                and (method != "rtn" or not scheme.startswith("lut"))
                and (method not in GGML_METHODS or scheme in gguf.quants)
            ):
                yield Entry(f"{scheme} {method}", "elmexport", scheme, method, plan.bits_per_weight, make())
    if "mixed" not in chosen:
        return

    def trial(plan: Plan) -> WeightSource:
        few = make_sample(checkpoint, tokens=TRIAL_TOKENS)
        return StoredWeights(checkpoint, plan, gptq_weights(checkpoint, plan, few, SilentProgress()))

    for method, find in (("mse, 128 tokens", None), ("gptq", trial)):
        if method not in chosen:
            continue
        costs = measure_costs(checkpoint, gguf, int4, find, SilentProgress())
        for bits in MIXED:
            plan = resolve(costs.allocate(bits).recipe, checkpoint.config)
            name = f"--bits-per-weight {bits:g} {method}"
            yield Entry(name, "elmexport", "mixed", method, plan.bits_per_weight, methods(name, plan)[method]())


def llama_cpp(checkpoint: Checkpoint, tools: Path, types: Sequence[str], folder: Path) -> Iterator[Entry]:
    """llama-quantize's files of the model in `types`, read back."""
    from gguf import GGUFReader

    (source,) = export_checkpoint(checkpoint, "gguf", "fp16", out=folder / "fp16", verify=False).path.glob("*.gguf")
    text, imatrix = folder / "calibration.txt", folder / "imatrix.gguf"
    text.write_text(bundled_text("calibration"), encoding="utf-8")
    _call(tools / "llama-imatrix", "-m", source, "-f", text, "-o", imatrix, "-c", WINDOW, "-t", 2)
    for name in types:
        kind, _, weighted = name.partition("+")
        path = folder / f"{name}.gguf"
        _call(tools / "llama-quantize", *(("--imatrix", imatrix) if weighted else ()), source, path, kind)
        tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        weights = {}
        for spec in checkpoint.specs.values():
            if not spec.role.is_norm:
                parts = ["token_embd"]
                if spec.layer is not None:
                    module = spec.name.removeprefix(f"transformer.layers.{spec.layer}.").removesuffix(".weight")
                    parts = [f"blk.{spec.layer}.{part}" for part in GGUF_NAMES[module]]
                found = [tensors[f"{part}.weight"] for part in parts]
                weights[spec.name] = torch.cat([torch.from_numpy(quants.dequantize(t.data, t.tensor_type)) for t in found])
        bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors.values()) / checkpoint.config.parameter_count
        yield Entry(name, "llama.cpp", kind, "imatrix" if weighted else "", bits, weights)


def _call(*command: Any) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr[-500:]}")


def markdown(rows: list[dict[str, Any]], texts: list[str]) -> str:
    head = "| weights | bits per weight | " + " | ".join(f"KL, {t} | perplexity × | same top token" for t in texts) + " |"
    lines = [head, "|---" + "|---:" * (1 + 3 * len(texts)) + "|"]
    for row in rows:
        cells = []
        for t in texts:
            f = row["figures"][t]
            cells += [f"{f['kl']:.5f} ± {f['kl_error']:.5f}", f"{f['perplexity_ratio']:.4f}", f"{f['top1_agreement']:.1%}"]
        label = row["name"] if row["kind"] == "elmexport" else f"llama.cpp {row['name']}"
        lines.append(f"| {label} | {row['bits_per_weight']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], texts: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "elmexport", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(texts), figsize=(6.4 * len(texts), 4.6), squeeze=False)
    series = (
        ("llama.cpp", lambda r: r["kind"] == "llama.cpp" and r["method"] == "", "o-", "#888888"),
        ("llama.cpp, imatrix", lambda r: r["kind"] == "llama.cpp" and r["method"] != "", "s--", "#444444"),
        ("elmexport rtn", lambda r: r["method"] == "rtn", "x", "#c23b22"),
        ("elmexport mse", lambda r: r["kind"] == "elmexport" and r["method"] == "mse, 128 tokens", "+", "#d98e04"),
        ("elmexport gptq", lambda r: r["method"] == "gptq" and r["scheme"] != "mixed", "D", "#1f6fb4"),
        ("elmexport gptq, --bits-per-weight", lambda r: r["method"] == "gptq" and r["scheme"] == "mixed", "^-", "#2a9d4e"),
    )
    for axis, text in zip(axes[0], texts, strict=True):
        for label, chosen, style, colour in series:
            points = sorted((r["bits_per_weight"], r["figures"][text]["kl"], r["name"]) for r in rows if chosen(r))
            axis.plot([p[0] for p in points], [p[1] for p in points], style, color=colour, label=label, markersize=5, linewidth=1)
            if label != "elmexport mse":
                for bits, kl, name in points:
                    axis.annotate(
                        name.removesuffix(" gptq").removesuffix(" rtn"), (bits, kl), fontsize=6, xytext=(4, 3), textcoords="offset points"
                    )
        axis.set(yscale="log", title=text, xlabel="bits per weight, all parameters", ylabel="KL(model || quantized), nats per token")
        axis.grid(alpha=0.3, which="both", linewidth=0.4)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a checkpoint, as for exports (default tiny)")
    parser.add_argument(
        "--schemes",
        nargs="+",
        default=SCHEMES,
        metavar="SCHEME",
        help=f"of the matrices, with +SCHEME of embedding and head (default int8-block32), or a recipe of GGUF's (default {' '.join(SCHEMES)})",
    )
    parser.add_argument(
        "--methods", nargs="+", default=(*METHODS, "mixed"), metavar="METHOD", help=f"of {', '.join((*METHODS, *GGML_METHODS, 'mixed'))}"
    )
    parser.add_argument("--window", type=int, default=WINDOW, help=f"tokens that are read together (default {WINDOW})")
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="texts to measure on")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="folder with llama-quantize and llama-imatrix")
    parser.add_argument(
        "--types",
        nargs="+",
        default=LLAMA_CPP,
        metavar="TYPE",
        help=f"of llama-quantize, with +imatrix or without (default {' '.join(LLAMA_CPP)})",
    )
    parser.add_argument("--windows", type=int, default=64, help="of each text (default 64)")
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration text (default 32768)")
    parser.add_argument("--out", type=Path, required=True, metavar="STEM", help="writes STEM.md, STEM.json, STEM.svg")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(given.model)
        judge = Judge(checkpoint, given.text, given.windows, given.window)
        sample = make_sample(checkpoint, tokens=given.tokens)
        entries = list(llama_cpp(checkpoint, given.llama_cpp, given.types, Path(folder))) if given.llama_cpp else []
        start = time.perf_counter()
        for entry in chain(entries, ours(checkpoint, sample, given.schemes, given.methods)):
            figures = judge.figures(entry.weights)
            facts = {key: getattr(entry, key) for key in ("name", "kind", "scheme", "method", "bits_per_weight")}
            rows.append({**facts, "figures": figures})
            print(
                f"{time.perf_counter() - start:7.0f} s  {entry.name}: " + ", ".join(f"{t} {f['kl']:.5f}" for t, f in figures.items()),
                file=sys.stderr,
                flush=True,
            )
    texts = list(judge.ids)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(
        json.dumps({"model": given.model, "tokens": given.tokens, "windows": given.windows, "window": given.window, "rows": rows}, indent=1)
        + "\n"
    )
    given.out.with_suffix(".md").write_text(markdown(rows, texts))
    plot(rows, texts, given.out.with_suffix(".svg"))
    print(markdown(rows, texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
