"""Functions run on less than their sizes: like one that was made with the smaller sizes, and refused where an axis is needed in full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from elmexport.errors import ElmExportError
from elmexport.mil.executor import MilModel
from elmexport.mil.narrowing import CannotNarrowError
from tests.mil.packages import function, write_package

FULL, LESS, CHANNELS = 6, 4, 5


def fp32(*shape: int) -> Any:
    return mb.TensorSpec(shape, dtype=types.fp32)


def rows(size: int) -> Callable[..., Any]:
    """A constant along the axis, a 1x1 convolution, reshapes that merge the axis with another and take it apart again, a repeated mask."""
    ramp = np.arange(FULL, dtype=np.float32)[:size]
    kernel = np.random.default_rng(0).normal(size=(8, CHANNELS, 1, 1)).astype(np.float32)

    def body(x: Any) -> Any:
        here = mb.add(x=mb.slice_by_index(x=x, begin=[0] * 4, end=[1, 1, 1, size]), y=ramp)
        x = mb.conv(x=mb.add(x=x, y=ramp.reshape(1, 1, 1, size)), weight=kernel, pad_type="valid")
        x = mb.transpose(x=mb.reshape(x=x, shape=[1, 2, 4, size]), perm=[0, 1, 3, 2])
        x = mb.reshape(x=x, shape=[1, 1, 2 * size, 4])
        mask = mb.reshape(x=here, shape=[1, 1, size, 1])
        x = mb.mul(x=x, y=mb.concat(values=[mask, mask], axis=2))
        x = mb.softmax(x=mb.matmul(x=x, y=np.eye(4, dtype=np.float32)[::-1].copy()), axis=-1)
        return mb.slice_by_index(x=mb.reshape(x=x, shape=[1, 2, size, 4]), begin=[0, 0, 0, 1], end=[1, 2, size, 3])

    return body


def made(tmp_path: Path, name: str, specs: dict[str, Any], body: Callable[..., Any]) -> MilModel:
    return MilModel(write_package(tmp_path / f"{name}.mlpackage", {"main": function(specs, body)}), precision="fp32")


def output(model: MilModel, x: torch.Tensor, states: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    (result,) = model.run({"x": x}, states).values()
    return result


def test_like_a_function_made_smaller(tmp_path: Path) -> None:
    full = made(tmp_path, "full", {"x": fp32(1, CHANNELS, 1, FULL)}, rows(FULL))
    less = made(tmp_path, "less", {"x": fp32(1, CHANNELS, 1, LESS)}, rows(LESS))
    x = torch.randn(1, CHANNELS, 1, FULL, generator=torch.Generator().manual_seed(0))
    before = output(full, x)
    full = full.narrowed({"places": [("x", 3)]})
    found = output(full, x[..., :LESS])
    assert found.shape == (1, 2, LESS, 2)
    torch.testing.assert_close(found, output(less, x[..., :LESS]), rtol=0, atol=1e-6)
    torch.testing.assert_close(output(full, x), before, rtol=0, atol=0)  # the full size runs as before


def test_states_are_shortened_too(tmp_path: Path) -> None:
    def specs(size: int) -> dict[str, Any]:
        return {"x": fp32(3, CHANNELS), "cache": mb.StateTensorSpec((size, CHANNELS), dtype=types.fp16)}

    def body(size: int) -> Callable[..., Any]:
        def build(x: Any, cache: Any) -> Any:
            values = mb.cast(x=mb.read_state(input=cache), dtype="fp32")
            scores = mb.add(x=mb.matmul(x=x, y=values, transpose_y=True), y=np.arange(FULL, dtype=np.float32)[:size])
            return mb.matmul(x=scores, y=values)

        return build

    full, less = (made(tmp_path, str(size), specs(size), body(size)) for size in (FULL, LESS))
    x, cache = torch.randn(3, CHANNELS), torch.randn(FULL, CHANNELS)
    full = full.narrowed({"context": [("cache", 0)]})
    expected = output(less, x, {"cache": cache[:LESS]})
    torch.testing.assert_close(output(full, x, {"cache": cache[:LESS]}), expected, rtol=0, atol=1e-5)
    with pytest.raises(ElmExportError, match=f"axis 0 of 'cache' has {FULL + 1} entries; it takes .* from 1 to {FULL}"):
        output(full, x, {"cache": torch.zeros(FULL + 1, CHANNELS)})


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda x: mb.reduce_mean(x=x, axes=[3]), "reduced by"),
        (lambda x: mb.split(x=x, num_splits=2, axis=3), "split by"),
        (lambda x: mb.add(x=mb.concat(values=[x, mb.relu(x=x)], axis=3), y=np.ones(2 * FULL, np.float32)), "by the shapes of"),
        (lambda x: mb.reshape(x=mb.concat(values=[x, mb.relu(x=x)], axis=3), shape=[CHANNELS, 2 * FULL]), "it goes through reshape"),
        (lambda x: mb.slice_by_index(x=x, begin=[0, 0, 0, 2], end=[1, CHANNELS, 1, FULL]), "takes a part of it"),
        (lambda x: mb.conv(x=x, weight=np.ones((2, CHANNELS, 1, 3), np.float32), pad_type="same"), "convolution over it"),
        (lambda x: mb.conv(x=mb.transpose(x=x, perm=[0, 3, 2, 1]), weight=np.ones((2, FULL, 1, 1), np.float32)), "convolution over it"),
        (lambda x: mb.reshape(x=x, shape=[1, CHANNELS, 2, FULL // 2]), "taken apart"),
        (lambda x: mb.cumsum(x=x, axis=3), "by cumsum"),
    ],
    ids=["mean", "split", "sum of axes", "reshaped sum", "part", "convolution", "channels", "reshape", "no-rule"],
)
def test_refused_where_the_axis_is_needed_in_full(tmp_path: Path, build: Callable[..., Any], reason: str) -> None:
    model = made(tmp_path, "model", {"x": fp32(1, CHANNELS, 1, FULL)}, build)
    with pytest.raises(CannotNarrowError, match=f"axis 3 of x is needed in full: .*{reason}"):
        model.narrowed({"places": [("x", 3)]})
    with pytest.raises(ElmExportError, match="input 'x' of function 'main' has shape"):  # nothing has changed
        model.run({"x": torch.zeros(1, CHANNELS, 1, LESS)})


def test_one_size_cannot_be_two(tmp_path: Path) -> None:
    model = made(tmp_path, "model", {"x": fp32(FULL), "y": fp32(FULL)}, lambda x, y: mb.add(x=x, y=y))
    with pytest.raises(CannotNarrowError, match="first and second are one size"):
        model.narrowed({"first": [("x", 0)], "second": [("y", 0)]})
    model = model.narrowed({"both": [("x", 0), ("y", 0)]})
    with pytest.raises(ElmExportError, match="axis 0 of 'y' has 5 entries; it takes as many as the other both"):
        model.run({"x": torch.zeros(4), "y": torch.zeros(5)})


def test_two_sizes_cannot_be_one(tmp_path: Path) -> None:
    model = made(tmp_path, "model", {"x": fp32(FULL), "y": fp32(FULL)}, lambda x, y: [mb.relu(x=x), mb.relu(x=y)])
    with pytest.raises(CannotNarrowError, match="the places of both are sizes of their own"):
        model.narrowed({"both": [("x", 0), ("y", 0)]})


def test_axes_that_are_joined(tmp_path: Path) -> None:
    """Attention over earlier values and new ones: the mask is joined as the keys are."""

    def specs(earlier: int, new: int) -> dict[str, Any]:
        return {"x": fp32(new, CHANNELS), "before": fp32(earlier, CHANNELS)}

    def body(earlier: int, new: int) -> Callable[..., Any]:
        places = np.arange(FULL, dtype=np.float32)

        def build(x: Any, before: Any) -> Any:
            both = mb.concat(values=[before, x], axis=0)
            rows = mb.reduce_sum(x=x, axes=[1], keep_dims=True)
            columns = mb.reshape(x=mb.reduce_sum(x=x, axes=[1]), shape=[1, new])
            mask = mb.concat(values=[mb.mul(x=rows, y=places[None, :earlier]), mb.mul(x=rows, y=columns)], axis=1)
            return mb.matmul(x=mb.softmax(x=mb.add(x=mb.matmul(x=x, y=both, transpose_y=True), y=mask)), y=both)

        return build

    full = made(tmp_path, "full", specs(FULL, FULL + 1), body(FULL, FULL + 1))
    less = made(tmp_path, "less", specs(2, LESS), body(2, LESS))
    full = full.narrowed({"earlier": [("before", 0)], "new": [("x", 0)]})
    x, before = torch.randn(LESS, CHANNELS), torch.randn(2, CHANNELS)
    found, expected = (output_of(model.run({"x": x, "before": before})) for model in (full, less))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_one_entry_becomes_several(tmp_path: Path) -> None:
    """What picks one column picks as many as it is asked for; the same as one after the other."""

    def build(x: Any, which: Any) -> Any:
        places = np.arange(FULL, dtype=np.int32)[:, None]
        picked = mb.cast(x=mb.equal(x=places, y=which), dtype="fp32")
        column = mb.transpose(
            x=mb.reshape(x=mb.matmul(x=x, y=picked), shape=[1, CHANNELS, 1, 1]) if reshapes else mb.matmul(x=x, y=picked), perm=order
        )
        return [mb.reduce_argmax(x=column, axis=-1, name="first"), mb.reduce_max(x=column, axes=[-1], name="largest")]

    specs = {"x": fp32(CHANNELS, FULL), "which": mb.TensorSpec((1,), dtype=types.int32)}
    reshapes, order = False, [1, 0]
    model = made(tmp_path, "model", specs, build)
    x, which = torch.randn(CHANNELS, FULL), torch.tensor([4, 0, 4, 1], dtype=torch.int32)
    singly = [model.run({"x": x, "which": one[None]}) for one in which]
    with pytest.raises(ElmExportError, match=r"'which' of function 'main' has shape \[4\]; it takes \[1\]"):
        model.run({"x": x, "which": which})
    model = model.narrowed({"rows": [("which", 0)]})
    found = model.run({"x": x, "which": which})
    for name in ("first", "largest"):
        assert torch.equal(found[name], torch.cat([one[name] for one in singly]))
    reshapes, order = True, [0, 2, 3, 1]
    with pytest.raises(CannotNarrowError, match="axis 0 of which is needed in full: it goes through"):
        made(tmp_path, "reshaped", specs, build).narrowed({"rows": [("which", 0)]})


def test_only_the_outputs_asked_for(tmp_path: Path) -> None:
    """Steps that nothing else needs are left out, the failing one here too; states are kept up."""

    def build(x: Any, total: Any) -> Any:
        new = mb.coreml_update_state(state=total, value=mb.add(x=mb.read_state(input=total), y=x))
        return [mb.relu(x=new, name="kept"), mb.gather(x=new, indices=mb.cast(x=x, dtype="int32"), name="failing")]

    specs = {"x": mb.TensorSpec((3,), dtype=types.fp16), "total": mb.StateTensorSpec((3,), dtype=types.fp16)}
    model = MilModel(write_package(tmp_path / "model.mlpackage", {"main": function(specs, build)}))
    states, x = model.make_states(), torch.full((3,), 7.0)
    with pytest.raises(ElmExportError, match="gather"):
        model.run({"x": x}, states)
    states = model.make_states()
    assert model.run({"x": x}, states, outputs=["kept"])["kept"].tolist() == [7] * 3
    assert model.run({"x": x}, states, outputs=()) == {}
    assert states["total"].tolist() == [14] * 3


def test_batches_are_runs_side_by_side(tmp_path: Path) -> None:
    def build(x: Any, factor: Any, total: Any) -> Any:
        new = mb.coreml_update_state(state=total, value=mb.add(x=mb.read_state(input=total), y=mb.mul(x=x, y=factor)))
        return mb.softmax(x=new)

    specs = {"x": mb.TensorSpec((3,), dtype=types.fp16), "factor": mb.TensorSpec((1,), dtype=types.fp16)}
    model = MilModel(
        write_package(tmp_path / "m.mlpackage", {"main": function(specs | {"total": mb.StateTensorSpec((3,), dtype=types.fp16)}, build)})
    )
    x, factor, states = torch.randn(4, 3).half().float(), torch.tensor([2.0]), {"total": torch.randn(4, 3).half().float()}
    singly = [{"total": state.clone()} for state in states["total"]]
    expected = [output_of(model.run({"x": row, "factor": factor}, state)) for row, state in zip(x, singly, strict=True)]
    found = output_of(model.run_batch({"x": x}, {"factor": factor}, states))
    assert torch.equal(found, torch.stack(expected))
    assert torch.equal(states["total"], torch.stack([state["total"] for state in singly]))


def output_of(results: dict[str, torch.Tensor]) -> torch.Tensor:
    (result,) = results.values()
    return result
