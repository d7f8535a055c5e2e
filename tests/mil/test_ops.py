"""Every operation against coremltools' own value inference, or, where that does not exist, against torch or numpy, on random shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from elmexport.mil.executor import MilModel
from elmexport.mil.ops import OPS
from tests.mil.packages import function, inferred, spec, write_package

Array = NDArray[Any]
Case = Callable[[np.random.Generator, tuple[int, ...]], tuple[dict[str, Any], dict[str, Any]]]


def floats(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return (2 * rng.standard_normal(shape)).astype(np.float32)


def x(**constants: Any) -> Case:
    return lambda rng, shape: ({"x": floats(rng, shape)}, constants)


def positive(**constants: Any) -> Case:
    return lambda rng, shape: ({"x": np.abs(floats(rng, shape)) + 0.1}, constants)


def unit(**constants: Any) -> Case:
    return lambda rng, shape: ({"x": rng.uniform(-0.95, 0.95, shape).astype(np.float32)}, constants)


def two(make: Callable[[np.random.Generator, tuple[int, ...]], Array] = floats) -> Case:
    """`y` broadcasts along some axes."""

    def case(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"x": make(rng, shape), "y": make(rng, tuple(1 if rng.random() < 0.3 else size for size in shape))}, {}

    return case


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.integers(1, 5, shape).astype(np.int32) * rng.choice([-1, 1], shape).astype(np.int32)


def digits(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.integers(0, 3, shape).astype(np.float32)


def flags(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.random(shape) < 0.5


def distinct(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """No ties, which any order would be right for."""
    return rng.permutation(np.prod(shape)).reshape(shape).astype(np.float32)


def axes(shape: tuple[int, ...], rng: np.random.Generator) -> list[int]:
    count = int(rng.integers(1, len(shape) + 1))
    return [int(axis) - (len(shape) if rng.random() < 0.5 else 0) for axis in sorted(rng.choice(len(shape), count, replace=False))]


def reduction(make: Callable[[np.random.Generator, tuple[int, ...]], Array] = floats) -> Case:
    return lambda rng, shape: ({"x": make(rng, shape)}, {"axes": axes(shape, rng), "keep_dims": bool(rng.random() < 0.5)})


def slicing(update: bool) -> Case:
    def case(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        begin = [int(rng.integers(0, size)) for size in shape]
        end = [int(rng.integers(start + 1, size + 1)) for start, size in zip(begin, shape, strict=True)]
        stride = [int(rng.integers(1, 3)) for _ in shape]
        begin = [start - size if rng.random() < 0.3 else start for start, size in zip(begin, shape, strict=True)]
        masks = {name: [bool(rng.random() < 0.2) for _ in shape] for name in ("begin_mask", "end_mask")}
        data = floats(rng, shape)
        where = tuple(
            slice(None if no_begin else a, None if no_end else b, s)
            for a, b, s, no_begin, no_end in zip(begin, end, stride, masks["begin_mask"], masks["end_mask"], strict=True)
        )
        extra = {"update": floats(rng, data[where].shape)} if update else {}
        return {"x": data, **extra}, {"begin": begin, "end": end, "stride": stride, **masks}

    return case


def squeezing(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    begin = [int(rng.integers(0, size)) for size in shape]
    mask = [True] + [False] * (len(shape) - 1)
    return {"x": floats(rng, shape)}, {"begin": begin, "end": list(shape), "squeeze_mask": mask}


def gathering(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    axis = int(rng.integers(0, len(shape)))
    return {"x": floats(rng, shape), "indices": rng.integers(0, shape[axis], 6).astype(np.int32)}, {"axis": axis}


def gathering_along(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    axis = int(rng.integers(0, len(shape)))
    return {"x": floats(rng, shape), "indices": rng.integers(0, shape[axis], shape).astype(np.int32)}, {"axis": axis}


def matrices(transpose_x: bool, transpose_y: bool) -> Case:
    def case(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        *batch, m, k = shape
        left, right = ((k, m) if transpose_x else (m, k)), ((3, k) if transpose_y else (k, 3))
        inputs = {"x": floats(rng, (*batch, *left)), "y": floats(rng, (*batch, *right))}
        return inputs, {"transpose_x": transpose_x, "transpose_y": transpose_y}

    return case


def attention(masked: str) -> Case:
    def case(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs = {"query": floats(rng, (2, 3, 4, 5)), "key": floats(rng, (2, 3, 6, 5)), "value": floats(rng, (2, 3, 6, 7))}
        if masked == "bool":
            mask = flags(rng, (4, 6))
            mask[:, 0] = True
            inputs["attn_mask"] = mask
        elif masked == "float":
            inputs["attn_mask"] = floats(rng, (4, 6))
        return inputs, {}

    return case


def padded(mode: str) -> Case:
    def case(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        shape = tuple(size + 2 for size in shape)
        constants = {"pad": [1, 2, 0, 2], "mode": mode} | ({"constant_val": np.float32(1.5)} if mode == "constant" else {})
        return {"x": floats(rng, shape)}, constants

    return case


def normalized(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    vectors = {name: floats(rng, shape[-2:]) for name in ("gamma", "beta")}
    return {"x": floats(rng, shape)}, {"axes": [-2, -1], "epsilon": np.float32(1e-3), **vectors}


def ranged(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"start": np.int32(2), "end": np.int32(2 + 3 * shape[0]), "step": np.int32(3)}, {}


def values(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"values": [floats(rng, shape), floats(rng, shape)]}, {"axis": len(shape) - 1}


HALF = np.float32(0.5)
# Operation, and a name for the variant after a colon.
CASES: Mapping[str, Case] = {
    **{name: x() for name in ("abs", "atan", "ceil", "cos", "erf", "exp", "exp2", "floor", "relu", "relu6", "round", "sigmoid", "sign", "sin")},
    **{name: x() for name in ("softplus", "softsign", "square", "tanh", "softmax", "identity", "shape", "reverse", "transpose")},
    **{name: positive() for name in ("log", "sqrt", "rsqrt", "inverse")},
    **{name: unit() for name in ("acos", "asin", "atanh", "cosh", "sinh", "tan")},
    **{name: two() for name in ("add", "sub", "mul", "real_div", "maximum", "minimum", "greater", "less", "greater_equal", "less_equal")},
    **{f"{name}:int": two(integers) for name in ("add", "sub", "mul", "maximum", "floor_div", "mod", "equal", "not_equal", "less")},
    **{f"{name}:ties": two(digits) for name in ("equal", "not_equal", "greater_equal", "less_equal")},
    **{name: two() for name in ("floor_div", "mod")},
    **{name: two(flags) for name in ("logical_and", "logical_or", "logical_xor")},
    **{name: reduction() for name in ("reduce_max", "reduce_mean", "reduce_min", "reduce_prod", "reduce_sum", "reduce_sum_square")},
    **{name: reduction() for name in ("reduce_l1_norm", "reduce_l2_norm", "reduce_log_sum_exp")},
    "reduce_log_sum": reduction(lambda rng, shape: np.abs(floats(rng, shape)) + 0.1),
    "reduce_sum:int": reduction(integers),
    "reduce_sum:all": x(),
    "reduce_argmax": lambda rng, shape: ({"x": distinct(rng, shape)}, {"axis": -1, "keep_dims": True}),
    "reduce_argmin": lambda rng, shape: ({"x": distinct(rng, shape)}, {"axis": 0}),
    "argsort": lambda rng, shape: ({"x": distinct(rng, shape)}, {"axis": 0, "ascending": True}),
    "topk": lambda rng, shape: ({"x": distinct(rng, shape)}, {"axis": 0, "k": 1 + shape[0] // 2}),
    "topk:ascending": lambda rng, shape: ({"x": distinct(rng, shape)}, {"axis": -1, "k": shape[-1], "ascending": True}),
    "cumsum": lambda rng, shape: ({"x": floats(rng, shape)}, {"axis": len(shape) - 1}),
    "cumsum:reverse": lambda rng, shape: ({"x": floats(rng, shape)}, {"axis": 0, "reverse": True}),
    "pow": lambda rng, shape: ({"x": np.abs(floats(rng, shape)) + 0.1, "y": floats(rng, shape)}, {}),
    "logical_not": lambda rng, shape: ({"x": flags(rng, shape)}, {}),
    "select": lambda rng, shape: ({"cond": flags(rng, shape), "a": floats(rng, shape), "b": floats(rng, shape)}, {}),
    "clip": x(alpha=-HALF, beta=np.float32(1)),
    "threshold": x(alpha=HALF),
    "clamped_relu": x(alpha=HALF, beta=np.float32(1)),
    "elu": x(alpha=HALF),
    "leaky_relu": x(alpha=HALF),
    "linear_activation": x(alpha=HALF, beta=np.float32(1)),
    "scaled_tanh": x(alpha=HALF, beta=np.float32(1.5)),
    "sigmoid_hard": x(alpha=HALF, beta=HALF),
    "thresholded_relu": x(alpha=HALF),
    "gelu": x(),
    "gelu:tanh": x(mode="TANH_APPROXIMATION"),
    "gelu:sigmoid": x(mode="SIGMOID_APPROXIMATION"),
    "softmax:first": x(axis=0),
    "cast:int": lambda rng, shape: ({"x": 20 * floats(rng, shape)}, {"dtype": "int32"}),
    "cast:bool": lambda rng, shape: ({"x": digits(rng, shape)}, {"dtype": "bool"}),
    "cast:float": lambda rng, shape: ({"x": integers(rng, shape)}, {"dtype": "fp32"}),
    "layer_norm": normalized,
    "l2_norm": lambda rng, shape: ({"x": floats(rng, (2, *shape[:3], 3)[:4])}, {"epsilon": np.float32(1e-3)}),
    "linear": lambda rng, shape: ({"x": floats(rng, shape)}, {"weight": floats(rng, (3, shape[-1])), "bias": floats(rng, (3,))}),
    "matmul": matrices(False, False),
    "matmul:x": matrices(True, False),
    "matmul:y": matrices(False, True),
    "scaled_dot_product_attention": attention("none"),
    "scaled_dot_product_attention:bool": attention("bool"),
    "scaled_dot_product_attention:float": attention("float"),
    "einsum": lambda rng, shape: ({"values": [floats(rng, (2, 3, 4, 5)), floats(rng, (2, 5, 4, 6))]}, {"equation": "nchw,nwhu->nchu"}),
    "concat": values,
    "stack": values,
    "split": lambda rng, shape: ({"x": floats(rng, (5, *shape[1:]))}, {"split_sizes": [1, 4], "axis": 0}),
    "split:even": lambda rng, shape: ({"x": floats(rng, (4, *shape[1:]))}, {"num_splits": 2, "axis": 0}),
    "reshape": lambda rng, shape: ({"x": floats(rng, shape)}, {"shape": [-1, shape[-1]]}),
    "reshape:zero": lambda rng, shape: ({"x": floats(rng, shape)}, {"shape": [1, 1, -1, 0]}),
    "transpose": lambda rng, shape: ({"x": floats(rng, shape)}, {"perm": [int(i) for i in rng.permutation(len(shape))]}),
    "squeeze": lambda rng, shape: ({"x": floats(rng, (1, *shape[1:3], 1))}, {"axes": [0, -1]}),
    "expand_dims": lambda rng, shape: ({"x": floats(rng, shape)}, {"axes": [0, -1]}),
    "flatten2d": x(axis=1),
    "reverse": lambda rng, shape: ({"x": floats(rng, shape)}, {"axes": axes(shape, rng)}),
    "slice_by_index": slicing(update=False),
    "slice_by_index:squeeze": squeezing,
    "slice_by_size": lambda rng, shape: ({"x": floats(rng, shape)}, {"begin": [size // 2 for size in shape], "size": [-1, *[1] * (len(shape) - 1)]}),
    "slice_update": slicing(update=True),
    "gather": gathering,
    "gather_along_axis": gathering_along,
    "tile": lambda rng, shape: ({"x": floats(rng, shape)}, {"reps": [int(n) for n in rng.integers(1, 3, len(shape))]}),
    "fill": lambda rng, shape: ({}, {"shape": list(shape), "value": HALF}),
    "pad": padded("constant"),
    "pad:reflect": padded("reflect"),
    "pad:replicate": padded("replicate"),
    "band_part": x(lower=1, upper=0),
    "band_part:upper": x(lower=-1, upper=1),
    "non_zero": lambda rng, shape: ({"x": digits(rng, shape)}, {}),
    "range_1d": ranged,
}  # fmt: skip


def execute(tmp: Path, operation: str, inputs: Mapping[str, Any], constants: Mapping[str, Any], precision: Any = "fp32") -> list[Array]:
    """Build a program of the one operation, write it, run it."""
    specs, arrays, fixed = {}, {}, dict(constants)
    for name, value in inputs.items():
        if isinstance(value, list):
            entries = {f"{name}{i}": entry for i, entry in enumerate(value)}
        elif value.ndim == 0:
            entries = {}
            fixed[name] = value
        else:
            entries = {name: value}
        arrays |= {key: value if value.dtype != bool else value.astype(np.float32) for key, value in entries.items()}
    specs = {name: spec(array) for name, array in arrays.items()}

    def build(**given: Any) -> Any:
        # A program takes no boolean inputs: they come as numbers.
        given = {
            name: mb.cast(x=var, dtype="bool") if isinstance(inputs.get(name), np.ndarray) and inputs[name].dtype == bool else var
            for name, var in given.items()
        }
        lists = {name: [given.pop(f"{name}{i}") for i in range(len(value))] for name, value in inputs.items() if isinstance(value, list)}
        result = getattr(mb, operation)(**given, **lists, **fixed)
        return [mb.identity(x=var) for var in (result if isinstance(result, list | tuple) else [result])]

    package = write_package(tmp / f"{len(list(tmp.iterdir()))}.mlpackage", {"main": function(specs, build)})
    model = MilModel(package, precision=precision)
    results = model.predict(arrays)
    return [results[name] for name in model.function().outputs]


shapes = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)
few = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@few
@given(shape=shapes, seed=st.integers(0, 1000))
def test_against_value_inference(name: str, shape: tuple[int, ...], seed: int, tmp_path: Path) -> None:
    operation = name.partition(":")[0]
    inputs, constants = CASES[name](np.random.default_rng(seed), shape)
    expected = inferred(operation, inputs, constants)
    found = execute(tmp_path, operation, inputs, constants)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def against(tmp: Path, operation: str, inputs: Mapping[str, Any], constants: Mapping[str, Any], expected: Any) -> None:
    (found,) = execute(tmp, operation, inputs, constants)
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@few
@given(shape=shapes, seed=st.integers(0, 1000))
def test_silu(shape: tuple[int, ...], seed: int, tmp_path: Path) -> None:
    data = floats(np.random.default_rng(seed), shape)
    against(tmp_path, "silu", {"x": data}, {}, data / (1 + np.exp(-data)))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
@pytest.mark.parametrize("pad", ["valid", "same", "same_lower", "custom"])
@few
@given(
    seed=st.integers(0, 1000), stride=st.integers(1, 2), dilation=st.integers(1, 2), groups=st.sampled_from([1, 2]), batch=st.integers(1, 2)
)
def test_conv(kernel: tuple[int, int], pad: str, seed: int, stride: int, dilation: int, groups: int, batch: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, weight, bias = floats(rng, (batch, 4, 7, 6)), floats(rng, (6, 4 // groups, *kernel)), floats(rng, (6,))
    if pad == "custom":
        pads = [1, 2, 0, 1]
    else:
        # The least padding with which ceil(size / stride) positions come out.
        pads = []
        for size, length in zip((7, 6), kernel, strict=True):
            total = 0
            while pad != "valid" and (size + total - (length - 1) * dilation - 1) // stride + 1 < -(-size // stride):
                total += 1
            pads += [total // 2, total - total // 2] if pad == "same" else [total - total // 2, total // 2]
    spread = np.pad(data, [(0, 0), (0, 0), (pads[0], pads[1]), (pads[2], pads[3])])
    expected = torch.nn.functional.conv2d(*map(torch.from_numpy, (spread, weight, bias)), stride, 0, dilation, groups)
    constants = {"weight": weight, "bias": bias, "pad_type": pad, "strides": [stride] * 2, "dilations": [dilation] * 2, "groups": groups}
    against(tmp_path, "conv", {"x": data}, constants | ({"pad": pads} if pad == "custom" else {}), expected)


@few
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 5))
def test_projection(seed: int, tokens: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, weight = floats(rng, (1, 8, 1, tokens)), floats(rng, (6, 8, 1, 1))
    against(tmp_path, "conv", {"x": data}, {"weight": weight}, np.einsum("ocij,ncit->noit", weight, data))


@few
@given(seed=st.integers(0, 1000), stride=st.integers(1, 3))
def test_conv_transpose(seed: int, stride: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, weight = floats(rng, (2, 4, 5)), floats(rng, (4, 3, 3))
    expected = torch.nn.functional.conv_transpose1d(torch.from_numpy(data), torch.from_numpy(weight), stride=stride, padding=1)
    constants = {"weight": weight, "strides": [stride], "pad_type": "custom", "pad": [1, 1]}
    against(tmp_path, "conv_transpose", {"x": data}, constants, expected)


@few
@given(seed=st.integers(0, 1000), stride=st.integers(1, 2), ceil=st.booleans())
def test_pools(seed: int, stride: int, ceil: bool, tmp_path: Path) -> None:
    data = floats(np.random.default_rng(seed), (2, 3, 7, 6))
    source = torch.from_numpy(data)
    constants = {"kernel_sizes": [3, 2], "strides": [stride] * 2, "pad_type": "custom", "pad": [1, 1, 1, 1], "ceil_mode": ceil}
    largest = torch.nn.functional.max_pool2d(source, (3, 2), stride, padding=(1, 1), ceil_mode=ceil)
    against(tmp_path, "max_pool", {"x": data}, constants, largest)
    if not ceil:
        for exclude in (False, True):
            mean = torch.nn.functional.avg_pool2d(source, (3, 2), stride, padding=(1, 1), count_include_pad=not exclude)
            against(tmp_path, "avg_pool", {"x": data}, constants | {"exclude_padding_from_average": exclude}, mean)


@few
@given(seed=st.integers(0, 1000), affine=st.booleans())
def test_batch_and_instance_norm(seed: int, affine: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, mean, variance = floats(rng, (2, 3, 4, 5)), floats(rng, (3,)), np.abs(floats(rng, (3,))) + 0.1
    scale = {"gamma": floats(rng, (3,)), "beta": floats(rng, (3,))} if affine else {}
    gamma, beta = (torch.from_numpy(value) for value in scale.values()) if affine else (None, None)
    source, epsilon = torch.from_numpy(data), {"epsilon": np.float32(1e-4)}
    expected = torch.nn.functional.batch_norm(source, torch.from_numpy(mean), torch.from_numpy(variance), gamma, beta, eps=1e-4)
    against(tmp_path, "batch_norm", {"x": data}, {"mean": mean, "variance": variance, **scale, **epsilon}, expected)
    expected = torch.nn.functional.instance_norm(source, weight=gamma, bias=beta, eps=1e-4)
    against(tmp_path, "instance_norm", {"x": data}, {**scale, **epsilon}, expected)


@few
@given(seed=st.integers(0, 1000), channels=st.integers(1, 5))
def test_per_channel_activations(seed: int, channels: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data = floats(rng, (2, channels, 3, 4))
    alpha, beta = np.abs(floats(rng, (channels,))), np.abs(floats(rng, (channels,)))
    wide = (-1, 1, 1)
    expected = np.where(data > 0, data, alpha.reshape(wide) * data)
    against(tmp_path, "prelu", {"x": data}, {"alpha": alpha}, expected)
    expected = alpha.reshape(wide) * np.log1p(np.exp(data * beta.reshape(wide)))
    against(tmp_path, "softplus_parametric", {"x": data}, {"alpha": alpha, "beta": beta}, expected)


@few
@given(seed=st.integers(0, 1000), height=st.integers(2, 5), width=st.integers(2, 5), up=st.integers(1, 3))
def test_upsampling(seed: int, height: int, width: int, up: int, tmp_path: Path) -> None:
    data = floats(np.random.default_rng(seed), (2, 3, height, width))
    source, factors = torch.from_numpy(data), {"scale_factor_height": up, "scale_factor_width": up + 1}
    nearest = torch.nn.functional.interpolate(source, scale_factor=(up, up + 1), mode="nearest")
    against(tmp_path, "upsample_nearest_neighbor", {"x": data}, factors, nearest)
    wide = {name: np.float32(factor + 0.5) for name, factor in factors.items()}
    for corners in (False, True):
        scale = (up + 0.5, up + 1.5)
        expected = torch.nn.functional.interpolate(
            source, scale_factor=scale, mode="bilinear", align_corners=corners, recompute_scale_factor=True
        )
        against(tmp_path, "upsample_bilinear", {"x": data}, wide | {"align_corners": corners}, expected)


@few
@given(seed=st.integers(0, 1000), factor=st.integers(1, 3))
def test_pixels_to_channels_and_back(seed: int, factor: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    deep, wide = floats(rng, (2, 2 * factor**2, 3, 4)), floats(rng, (2, 3, 2 * factor, 3 * factor))
    shuffled = torch.nn.functional.pixel_shuffle(torch.from_numpy(deep), factor)
    against(tmp_path, "pixel_shuffle", {"x": deep}, {"upscale_factor": factor}, shuffled)
    unshuffled = torch.nn.functional.pixel_unshuffle(torch.from_numpy(wide), factor)
    against(tmp_path, "pixel_unshuffle", {"x": wide}, {"downscale_factor": np.uint32(factor)}, unshuffled)


@few
@given(seed=st.integers(0, 1000), axis=st.integers(-3, 2))
def test_one_hot(seed: int, axis: int, tmp_path: Path) -> None:
    indices = np.random.default_rng(seed).integers(0, 5, (2, 3)).astype(np.int32)
    expected = np.moveaxis(np.where(np.eye(5, dtype=bool)[indices], 2.0, -1.0), -1, axis)
    constants = {"one_hot_vector_size": 5, "axis": axis, "on_value": np.float32(2), "off_value": np.float32(-1)}
    against(tmp_path, "one_hot", {"indices": indices}, constants, expected)


@few
@given(seed=st.integers(0, 1000))
def test_indexing_in_batches(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, indices = floats(rng, (2, 3, 4)), rng.integers(0, 3, (2, 5)).astype(np.int32)
    against(
        tmp_path, "gather", {"x": data, "indices": indices}, {"axis": 1, "batch_dims": 1}, np.stack([data[i][indices[i]] for i in range(2)])
    )
    places = np.stack([rng.integers(0, 2, 6), rng.integers(0, 3, 6)], -1).astype(np.int32)
    against(tmp_path, "gather_nd", {"x": data, "indices": places}, {}, data[places[:, 0], places[:, 1]])


@few
@given(seed=st.integers(0, 1000), mode=st.sampled_from(["update", "max", "min"]))
def test_scatter_along_axis(seed: int, mode: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, updates = floats(rng, (3, 5)), floats(rng, (3, 2))
    indices = np.stack([rng.choice(5, 2, replace=False) for _ in range(3)]).astype(np.int32)
    expected = data.copy()
    old = np.take_along_axis(data, indices, 1)
    new = {"update": updates, "max": np.maximum(old, updates), "min": np.minimum(old, updates)}[mode]
    np.put_along_axis(expected, indices, new, 1)
    against(tmp_path, "scatter_along_axis", {"data": data, "indices": indices, "updates": updates}, {"axis": 1, "mode": mode}, expected)


@few
@given(seed=st.integers(0, 1000), shape=shapes)
def test_details_that_value_inference_gets_wrong_or_leaves_out(seed: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, other = floats(rng, shape), floats(rng, shape)
    against(tmp_path, "cumsum", {"x": data}, {"axis": 0, "exclusive": True}, np.cumsum(data, 0) - data)
    woven = np.stack([data, other], 1).reshape(-1, *shape[1:])
    against(tmp_path, "concat", {"values": [data, other]}, {"axis": 0, "interleave": True}, woven)
    against(tmp_path, "fill_like", {"ref_tensor": data}, {"value": HALF}, np.full(shape, 0.5))
    backwards = {"begin": [-1] * len(shape), "end": [0] * len(shape), "stride": [-1] * len(shape), "end_mask": [True] * len(shape)}
    against(tmp_path, "slice_by_index", {"x": data}, backwards, np.flip(data))


def test_every_operation_is_tested() -> None:
    elsewhere = {"silu", "conv", "conv_transpose", "max_pool", "avg_pool", "batch_norm", "instance_norm", "prelu", "softplus_parametric"}
    elsewhere |= {"one_hot", "gather_nd", "scatter_along_axis", "fill_like"}
    elsewhere |= {"upsample_nearest_neighbor", "upsample_bilinear", "pixel_shuffle", "pixel_unshuffle"}
    assert set(OPS) == {name.partition(":")[0] for name in CASES} | elsewhere
