"""The rotary tables against the formula, and models that they cannot hold."""

from __future__ import annotations

import numpy as np

from elmexport.models import trace
from elmexport.models.openelm.config import OpenELMConfig
from targets.coreml.rope import RotaryTables


def test_tables(small_config: OpenELMConfig) -> None:
    graph = trace(small_config, 96)
    size = small_config.head_dim
    theta = graph.rope_theta
    angles = np.outer(np.arange(96), theta ** (-2.0 * np.arange(size // 2) / size))
    tables = RotaryTables(graph)
    halves = {"atol": 2**-11, "rtol": 0}  # rounding to fp16 below 1
    np.testing.assert_allclose(tables.cosines(), np.cos(np.hstack([angles, angles]))[None, None], **halves)
    np.testing.assert_allclose(tables.sines(), np.hstack([-np.sin(angles), np.sin(angles)])[None, None], **halves)
    np.testing.assert_allclose(tables.sines(0.25), 0.25 * tables.sines().astype(np.float64), atol=2**-13, rtol=0)
