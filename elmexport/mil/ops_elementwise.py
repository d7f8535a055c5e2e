"""MIL's elementwise operations: arithmetic, comparison, logic, activations, casts, and ranges. Floats come as float32, integers as int32.

A function's parameters are the operation's; those annotated `Tensor` receive tensors, all others plain Python values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import pi, sqrt

import torch
from torch import Tensor

Function = Callable[..., Tensor]

_NARROW: Mapping[str, torch.dtype] = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "uint16": torch.uint16}


def _unary(function: Callable[[Tensor], Tensor]) -> Function:
    def operation(x: Tensor) -> Tensor:
        return function(x)

    return operation


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    def operation(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return operation


def real_div(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


def threshold(x: Tensor, alpha: float) -> Tensor:
    return x.clamp(min=alpha)


def cast(x: Tensor, dtype: str) -> Tensor:
    """To an integer: towards zero, and for the narrow types modulo their range. Rounding to fp16 is the executor's."""
    if dtype == "bool":
        return x != 0
    if dtype in ("fp16", "fp32"):
        return x.to(torch.float32, copy=True)
    integer = x.to(torch.int32, copy=True)
    return integer.to(_NARROW[dtype]).to(torch.int32) if dtype in _NARROW else integer


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return torch.nn.functional.gelu(x)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


def elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x))


def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, _per_channel(alpha, x) * x)


def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return _per_channel(alpha, x) * torch.nn.functional.softplus(_per_channel(beta, x) * x)


def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= alpha, x, 0.0)


def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=end.dtype)


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """`vector` `[C]` (or `[1]`) to go with `x` `[N, C, …]`."""
    return vector.reshape(-1, *[1] * (x.ndim - 2))


OPS: Mapping[str, Function] = {
    "abs": _unary(torch.abs),
    "acos": _unary(torch.acos),
    "add": _binary(torch.add),
    "asin": _unary(torch.asin),
    "atan": _unary(torch.atan),
    "atanh": _unary(torch.atanh),
    "cast": cast,
    "ceil": _unary(torch.ceil),
    "clamped_relu": clamped_relu,
    "clip": clip,
    "cos": _unary(torch.cos),
    "cosh": _unary(torch.cosh),
    "elu": elu,
    "equal": _binary(torch.eq),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "floor": _unary(torch.floor),
    "floor_div": _binary(torch.floor_divide),
    "gelu": gelu,
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "inverse": inverse,
    "leaky_relu": leaky_relu,
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "linear_activation": linear_activation,
    "log": log,
    "logical_and": _binary(torch.logical_and),
    "logical_not": _unary(torch.logical_not),
    "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mod": _binary(torch.remainder),
    "mul": _binary(torch.mul),
    "not_equal": _binary(torch.ne),
    "pow": _binary(torch.pow),
    "prelu": prelu,
    "range_1d": range_1d,
    "real_div": real_div,
    "relu": _unary(torch.relu),
    "relu6": _unary(lambda x: x.clamp(0, 6)),
    "round": _unary(torch.round),
    "rsqrt": rsqrt,
    "scaled_tanh": scaled_tanh,
    "select": select,
    "sigmoid": _unary(torch.sigmoid),
    "sigmoid_hard": sigmoid_hard,
    "sign": _unary(torch.sign),
    "silu": _unary(torch.nn.functional.silu),
    "sin": _unary(torch.sin),
    "sinh": _unary(torch.sinh),
    "softmax": softmax,
    "softplus": _unary(torch.nn.functional.softplus),
    "softplus_parametric": softplus_parametric,
    "softsign": _unary(torch.nn.functional.softsign),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "sub": _binary(torch.sub),
    "tan": _unary(torch.tan),
    "tanh": _unary(torch.tanh),
    "threshold": threshold,
    "thresholded_relu": thresholded_relu,
}
