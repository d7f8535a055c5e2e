"""A format that another package adds: installed by pip, it has a command, and all others work on what it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from elmexport.artifact import Artifact
from elmexport.errors import ElmExportError
from tests.clients.interpreter import Interpreter

PACKAGE = Path(__file__).parent / "toy_format"


PROGRAM = """
import contextlib, io, json, sys
from elmexport.cli.main import main
errors, code = io.StringIO(), 0
with contextlib.redirect_stderr(errors):
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        code = end.code or 0
print("\\0", json.dumps({"code": code, "errors": errors.getvalue()}))
"""


@dataclass(frozen=True)
class Command:
    """`elmexport("toy", "--model", "tiny")` in an environment where the package is installed, in a folder of its own; returns what it said.

    One process runs all commands.
    """

    folder: Path
    interpreter: Interpreter

    def __call__(self, *arguments: str, code: int = 0) -> str:
        out, _, ended = self.interpreter.run(PROGRAM, *arguments, folder=self.folder).rpartition("\0")
        found = json.loads(ended)
        assert found["code"] == code, found["errors"]
        return str(found["errors"]) if code else out


@pytest.fixture(scope="module")
def elmexport(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    pytest.importorskip("hatchling", reason="pip install hatchling")
    site, folder, source = (tmp_path_factory.mktemp(name) for name in ("site", "work", "source"))
    shutil.copytree(PACKAGE, source / "toy", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(site)]
    done = subprocess.run([*pip, str(source / "toy")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = os.pathsep.join(path for path in (str(site), *sys.path) if path)
    interpreter = Interpreter(source / "stderr.txt", {**os.environ, "PYTHONPATH": paths, "ELMEXPORT_CACHE": str(folder / "cache")})
    yield Command(folder, interpreter)
    interpreter.close()


@pytest.fixture(scope="module")
def artifact(elmexport: Command) -> str:
    """The name of an artifact of the format, self-check included."""
    said = elmexport("toy", "--model", "tiny", "--order", "name")
    assert "KL divergence" in said and 'elmexport generate OpenELM-tiny-toy-int8 "' in said
    return "OpenELM-tiny-toy-int8"


@pytest.mark.slow
def test_help(elmexport: Command) -> None:
    assert "\n  toy        Export a model to a toy: float32 weights in one NumPy file.\n" in elmexport("--help")
    page = elmexport("toy", "--help")
    assert "int8   8.5  matrices rounded to 8-bit integers in blocks of 32 (default)" in page
    assert "All are stored as float32." in page and "elmexport toy --model tiny --order name" in page
    assert "--order <model|name>" in page and "--most-layers N" in page


@pytest.mark.slow
def test_its_settings(elmexport: Command) -> None:
    assert "'size' is not one of 'model', 'name'" in elmexport("toy", "--order", "size", code=2)
    assert "error: the model has 6 layers, --most-layers allows 2" in elmexport("toy", "--most-layers", "2", code=2)
    assert "--quant int4 is not available for toy; choose int8, fp32" in elmexport("toy", "--quant", "int4", code=2)


@pytest.mark.slow
def test_inspect(elmexport: Command, artifact: str) -> None:
    document = json.loads(elmexport("inspect", artifact, "--tensors", "--json"))
    assert document["settings"] == {"order": "name", "most_layers": None}
    assert document["tools"]["elmexport-toy"] == "1.0"
    assert document["self_check"]["done"] and document["self_check"]["kl_mean"] < 0.01
    assert sum(tensor["bytes"] for tensor in document["tensors"]) == 4 * document["model"]["parameters"]
    assert {tensor["role"] for tensor in document["tensors"]} >= {"embedding", "attention.qkv", "ffn.down"}


@pytest.mark.slow
def test_eval_and_report(elmexport: Command, artifact: str) -> None:
    options = ("--limit", "5", "--text-tokens", "256")
    document = json.loads(elmexport("eval", artifact, *options, "--report", "toy.json", "--json"))
    assert (document["artifact"]["target"], document["artifact"]["engine"]) == ("toy", "toy engine")
    assert document["tasks"]["cloze"]["n"] == 5 and 0 < document["kl"]["mean"] < 0.01
    assert artifact in elmexport("report", "toy.json")


@pytest.mark.slow
def test_bench(elmexport: Command, artifact: str) -> None:
    options = ("--repeat", "1", "--prompt", "16", "--depth", "0", "--generate", "2", "--json")
    (result,) = json.loads(elmexport("bench", artifact, *options))["artifacts"]
    assert (result["target"], result["engine"], result["quant"]) == ("toy", "toy engine", "int8")
    assert result["decode"][0]["bytes_per_token"] > 4 * 1_000_000


@pytest.mark.slow
def test_generate_from_the_artifact_and_from_its_file(elmexport: Command, artifact: str) -> None:
    texts = [elmexport("generate", path, "It was a dark", "--max-tokens", "8") for path in (artifact, f"{artifact}/model.toy")]
    assert texts[0] == texts[1] and len(texts[0].split()) > 2


@pytest.mark.slow
def test_without_its_package(elmexport: Command, artifact: str) -> None:
    """This process knows nothing of the format."""
    with pytest.raises(ElmExportError, match="target is 'toy', which nothing here knows; known: onnx, coreml, gguf"):
        Artifact.open(elmexport.folder / artifact)
