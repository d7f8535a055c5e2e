"""Inputs of methods: statistics of a text are measured once, and come out of the cache as they went in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.inputs import Inputs
from calibration.options import WeightOptions
from elmexport.progress import SilentProgress
from tests.memory_checkpoint import MemoryCheckpoint


def test_statistics_of_a_text_are_measured_once(
    small_checkpoint: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))
    from calibration import inputs

    measured: list[Any] = []
    collect = inputs.collect
    monkeypatch.setattr(inputs, "collect", lambda *given, **named: measured.append(collect(*given, **named)) or measured[-1])
    found = []
    for tokens in (256, 256, 512):
        statistics = Inputs(small_checkpoint, WeightOptions("awq", tokens=tokens), SilentProgress()).statistics
        assert statistics is not None
        found.append(statistics)
    assert len(measured) == 2
    for statistics in found[:2]:
        assert statistics.facts == measured[0].facts and set(statistics.tensors) == set(measured[0].tensors)
        assert all(torch.equal(statistics.tensors[name], tensor) for name, tensor in measured[0].tensors.items())
    assert found[2].facts.tokens > found[0].facts.tokens
