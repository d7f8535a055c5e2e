"""The rotary tables against the formula, and models that they cannot hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elmexport.errors import ElmExportError
from elmexport.graph.trace import trace
from elmexport.models.openelm_config import OpenELMConfig
from targets.coreml.rope import RotaryTables


def test_tables(small_config: OpenELMConfig) -> None:
    graph = trace(small_config, 96)
    size = small_config.head_dim
    theta = next(node.attrs["rope_theta"] for node in graph.nodes if node.op == "attention")
    angles = np.outer(np.arange(96), theta ** (-2.0 * np.arange(size // 2) / size))
    tables = RotaryTables(graph)
    halves = {"atol": 2**-11, "rtol": 0}  # rounding to fp16 below 1
    np.testing.assert_allclose(tables.cosines(), np.cos(np.hstack([angles, angles]))[None, None], **halves)
    np.testing.assert_allclose(tables.sines(), np.hstack([-np.sin(angles), np.sin(angles)])[None, None], **halves)
    np.testing.assert_allclose(tables.sines(0.25), 0.25 * tables.sines().astype(np.float64), atol=2**-13, rtol=0)


def test_layers_with_different_bases_are_refused(small_config: OpenELMConfig) -> None:
    graph = trace(small_config, 96)
    last = max(i for i, node in enumerate(graph.nodes) if node.op == "attention")
    nodes = list(graph.nodes)
    nodes[last] = replace(nodes[last], attrs={**nodes[last].attrs, "rope_theta": 500.0})
    with pytest.raises(ElmExportError, match=r"layers rotate by different bases \(500\.0, .*\)"):
        RotaryTables(replace(graph, nodes=tuple(nodes))).cosines()
