"""Files that appear when they are complete, and safetensors written tensor by tensor, read by the library itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elmexport.errors import ElmExportError
from elmexport.files import (
    MappedTensors,
    SafetensorsWriter,
    complete_file,
    read_metadata,
    remove_stale,
    temporary_sibling,
    write_safetensors,
    write_text,
)

TENSORS = {
    "wide": torch.arange(12, dtype=torch.int64).view(3, 4),
    "codes": torch.arange(-3, 4, dtype=torch.int8),
    "scales": torch.linspace(0, 1, 5, dtype=torch.float16),
    "matrix": torch.linspace(-1, 1, 6).view(2, 3),
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with complete_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == {"file"}


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), complete_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and names(tmp_path) == {"file"}


def test_what_killed_processes_left_goes(tmp_path: Path) -> None:
    path = tmp_path / "a[1].file"
    gone = tmp_path / ".a[1].file.partial-999999999"
    alive = tmp_path / f".a[1].file.partial-{os.getppid()}"
    other = tmp_path / ".a1.file.partial-999999999"
    for leftover in (gone, alive, other):
        leftover.write_text("")
    write_text(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode() and names(tmp_path) == {path.name, alive.name, other.name}
    folder = temporary_sibling(path, "old")
    folder.mkdir()
    remove_stale(path, "old")
    assert not folder.exists()


def test_what_other_machines_write_is_left_for_a_day(tmp_path: Path) -> None:
    """On a file system that several machines share, one cannot know the processes of another."""
    path = tmp_path / "file"
    fresh, old = (tmp_path / f".file.partial-other_machine-{pid}" for pid in (999999998, 999999999))
    for leftover in (fresh, old):
        leftover.write_text("")
    os.utime(old, (0, 0))
    remove_stale(path, "partial")
    assert names(tmp_path) == {fresh.name}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"cannot write .*nowhere/file: No such file or directory; choose another place"):
        write_text(tmp_path / "nowhere" / "file", "text")


def test_safetensors_are_those_of_the_library(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_safetensors(ours, TENSORS, {"key": "value"})
    save_file(TENSORS, theirs, metadata={"key": "value"})
    found = load_file(ours)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    headers = []
    for path in (ours, theirs):
        data = path.read_bytes()
        headers.append(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))
    assert headers[0] == headers[1]  # the same order: the wider types first, so that all lie aligned


def test_tensors_may_come_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}, {})
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
        writer.close()
    with safe_open(path, framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in TENSORS.items())


def test_a_tensor_that_was_promised_must_come(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        writer = SafetensorsWriter(file, {"a": (torch.float32, (2,))}, {})
        with pytest.raises(AssertionError, match="never written"):
            writer.close()
        with pytest.raises(AssertionError):
            writer.write("a", torch.zeros(3))


def test_mapped_tensors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_safetensors(path, TENSORS | {"bad": torch.tensor([1.0, float("nan")])}, {"key": "value"})
    found = MappedTensors(path, "do it again")
    assert set(found) == {*TENSORS, "bad"} and len(found) == 5 and "missing" not in found
    assert torch.equal(found["wide"], TENSORS["wide"])
    with pytest.raises(ElmExportError, match="is damaged: bad holds NaN or infinity; do it again"):
        found["bad"]
    assert read_metadata(path, "thing", "do it again") == {"key": "value"}
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ElmExportError, match=r"changed while it was in use .*; do it again"):
        found["wide"]
    with pytest.raises(ElmExportError, match=r"is no thing, or is truncated or damaged .*; do it again"):
        read_metadata(path, "thing", "do it again")
    path.unlink()
    with pytest.raises(ElmExportError, match=r"cannot read .*; give a thing: do it again"):
        read_metadata(path, "thing", "do it again")
