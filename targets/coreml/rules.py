"""The Neural Engine's published rules, as data: what each says, who says it, how bad it is, and a check.

Apple documents little, and the other sources observed compilers and chips from outside: they are incomplete, differ between chips, and now
and then contradict each other. A rule here follows the stricter source, and `Severity` says how sure they are. What is not checked: whether a
tensor fits the chip's memory unpadded, how many transposes there are, how large a program may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmexport.mil.program import BlobFileValue, ImmediateValue, Operation, TensorType
from targets.coreml.interface import CONTEXT_MULTIPLE, MAX_DIM
from targets.coreml.program_view import FunctionView, OperationView

APPLE_RULES = "https://github.com/apple/coreai-models/blob/main/skills/skills/model-authoring/references/neural_engine_rules.md"
APPLE_ARTICLE = "https://machinelearning.apple.com/research/neural-engine-transformers"
HOLLANCE = "https://github.com/hollance/neural-engine/blob/master/docs/unsupported-layers.md"
ANE_GUIDE_RULES = "https://ane-guide.readthedocs.io/en/latest/part-5-practice/17-model-design-rules.html"
ANE_GUIDE_OPS = "https://ane-guide.readthedocs.io/en/latest/part-1-machine/04-capability-surface.html"
ANEMLL = "https://github.com/Anemll/Anemll/blob/main/docs/convert.md"
ANEMLL_README = "https://github.com/Anemll/Anemll/blob/main/README.md"
COREMLTOOLS_2631 = "https://github.com/apple/coremltools/issues/2631"
APPLE_FORUM_SHAPES = "https://developer.apple.com/forums/thread/724930"

MAX_RANK = 5
MAX_ARG_AXIS = 2048
MAX_KERNEL_WIDTH = 13
LINE = 64  # bytes to which the last axis of a buffer is padded
ON_CHIP = 2 << 20  # bytes that an operand may have to stay on the chip
PHONE_BYTES, MAC_BYTES = 1 << 30, 2 << 30

_BYTES = {"float16": 2, "float32": 4, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "bool": 1}
_TAKEN = ("float16", "int8", "uint8", "int16", "uint16", "bool")  # bool: what comparisons give and select takes
_NO_PATH = [
    "band_part",
    "gru",
    "inverse",
    "logical_and",
    "logical_or",
    "logical_xor",
    "lstm",
    "mod",
    "non_maximum_suppression",
    "non_zero",
    "one_hot",
    "random_bernoulli",
    "random_categorical",
    "random_normal",
    "reduce_prod",
    "reverse_sequence",
    "rnn",
    "scatter",
    "scatter_along_axis",
    "scatter_nd",
    "shape",
    "sliding_windows",
    "acos",
    "asin",
    "atan",
    "atanh",
    "cosh",
    "sinh",
    "tan",
    "gather",
    "gather_along_axis",
    "gather_nd",
    "topk",
    "argsort",
    "custom_layer",
]


class Severity(StrEnum):
    """Severity of a breach."""

    ERROR = "error"  # the operation, or the whole package, does not run on the Neural Engine
    WARNING = "warning"  # it runs, but pays for it; or only some devices refuse it


@dataclass(frozen=True)
class LintRule:
    """A rule of the Neural Engine. A check yields, for each breach, what is wrong in words that follow the operation's name.

    Exactly one of the four checks is set. An operation at the edge of its function (see `OperationView.edge`) may be left to the
    CPU before or after the Neural Engine's work; where `edges` is false, it does not break the rule.
    """

    id: str
    title: str
    severity: Severity
    sources: tuple[str, ...]
    operation: Callable[[OperationView], Iterator[str]] | None = None
    constant: Callable[[OperationView], Iterator[str]] | None = None
    function: Callable[[FunctionView], Iterator[tuple[str, TensorType, str]]] | None = None
    file: Callable[[Path], Iterator[str]] | None = None
    edges: bool = False


def _dimension(view: OperationView) -> Iterator[str]:
    for name, kind in (*view.tensors, *view.outputs):
        if (largest := max((size for size in kind.shape if size is not None), default=0)) > MAX_DIM:
            yield f"{name} has a dimension of {largest}"


def _rank(view: OperationView) -> Iterator[str]:
    for name, kind in (*view.tensors, *view.outputs):
        if len(kind.shape) > MAX_RANK:
            yield f"{name} has {len(kind.shape)} axes"


def _dynamic(view: FunctionView) -> Iterator[tuple[str, TensorType, str]]:
    for name, kind in view.boundary:
        if None in kind.shape:
            yield name, kind, "its shape is not fixed"


def _dynamic_value(view: OperationView) -> Iterator[str]:
    # What only passes on the unknown size of an input is no news.
    if any(None in kind.shape for _, kind in view.outputs) and not any(None in kind.shape for _, kind in view.tensors):
        yield "its shape is known at run time only"


def _padding(view: OperationView) -> Iterator[str]:
    for name, kind in view.outputs:
        if kind.dtype == "float16" and kind.shape and None not in kind.shape:
            size = prod(axis or 0 for axis in kind.shape) * 2
            padded = _padded(kind)
            if padded > ON_CHIP and padded >= 2 * size:
                yield f"{name} takes {padded / 2**20:.1f} MiB instead of {size / 2**20:.2f}, more than stays on the chip"


def _alignment(view: FunctionView) -> Iterator[tuple[str, TensorType, str]]:
    for name, kind in view.boundary:
        if (name, kind) not in view.states and kind.dtype == "float16" and kind.shape and None not in kind.shape:
            rows = prod(axis or 0 for axis in kind.shape[:-1])
            if rows > 1 and (kind.shape[-1] or 0) * 2 % LINE:
                yield name, kind, f"its last axis has {(kind.shape[-1] or 0) * 2} bytes, no multiple of {LINE}"


def _projection(view: OperationView) -> Iterator[str]:
    if view.type == "linear":
        yield "a 1x1 convolution does the same"
    elif view.type in ("matmul", "einsum") and view.weights:
        yield f"it multiplies by the constant {view.weights[0]}; a 1x1 convolution does the same"


def _layout(view: OperationView) -> Iterator[str]:
    if view.type in ("conv", "conv_transpose") and (kind := dict(view.tensors).get("x")) is not None and len(kind.shape) != 4:
        yield f"its input has {len(kind.shape)} axes, not (batch, channels, 1, tokens)"


def _heads(view: OperationView) -> Iterator[str]:
    if view.type == "scaled_dot_product_attention":
        yield "attention of all heads in one operation; split it by heads"
    elif view.type in ("matmul", "einsum") and not view.weights and view.outputs:
        heads = prod(axis or 1 for axis in view.outputs[0][1].shape[:-2])
        if heads > 1:
            yield f"{heads} products in one operation; split it by heads"


def _type(view: OperationView) -> Iterator[str]:
    for name, kind in view.outputs:
        if kind.dtype not in _TAKEN:
            yield f"{name} is {kind.dtype}"


def _no_path(view: OperationView) -> Iterator[str]:
    if view.type in _NO_PATH:
        yield "no Neural Engine has a general path for it"


def _arg_axis(view: OperationView) -> Iterator[str]:
    if view.type in ("reduce_argmax", "reduce_argmin"):
        for _, kind in view.tensors:
            axis = view.integer("axis")
            if axis is not None and (kind.shape[axis] or 0) > MAX_ARG_AXIS:
                yield f"it searches {kind.shape[axis]} entries"


def _kernel(view: OperationView) -> Iterator[str]:
    weight = view.shapes.get("weight")
    if view.type == "conv" and weight is not None and len(weight) == 4 and (weight[-1] or 0) > MAX_KERNEL_WIDTH:
        yield f"its kernel is {weight[-1]} wide"


def _infinite(view: OperationView) -> Iterator[str]:
    for name, argument in _constants(view.operation):
        array = argument.value if isinstance(argument, ImmediateValue) else view.read(argument)
        if not isinstance(array, str) and array.dtype.kind == "f" and _has_infinity(array):
            yield f"{name or 'its value'} holds an infinity"


def _state_size(view: FunctionView) -> Iterator[tuple[str, TensorType, str]]:
    for name, kind in view.states:
        if not kind.shape or (kind.shape[-1] or 0) % CONTEXT_MULTIPLE:
            yield name, kind, f"its last axis is no multiple of {CONTEXT_MULTIPLE}"


def _state_shapes(view: FunctionView) -> Iterator[tuple[str, TensorType, str]]:
    shapes = {kind.shape for _, kind in view.states}
    if len(shapes) > 1:
        for name, kind in view.states:
            yield name, kind, f"the states of {view.name} have {len(shapes)} different shapes"


def _phone(file: Path) -> Iterator[str]:
    if PHONE_BYTES < (size := file.stat().st_size) <= MAC_BYTES:
        yield f"it has {size / 2**30:.2f} GiB, too much for an iPhone"


def _mac(file: Path) -> Iterator[str]:
    if (size := file.stat().st_size) > MAC_BYTES:
        yield f"it has {size / 2**30:.2f} GiB, too much for a Mac as well"


def _padded(kind: TensorType) -> int:
    *rows, last = (axis or 0 for axis in kind.shape)
    return prod(rows) * -(-last * _BYTES[kind.dtype] // LINE) * LINE


def _constants(operation: Operation) -> Iterator[tuple[str, BlobFileValue | ImmediateValue]]:
    """Float constants of an operation that are values, not codes."""
    for name, arguments in operation.arguments.items():
        for argument in arguments:
            if isinstance(argument, ImmediateValue) or (isinstance(argument, BlobFileValue) and argument.dtype.startswith("float")):
                yield name, argument


def _has_infinity(array: NDArray[Any]) -> bool:
    if array.dtype == np.float16:
        return bool(np.any((array.view(np.uint16) & 0x7FFF) == 0x7C00))
    # What fp16 cannot hold becomes infinite when the program is compiled to it; the largest floats are masks, too.
    return bool(np.any(np.abs(array[~np.isnan(array)]) > 65504))


E, W = Severity.ERROR, Severity.WARNING
RULES: tuple[LintRule, ...] = (
    LintRule("NE001", f"no dimension above {MAX_DIM}", E, (ANE_GUIDE_RULES,), operation=_dimension),
    LintRule("NE002", f"at most {MAX_RANK} axes", E, (APPLE_RULES, ANE_GUIDE_RULES), operation=_rank),
    LintRule("NE003", "inputs, states and outputs of fixed shape", E, (APPLE_RULES, APPLE_FORUM_SHAPES), function=_dynamic),
    LintRule("NE004", "values of fixed shape", E, (APPLE_RULES,), operation=_dynamic_value),
    LintRule("NE005", "float16 throughout", E, (APPLE_RULES, ANE_GUIDE_RULES), operation=_type),
    LintRule("NE006", "no infinite constants: mask with -4e4", E, (APPLE_RULES,), constant=_infinite, edges=True),
    LintRule("NE007", "operations that the Neural Engine has", E, (HOLLANCE, ANE_GUIDE_OPS), operation=_no_path),
    LintRule("NE008", f"arg-max over at most {MAX_ARG_AXIS} entries", E, (ANE_GUIDE_RULES,), operation=_arg_axis),
    LintRule("NE009", f"convolution kernels at most {MAX_KERNEL_WIDTH} wide", E, (ANE_GUIDE_RULES,), operation=_kernel, edges=True),
    LintRule("NE010", f"states whose last axis is a multiple of {CONTEXT_MULTIPLE}", E, (COREMLTOOLS_2631,), function=_state_size),
    LintRule("NE011", "weight files of at most 2 GiB", E, (ANEMLL,), file=_mac),
    LintRule("NE101", "weight files of at most 1 GiB, for iPhones", W, (ANEMLL,), file=_phone),
    LintRule("NE102", "projections as 1x1 convolutions", W, (APPLE_ARTICLE, APPLE_RULES), operation=_projection, edges=True),
    LintRule("NE103", "activations as (batch, channels, 1, tokens)", W, (APPLE_ARTICLE, APPLE_RULES), operation=_layout, edges=True),
    LintRule("NE104", "attention one head at a time", W, (APPLE_ARTICLE, APPLE_RULES), operation=_heads, edges=True),
    LintRule(
        "NE105",
        f"no large buffer whose last axis is mostly padding (to {LINE} bytes)",
        W,
        (APPLE_ARTICLE, APPLE_RULES, ANE_GUIDE_RULES),
        operation=_padding,
        edges=True,
    ),
    LintRule("NE106", f"inputs and outputs with rows of a multiple of {LINE} bytes", W, (APPLE_RULES, APPLE_ARTICLE), function=_alignment),
    LintRule("NE107", "states of one function of one shape, for M1 and A14", W, (ANEMLL_README,), function=_state_shapes),
)
