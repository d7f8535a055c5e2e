"""Report documents that look like real ones, made up, the same every time."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from elmexport.evaluation.results import Report

# task: metric, choices, items, accuracy of the reference, the published figure in per cent
TASKS: Mapping[str, tuple[str, int, int, float, float | None]] = {
    "arc_challenge": ("acc_norm", 4, 100, 0.27, 26.45),
    "arc_easy": ("acc_norm", 4, 100, 0.45, 45.08),
    "boolq": ("acc", 2, 100, 0.55, 53.98),
    "crows_pairs_english": ("pct_stereotype", 2, 100, 0.66, None),
    "hellaswag": ("acc_norm", 4, 200, 0.47, 46.71),
    "mmlu": ("acc", 4, 300, 0.25, 25.72),
    "piqa": ("acc_norm", 2, 100, 0.70, 69.75),
    "race": ("acc", 4, 100, 0.33, 30.91),
    "sciq": ("acc", 4, 100, 0.85, 84.7),
    "truthfulqa_mc2": ("acc", 5, 100, 0.39, 39.24),
    "winogrande": ("acc", 2, 100, 0.54, 53.91),
}

TEXTS: Sequence[tuple[str, Sequence[str]]] = (
    ("Question: Which of these would help to prevent infections from occurring in small cuts?\nAnswer:", ("apply cold water", "wash with soap", "wear a hat", "do nothing")),
    ("<script>alert('an item may hold markup')</script> Which tag & entity is this: &lt;b&gt;?", ("<b>bold</b>", "</td></table>", "-->", '" onload="x')),
    ("سؤال: ما هي عاصمة مصر؟\nالجواب:", ("القاهرة", "بغداد", "دمشق", "الرباط")),
    ("問題：日本で一番高い山は何ですか。標高は三千七百七十六メートルです。答え：", ("富士山", "北岳", "奥穂高岳", "槍ヶ岳")),
    ("Passage: " + "The tide went out and left the boats upon the sand, and the men stood about and waited. " * 60 + "\nQuestion: What did the men do?\nAnswer:", ("waited", "sailed", "slept in " + "averyveryverylongunbrokenword" * 8, "swam")),
    ("A man is sitting on a roof. He", ("is using wrap to wrap a pair of skis.", "is ripping level tiles off.", "is holding a rubik's cube.", "starts pulling up roofing on a roof.")),
)  # fmt: skip


def artifact(label: str, target: str, quant: str, bits: float, *, megabytes: float | None = None) -> dict[str, Any]:
    """What an artifact says of itself."""
    return {
        "label": label,
        "path": f"./{label}",
        "target": target,
        "engine": {"onnx": "onnxruntime", "coreml": "mil", "gguf": "llama.cpp", "checkpoint": "torch"}[target],
        "quant": quant,
        "words": f"{quant}: weights as {quant} in blocks of 32; embedding and head 8-bit",
        "bits_per_weight": bits,
        "bytes": int((megabytes or 271.5 * bits / 8) * 1e6),
        "identity": hashlib.sha256(label.encode()).hexdigest(),
        "model": {"name": "OpenELM-270M", "identity": "ab" * 32},
    }


def task(name: str, damage: float, *, reference: bool = True, items: int | None = None) -> dict[str, Any]:
    """A task whose items lose about `damage` nats of margin."""
    metric, choices, n, accuracy, published = TASKS.get(name, ("acc", 4, 100, 0.4, None))
    n = items or n
    base = random.Random(name)  # the reference's scores must not depend on the damage
    dice = random.Random(f"{name} {damage}")
    rows = []
    for i in range(n):
        text, words = TEXTS[base.randrange(len(TEXTS))]
        target = base.randrange(choices)
        offered = [words[j % len(words)] for j in range(choices)]
        lengths = [len(word) if metric == "acc_norm" else 1 for word in offered]
        ranked = [base.gauss(-14, 2) / (sum(lengths) / choices) for _ in range(choices)]  # what the metric compares
        best_wrong = max(score for j, score in enumerate(ranked) if j != target)
        ranked[target] = best_wrong + abs(base.gauss(0, 2)) / (sum(lengths) / choices) * (1 if base.random() < accuracy else -1)
        before = [score * length for score, length in zip(ranked, lengths, strict=True)]
        after = [score + dice.gauss(0, damage) - (damage if j == target else 0) for j, score in enumerate(before)]
        right = [float(_best(scores, lengths) == target) for scores in (before, after)]
        names = ("acc", "acc_norm") if metric == "acc_norm" else (metric,)
        rows.append(
            {
                "id": i,
                "hash": hashlib.sha256(f"{name} {i}".encode()).hexdigest(),
                "metrics": dict.fromkeys(names, right[1]),
                "scores": after,
                "reference": {"metrics": dict.fromkeys(names, right[0]), "scores": before} if reference else None,
                "text": text,
                "choices": offered,
                "target": target,
            }
        )
    mine = sum(row["metrics"][metric] for row in rows) / n
    theirs = sum(row["reference"]["metrics"][metric] for row in rows) / n if reference else None
    lost = sum(row["reference"]["metrics"][metric] > row["metrics"][metric] for row in rows) if reference else 0
    won = sum(row["reference"]["metrics"][metric] < row["metrics"][metric] for row in rows) if reference else 0
    drop = 100 * (theirs - mine) if theirs is not None else None
    half = 196 * ((lost + won) / n**2) ** 0.5 + 0.5
    names = ("acc", "acc_norm") if metric == "acc_norm" else (metric,)
    return {
        **dict.fromkeys(names, mine),
        "n": n,
        "fewshot": 0,
        "metric": metric,
        "higher_is_better": metric != "pct_stereotype",
        "stderr": dict.fromkeys(names, (mine * (1 - mine) / n) ** 0.5),
        "reference": dict.fromkeys(names, theirs) if reference else None,
        "drop": drop,
        "drop_ci": [drop - half, drop + half] if drop is not None else None,
        "ci_method": "paired bootstrap, 10000 resamples, 95 %",
        "flips": {"right_to_wrong": lost, "wrong_to_right": won} if reference else None,
        "mcnemar_p": min(1.0, 2 * 0.5 ** max(abs(lost - won), 1)) if reference else None,
        "detectable_drop": 280 * (max(lost + won, 5) / n**2) ** 0.5 if reference else None,
        "ratio": None,
        "ratio_ci": None,
        "published": published,
        "items": rows,
    }


def document(
    label: str = "OpenELM-270M-onnx-int4",
    damage: float = 0.5,
    *,
    target: str = "onnx",
    quant: str = "int4",
    bits: float = 5.3,
    tasks: Sequence[str] = tuple(TASKS),
    reference: bool = True,
    kl: float | None = None,
    gates: Sequence[Mapping[str, Any]] = (),
    items: int | None = None,
) -> dict[str, Any]:
    """One artifact's document; `kl` is its mean KL divergence, made from `damage` where None."""
    mean = 0.05 * damage**2 if kl is None else kl
    depths = [0, 64, 128, 256, 512, 1024, 2048]
    return {
        "schema": 1,
        "elmexport": "0.1.0",
        "lm_eval": "0.4.13",
        "artifact": artifact(label, target, quant, bits),
        "reference": artifact("OpenELM-270M fp16", "checkpoint", "fp16 reference", 16.0) if reference else None,
        "settings": {
            "tasks": dict.fromkeys(tasks, 0),
            "limit": 100,
            "seed": 0,
            "data": "hub",
            "text": {"name": "bundled prose", "windows": 8, "window": 512, "hash": "ef" * 32},
            "notes": ["3 requests are longer than the context of 2048 tokens and lost their beginning"],
        },
        "tasks": {name: task(name, damage, reference=reference, items=items) for name in tasks},
        "kl": {
            "mean": mean,
            "mean_ci": [mean * 0.93, mean * 1.08],
            "median": mean * 0.4,
            "p99": mean * 12,
            "max": mean * 60,
            "top1_agreement": max(0.0, 1 - 0.3 * damage),
            "tokens": 4096,
            "text": "bundled prose",
            "by_depth": [
                {"from": a, "to": b, "mean": mean * (1.6 - 0.12 * i), "p99": mean * (19 - 1.3 * i), "tokens": 2 * (b - a)}
                for i, (a, b) in enumerate(pairwise(depths))
            ],
        }
        if reference
        else None,
        "perplexity": {
            "value": 21.3 * (1 + mean),
            "reference": 21.3 if reference else None,
            "ratio": 1 + mean if reference else None,
            "ratio_ci": [1 + 0.8 * mean, 1 + 1.2 * mean] if reference else None,
            "tokens": 4096,
            "text": "bundled prose",
        },
        "blocks": {
            "text_hash": "cd" * 32,
            "tokens": [512] * 8,
            "nll": [1500.0] * 8,
            "reference_nll": [1490.0] * 8 if reference else None,
            "kl": [512 * mean] * 8 if reference else None,
        },
        "gates": list(gates),
        "seconds": 412.7,
    }


FAMILY = (
    ("OpenELM-270M-onnx-fp16", 0.0, "onnx", "fp16", 16.0),
    ("OpenELM-270M-onnx-int8", 0.06, "onnx", "int8", 9.0),
    ("OpenELM-270M-gguf-q4_k_m", 0.35, "gguf", "q4_k_m", 5.0),
    ("OpenELM-270M-onnx-int4", 0.5, "onnx", "int4", 5.3),
    ("OpenELM-270M-coreml-lut4", 0.9, "coreml", "lut4", 4.7),
)


def _best(scores: Sequence[float], lengths: Sequence[int]) -> int:
    return max(range(len(scores)), key=lambda i: scores[i] / lengths[i])


@cache
def _one_of_family(i: int) -> Report:
    label, damage, target, quant, bits = FAMILY[i]
    return read(document(label, damage, target=target, quant=quant, bits=bits))


def report(*arguments: Any, **options: Any) -> Report:
    """`document`, read."""
    return read(document(*arguments, **options))


def read(written: Mapping[str, Any]) -> Report:
    """A document as the product reads it."""
    return Report.from_json(json.dumps(written), "example")


def family() -> list[Report]:
    """Five artifacts of one model."""
    return [_one_of_family(i) for i in range(len(FAMILY))]


def gate(name: str, limit: float, value: float, task: str | None = None) -> dict[str, Any]:
    """One gate's outcome."""
    passed = value <= limit
    where = f"{task}: " if task else ""
    return {
        "name": name,
        "limit": limit,
        "value": value,
        "task": task,
        "passed": passed,
        "reason": f"{where}{value:g} against {limit:g} allowed",
    }
