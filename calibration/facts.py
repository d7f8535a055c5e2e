"""Facts for the manifest: by which method codes were found, and on which text."""

from __future__ import annotations

from typing import Any

from calibration.statistics import Statistics
from calibration.weight_set import WeightFacts


def method_facts(method: str, statistics: Statistics | None) -> dict[str, Any]:
    """Describe codes found by `method`, which `statistics` have weighted."""
    if statistics is None:
        return {"method": method, "calibration": None}
    facts = statistics.facts
    return {"method": method, "calibration": _text(facts.text, facts.text_sha256, facts.tokens, sequential=False)}


def set_facts(facts: WeightFacts) -> dict[str, Any]:
    """Describe the codes of a weight set."""
    return {"method": facts.method, "calibration": _text(facts.text, facts.text_sha256, facts.tokens, sequential=facts.sequential)}


def rounded(value: float) -> float:
    """Round to four significant digits: what differs between machines or thread counts does not belong in a reproducible file."""
    return float(f"{value:.4g}")


def _text(text: str, sha256: str, tokens: int, *, sequential: bool) -> dict[str, Any]:
    return {"text": text, "text_sha256": sha256, "tokens": tokens, "sequential": sequential}
