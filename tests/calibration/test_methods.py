"""What the methods cost on the trained model, on text that none of them saw: gptq below mse below rtn, with a margin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration.gptq import gptq, output_error
from calibration.text import bundled_text
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.graph.forward import KVCaches, forward
from elmexport.graph.ir import Node
from elmexport.models import trace
from elmexport.quantization.codec import Quantized
from elmexport.quantization.quantize import quantize
from elmexport.quantization.schemes import CodedScheme, Integer, find_scheme
from tests.reference import kl

pytestmark = pytest.mark.slow

TOKENS = 256


class Trained:
    """`tiny`'s weights, Hessians over 4,096 tokens of the calibration text, and logits over 1,024 other ones."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.graph = trace(checkpoint.config, TOKENS)
        self.weights = {name: checkpoint.tensor(name).to(torch.float32) for name in checkpoint.specs}
        self.linears = [node for node in self.graph.nodes if node.op == "linear" and node.layer is not None]
        assert checkpoint.tokenizer_path is not None
        ids = load_tokenizer(checkpoint.tokenizer_path).encode(bundled_text("calibration"))
        assert len(ids) > 20 * TOKENS
        windows = torch.tensor(ids[: 20 * TOKENS]).view(20, TOKENS)
        self.hessians: dict[str, Tensor] = {}
        self.held_out = windows[16:]
        self._forward(windows[:16], self.weights, self._observe)
        self.logits = self._forward(self.held_out, self.weights)

    def methods(self, scheme: CodedScheme) -> dict[str, tuple[float, float]]:
        """By method, the mean relative output error of the linears, and the KL divergence on the held-out tokens."""
        ways: dict[str, Callable[[Tensor, Tensor], Quantized]] = {
            "mse": lambda w, h: quantize(w, scheme, "mse", h.diagonal()),
            "gptq": lambda w, h: gptq(w, scheme, h),
        }
        if isinstance(scheme, Integer):
            ways["rtn"] = lambda w, h: quantize(w, scheme, "rtn")
        return {name: self._cost(way) for name, way in ways.items()}

    def _cost(self, way: Callable[[Tensor, Tensor], Quantized]) -> tuple[float, float]:
        weights, errors = dict(self.weights), []
        for node in self.linears:
            name = node.weights["weight"].name
            weight, hessian = self.weights[name], self.hessians[node.inputs["x"]]
            weights[name] = way(weight, hessian).dequantize()
            errors.append(output_error(weight - weights[name], hessian) / output_error(weight, hessian))
        return float(np.mean(errors)), float(kl(self.logits, self._forward(self.held_out, weights)).mean())

    def _observe(self, node: Node, output: Tensor) -> None:
        if any(node.outputs[0] == linear.inputs["x"] for linear in self.linears):
            x = output.reshape(-1, output.shape[-1])
            self.hessians[node.outputs[0]] = x.T @ x / len(x)

    @torch.inference_mode()
    def _forward(self, ids: Tensor, weights: dict[str, Tensor], observe: Callable[[Node, Tensor], None] | None = None) -> np.ndarray:
        caches = KVCaches(self.graph, batch=len(ids))
        logits = forward(self.graph, lambda spec: weights[spec.name], ids, 0, caches, observe=observe)
        return logits.reshape(-1, logits.shape[-1]).numpy()


@pytest.fixture(scope="module")
def trained(tiny: Checkpoint) -> Trained:
    return Trained(tiny)


@pytest.mark.parametrize("name", ["int4-block32", "int4-block128", "lut4-group8"])
def test_gptq_below_mse_below_rtn(trained: Trained, name: str) -> None:
    scheme = find_scheme(name)
    assert isinstance(scheme, CodedScheme)
    found = trained.methods(scheme)
    assert found["gptq"][0] < 0.5 * found["mse"][0]
    assert found["gptq"][1] < 0.6 * found["mse"][1]
    if "rtn" in found:
        assert found["mse"][0] < 0.92 * found["rtn"][0]
        assert found["mse"][1] < 0.92 * found["rtn"][1]
        assert found["gptq"][1] < 0.5 * found["rtn"][1]
