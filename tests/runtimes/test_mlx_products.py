"""Products of MLX's layers through numpy against MLX's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elmexport.runtimes import mlx_products
from elmexport.runtimes.mlx_products import multiply_by_numpy

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]' mlx-lm")
nn: Any = pytest.importorskip("mlx.nn")

FORMS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "affine 4": {"bits": 4, "group_size": 32},
    "affine 5": {"bits": 5, "group_size": 64},
    "mxfp4": {"mode": "mxfp4"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_products_are_those_of_mlx(form: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(128, 256, bias=False), nn.Linear(256, 128), nn.Embedding(70, 128))
    options = FORMS[form]
    if options is not None:
        nn.quantize(model, **options)
    first, biased, table = model.layers
    x = mx.random.normal((2, tokens, 128))

    def results() -> list[np.ndarray[Any, Any]]:
        middle = first(x)
        return [np.array(value) for value in (middle, biased(middle), table.as_linear(biased(middle)))]

    expected = results()
    monkeypatch.setattr(mlx_products, "_SLICE", 128 * 100)  # slices that do not divide the rows
    multiply_by_numpy(model)
    for found, wanted in zip(results(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert type(first) is not nn.Linear and isinstance(first, nn.Linear if options is None else nn.QuantizedLinear)
