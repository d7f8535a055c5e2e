"""Programs joined to one: results of running them one after another; what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from elmexport.errors import ElmExportError
from elmexport.mil.executor import MilModel
from elmexport.mil.link import link
from elmexport.mil.program import Program, load_program
from tests.mil.packages import function, write_package

CONNECTIONS = {"y": "x"}


def spec(*shape: int) -> Any:
    return mb.TensorSpec(shape, dtype=types.fp16)


def counter(factor: Any, total: Any, **given: Any) -> Any:
    """`y = x * factor + total`, where `total` is a state that adds up what came in; `x` may have any name."""
    (x,) = given.values()
    after = mb.add(x=mb.read_state(input=total), y=x)
    kept = mb.coreml_update_state(state=total, value=after)
    return mb.add(x=mb.mul(x=x, y=factor), y=kept, name="y")


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Program]:
    def call(name: str, specs: Mapping[str, Any], build: Any, functions: tuple[str, ...] = ("main",)) -> Program:
        made = {each: function(specs, build, ct.target.iOS18) for each in functions}
        return load_program(write_package(tmp_path / f"{name}.mlpackage", made))

    return call


def test_one_after_another(program: Callable[..., Program], tmp_path: Path) -> None:
    def specs(name: str = "x") -> dict[str, Any]:
        return {name: spec(1, 4), "factor": spec(1, 1), "total": mb.StateTensorSpec((1, 4), dtype=types.fp16)}

    def last(**given: Any) -> Any:
        return mb.identity(x=counter(**given), name="z")

    parts = [program("a", specs("ids"), counter), program("b", specs(), counter), program("c", specs(), last)]
    linked = MilModel(link(parts, tmp_path, CONNECTIONS))
    main = linked.function()
    assert (list(main.inputs), list(main.states), main.outputs) == (["ids", "factor"], ["total.0", "total.1", "total.2"], ("z",))
    alone, states = [MilModel(part) for part in parts], linked.make_states()
    own = [model.make_states() for model in alone]
    for step in range(3):
        x = np.arange(4, dtype=np.float16)[None] + step
        factor = np.full((1, 1), 0.7, np.float16)
        expected = x
        for name, model, state in zip(("ids", "x", "x"), alone, own, strict=True):
            (expected,) = model.predict({name: expected, "factor": factor}, state).values()
        assert np.array_equal(linked.predict({"ids": x, "factor": factor}, states)["z"], expected)
    for i, state in enumerate(own):
        assert np.array_equal(states[f"total.{i}"], state["total"])


def test_own_inputs_and_outputs(program: Callable[..., Program], tmp_path: Path) -> None:
    def build(name: str) -> Callable[..., Any]:
        def outputs(cache: Any, **given: Any) -> Any:
            (x,) = given.values()
            return mb.add(x=x, y=cache, name=name), mb.mul(x=cache, y=x, name="new")

        return outputs

    first_part = program("a", {"ids": spec(1, 4), "cache": spec(1, 4)}, build("y"))
    second_part = {"x": spec(1, 4), "cache": spec(1, 4)}
    with pytest.raises(ElmExportError, match="x in function 'main' is given by the last package, and none takes it"):
        link([first_part, program("b", second_part, build("y"))], tmp_path, CONNECTIONS, {"cache", "new"})
    model = MilModel(link([first_part, program("c", second_part, build("z"))], tmp_path, CONNECTIONS, {"cache", "new"}))
    x, first, second = (np.array([[1, 2, 3, 4]], np.float16) * scale for scale in (1, 2, 3))
    found = model.predict({"ids": x, "cache.0": first, "cache.1": second})
    assert set(found) == {"z", "new.0", "new.1"}
    assert np.array_equal(found["z"], x + first + second)
    assert np.array_equal(found["new.0"], first * x) and np.array_equal(found["new.1"], second * (x + first))


def test_what_does_not_fit(program: Callable[..., Program], tmp_path: Path) -> None:
    def relu(name: str) -> Callable[..., Any]:
        return lambda **given: mb.relu(x=next(iter(given.values())), name=name)

    first = program("first", {"ids": spec(1, 4)}, relu("y"))
    wider = program("wider", {"x": spec(1, 8)}, relu("z"))
    with pytest.raises(
        ElmExportError, match=r"wider\.mlpackage .* takes x as float16 \[1, 8\], and the package before it gives float16 \[1, 4\]"
    ):
        link([first, wider], tmp_path, CONNECTIONS)
    fits = program("fits", {"x": spec(1, 4)}, relu("z"))
    with pytest.raises(ElmExportError, match=r"fits\.mlpackage .* takes x, which no package before it gives"):
        link([fits], tmp_path, CONNECTIONS)
    with pytest.raises(ElmExportError, match=r"first\.mlpackage .* does not take x, which the package before it gives"):
        link([first, first], tmp_path, CONNECTIONS)
    other = program("other", {"ids": spec(1, 8)}, relu("z"))
    with pytest.raises(ElmExportError, match=r"other\.mlpackage .* takes ids as float16 \[1, 8\], and another package as float16 \[1, 4\]"):
        link([program("free", {"ids": spec(1, 4)}, relu("u")), other], tmp_path, CONNECTIONS)
    with pytest.raises(ElmExportError, match=r"again\.mlpackage .* gives z, as a package before it does"):
        link(
            [fits_alone := program("alone", {"ids": spec(1, 4)}, relu("z")), program("again", {"ids": spec(1, 4)}, relu("z"))],
            tmp_path,
            CONNECTIONS,
        )
    two = program("two", {"ids": spec(1, 4)}, relu("u"), ("main", "more"))
    with pytest.raises(
        ElmExportError, match=r"two\.mlpackage has the functions main, more, and .*alone\.mlpackage, which runs before it, main"
    ):
        link([fits_alone, two], tmp_path, CONNECTIONS)
