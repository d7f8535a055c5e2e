"""`elmexport models`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

# Of the published checkpoints, the tied embedding counted once.
PARAMETERS = {"270M": 271527168, "450M": 457179136, "1.1B": 1079891456, "3B": 3036647424}
OLMOE = ["OLMoE-1B-7B", "OLMoE-1B-7B-SFT", "OLMoE-1B-7B-Instruct"]
ALIASES = ["tiny", "tiny-moe", *(size + suffix for size in PARAMETERS for suffix in ("", "-Instruct")), *OLMOE]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))


def test_table(run: Run) -> None:
    lines = run("models").out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", *ALIASES]
    assert lines[1].split()[2:] == ["256", "built", "in", "yes"]
    assert lines[5].split()[:4] == ["450M", "457,179,136", "2,048", "apple/OpenELM-450M"]


def test_json(run: Run) -> None:
    outcome = run("models", "--json")
    assert outcome.code == 0
    listed = {entry.pop("model"): entry for entry in json.loads(outcome.out)}
    assert list(listed) == ALIASES
    for size, parameters in PARAMETERS.items():
        for suffix in ("", "-Instruct"):
            assert listed[size + suffix]["parameters"] == parameters
    assert listed["tiny"]["hub_id"] is None
    assert listed["tiny"]["on_this_machine"] is True
    assert listed["1.1B-Instruct"]["hub_id"] == "apple/OpenELM-1_1B-Instruct"
