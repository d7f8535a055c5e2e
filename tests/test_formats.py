"""The registry of formats: every reference is to something, and a broken package breaks nothing but itself. `test_toy_format` installs a sound one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint

import pytest

from elmexport import formats
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.formats import FORMATS, find_format, format_names, load
from elmexport.target import Target
from tests.cli.conftest import Run, run  # noqa: F401  (a fixture)

ODD: Mapping[str, tuple[str, str]] = {
    "absent": ("no_such_module:FORMAT", "the format absent of the package \\? does not load \\(No module named 'no_such_module'\\)"),
    "odd": ("math:pi", "the entry point odd of the package \\? is 3.14.*, where a Format called 'odd' belongs"),
    "other": ("elmexport.formats:FORMATS", "the entry point other of the package"),
}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    points = {name: EntryPoint(name, value, formats.ENTRY_POINT_GROUP) for name, (value, _) in ODD.items()}
    monkeypatch.setattr(formats, "_installed", lambda: points)
    yield
    formats._load.cache_clear()


@pytest.mark.parametrize("name", FORMATS)
def test_every_reference_of_a_row(name: str) -> None:
    row = FORMATS[name]
    assert row.name == name and issubclass(load(row.target), Target) and load(row.target).name == name
    for reference in (row.runtime, row.reader, row.runtime_for_check, row.tokenizer):
        assert reference is None or callable(load(reference))
    assert all(suffix.startswith(".") for suffix in row.suffixes)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", ODD)
def test_a_package_that_does_not_load(name: str) -> None:
    with pytest.raises(ElmExportError, match=ODD[name][1]):
        find_format(name)
    assert find_format("onnx") is FORMATS["onnx"]
    assert format_names() == (*FORMATS, *ODD)


@pytest.mark.usefixtures("broken")
def test_the_program_goes_on_without_it(run: Run) -> None:  # noqa: F811
    page = run("--help")
    assert page.code == 0 and "\n  odd " in page.out and "\n  onnx       Export a model to ONNX" in page.out
    run("odd", "--model", "tiny").refused("the entry point odd of the package ? is 3.14", "mend or remove that package")


def test_a_format_that_nobody_knows() -> None:
    with pytest.raises(ElmExportError, match="format is 'tflite', which nothing here knows; known: onnx, coreml, gguf"):
        find_format("tflite")


def test_what_a_package_needs_and_is_not_there() -> None:
    with pytest.raises(MissingDependencyError, match="no_such_module cannot be imported"):
        load("no_such_module:name")
