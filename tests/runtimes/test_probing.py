"""Files that end the process of the engine that opens them: an error here, and no end of ours."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from pathlib import Path

import gguf
import pytest

from elmexport.errors import ElmExportError
from elmexport.runtimes import open_artifact, probing
from elmexport.runtimes.text import open_text_model
from tests.conftest import ExportTo, SmallArtifact
from tests.memory_checkpoint import MemoryCheckpoint


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(small_artifact: SmallArtifact, tmp_path: Path) -> Path:
    """A copy of a GGUF file, which nobody vouches for."""
    (sound,) = small_artifact("gguf", "int4").glob("*.gguf")
    return Path(shutil.copy(sound, tmp_path / "model.gguf"))


def set_number(path: Path, key: str, value: int) -> None:
    """Write another value into a uint32 of the file's metadata."""
    field = gguf.GGUFReader(path).fields[key]
    place = field.offset + sum(part.nbytes for part in field.parts[:-1])
    data = path.read_bytes()
    path.write_bytes(data[:place] + struct.pack("<I", value) + data[place + 4 :])


def test_a_file_that_makes_the_engine_abort(path: Path) -> None:
    set_number(path, "openelm.block_count", 0)
    for opened in (open_artifact, open_artifact, open_text_model):  # the last begins with the tokenizer, which is in the same file
        with pytest.raises(ElmExportError, match=r"llama\.cpp ended its process with .* while it opened .*copy it again"):
            opened(path)


@pytest.mark.skipif(sys.platform == "win32", reason="processor time cannot be limited")
def test_a_file_that_makes_the_engine_run_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_number(path, "openelm.rope.dimension_count", 0)
    monkeypatch.setattr(probing, "_LEAST_SECONDS", 1)
    with pytest.raises(ElmExportError, match=r"did not open .* in 1 s of processor time"):
        open_artifact(path)


def test_a_file_is_opened_apart_once(path: Path, small_artifact: SmallArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    apart = probing._open_apart
    monkeypatch.setattr(probing, "_open_apart", lambda kind, path, seconds: opened.append(path) or apart(kind, path, seconds))  # type: ignore[func-returns-value]
    for _ in range(2):
        open_artifact(path).close()
    assert opened == [path]
    os.utime(path, (1, 1))  # another file, for all anybody knows
    open_artifact(path).close()
    assert opened == [path, path]


@pytest.mark.parametrize("target", ["gguf", "onnx", "mlx"])
def test_what_was_just_exported_is_opened_directly(
    small_checkpoint: MemoryCheckpoint, export_to: ExportTo, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    path = export_to(small_checkpoint, target, "fp16")
    monkeypatch.setattr(probing, "_open_apart", None)
    open_artifact(path).close()
