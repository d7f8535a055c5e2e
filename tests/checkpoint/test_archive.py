"""Archives of `torch.save` whose records are not what they say: refused, when the file is opened or before its first tensor is used."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from elmexport.checkpoint.archive import check_archive, check_content
from elmexport.checkpoint.pickled import open_file
from elmexport.errors import ElmExportError

Record = tuple[zipfile.ZipInfo, bytes]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    shared = torch.arange(100.0)
    state = {"a": torch.ones(4, 8), "b": torch.ones(3, dtype=torch.bfloat16), "c": shared[:50], "d": shared[50:], "e": torch.tensor([True])}
    torch.save({"model": state, "epoch": 3, "scale": 0.5}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def rewrite(path: Path, change: Callable[[zipfile.ZipInfo, bytes], Record]) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [change(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in records:
            archive.writestr(info, content)


def deflated(info: zipfile.ZipInfo, content: bytes) -> Record:
    info.compress_type = zipfile.ZIP_DEFLATED if "/data/" in info.filename else zipfile.ZIP_STORED
    return info, content


def cut_short(info: zipfile.ZipInfo, content: bytes) -> Record:
    return info, content[:-4] if info.filename.endswith("data/0") else content


def test_every_kind_of_tensor_passes(path: Path) -> None:
    check_archive(path)
    check_content(path)
    files = open_file(path)
    assert torch.equal(files.read("d"), torch.arange(50.0, 100.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [(deflated, "data/0 is compressed or encrypted"), (cut_short, r"record 0 has 124 bytes, its tensor takes 128")],
)
def test_records_that_torch_would_map_wrongly_are_refused(path: Path, change: Callable[..., Record], message: str) -> None:
    rewrite(path, change)
    with pytest.raises(ElmExportError, match=message):
        open_file(path)


def test_content_that_is_not_its_checksums_is_refused_before_a_tensor_is_used(path: Path) -> None:
    data = path.read_bytes()
    ones = data.index(torch.ones(4, 8).numpy().tobytes())
    path.write_bytes(data[: ones + 7] + b"\x00" + data[ones + 8 :])
    files = open_file(path)
    for _ in range(2):
        with pytest.raises(ElmExportError, match=r"corrupt \(Bad CRC-32 for file 'model/data/0'\); download it again"):
            files.read("b")


def test_files_without_checksums_are_taken(path: Path, tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "plain.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(open_file(tmp_path / "plain.pt").read("a"), torch.ones(3))


@pytest.mark.parametrize("name", ["../../evil", "/evil", "C:\\evil", "model/../../evil"])
def test_records_whose_names_lead_elsewhere_are_not_unpacked(path: Path, tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"evil")
    before = sorted(tmp_path.parent.rglob("*"))
    with contextlib.suppress(ElmExportError):  # torch itself may refuse it
        assert torch.equal(open_file(path).read("d"), torch.arange(50.0, 100.0))
    assert sorted(tmp_path.parent.rglob("*")) == before


def nested() -> tuple[object, ...]:
    value: tuple[object, ...] = ("x",)
    for _ in range(64):
        value = (value, value)
    return value


def bombs() -> Iterator[tuple[str, bytes]]:
    yield "hashed for ever", pickle.dumps(nested())[:-1] + b"}]N\x86s."
    yield "no end", pickle.dumps({"a": 1})[:-1]
    yield "an empty stack", b"\x80\x02s."


@pytest.mark.parametrize(("_", "content"), bombs())
def test_pickles_that_no_model_needs_are_refused(path: Path, _: str, content: bytes) -> None:
    rewrite(path, lambda info, own: (info, content if info.filename.endswith("data.pkl") else own))
    with pytest.raises(ElmExportError, match="truncated or corrupt"):
        open_file(path)


def test_a_record_whose_own_name_is_no_text(path: Path) -> None:
    data = path.read_bytes()
    record = data.index(b"model/data/1")  # before its content; the list of records at the end names it again
    flags = record - 30 + 6  # that the name is UTF-8, said beside it
    path.write_bytes(data[:flags] + (0x800).to_bytes(2, "little") + data[flags + 2 : record] + b"\x8d" + data[record + 1 :])
    with pytest.raises(ElmExportError, match="truncated or corrupt"):
        check_content(path)
