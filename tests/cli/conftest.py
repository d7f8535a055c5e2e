"""Running the command line inside the test process, in an empty current folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from elmexport.artifact import write_manifest
from elmexport.cli.main import main
from tests.manifests import example_manifest


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, *fragments: str, code: int = 2) -> None:
        """Assert that it ended in one clean line of error that says all of `fragments`."""
        assert self.code == code, self
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        for fragment in fragments:
            assert fragment in self.err


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("models", "--json")` as the console script would do it, current folder `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(end.value.code or 0, captured.out, captured.err)  # type: ignore[arg-type]

    return call


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder like an export's: two files and the manifest that belongs to them."""
    folder = tmp_path / "OpenELM-450M-gguf-int4"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"x" * 1_500_000)
    (folder / "tokenizer.model").write_bytes(b"y" * 1000)
    write_manifest(folder, example_manifest())
    return folder
