"""`examples/`: programs that run an artifact without elmexport. They say what `elmexport generate` says; what cannot run here is parsed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import elmexport
from elmexport.checkpoint.base import Checkpoint
from elmexport.contracts import coreml, coreml_gpu
from tests.clients.test_onnx_runtimes import TRANSFORMERS_JS, transformers_js
from tests.conftest import ExportTo
from tests.documentation.blocks import ROOT
from tests.documentation.syntax import syntax_error

EXAMPLES = ROOT / "examples"
PROMPT, COUNT = "The old captain looked at the sea", 12
SWIFT = sorted((EXAMPLES / "ios").rglob("*.swift"))
STRING = re.compile(r'"(\w+)"')

Said = Callable[[str], tuple[Path, str]]
__all__ = ["transformers_js"]  # a fixture


@pytest.fixture(scope="module")
def said(tiny: Checkpoint, export_to: ExportTo) -> Said:
    """`said("onnx")`: an int4 artifact of that format, and what elmexport says on from the prompt with it."""

    def call(target: str) -> tuple[Path, str]:
        path = export_to(tiny, target, "int4")
        with elmexport.open(path) as artifact:
            return path, artifact.generate(PROMPT, max_tokens=COUNT)

    return call


def output(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.removesuffix("\n")


@pytest.mark.slow
@pytest.mark.parametrize(("example", "target"), [("onnxruntime", "onnx"), ("llama_cpp", "gguf")])
def test_python_examples(said: Said, example: str, target: str) -> None:
    path, text = said(target)
    assert output(sys.executable, EXAMPLES / example / "generate.py", path, PROMPT, COUNT) == PROMPT + text


@pytest.mark.slow
def test_mlx_example(said: Said) -> None:
    """mlx-lm's text is the answer alone, without the space that begins it."""
    path, text = said("mlx")
    assert output(sys.executable, EXAMPLES / "mlx" / "generate.py", path, PROMPT, COUNT).strip() == text.strip()


@pytest.mark.slow
def test_node_example(said: Said, transformers_js: Path, tmp_path: Path) -> None:
    path, text = said("onnx")
    shutil.copy(EXAMPLES / "onnxruntime" / "generate.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(transformers_js / "node_modules")
    assert output("node", "generate.mjs", path, PROMPT, COUNT, cwd=tmp_path) == PROMPT + text


def test_node_example_asks_for_the_version_that_is_tested() -> None:
    package = json.loads((EXAMPLES / "onnxruntime" / "package.json").read_text(encoding="utf-8"))
    assert package["dependencies"] == {"@huggingface/transformers": TRANSFORMERS_JS}


def test_csharp_example_parses() -> None:
    source = (EXAMPLES / "onnxruntime" / "Generate.cs").read_text(encoding="utf-8")
    assert syntax_error("csharp", source) is None
    assert "NOT COMPILED" in source.splitlines()[4]


@pytest.mark.parametrize("path", SWIFT, ids=lambda path: path.name)
def test_swift_parses_and_says_that_it_was_not_compiled(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert syntax_error("swift", source) is None
    assert any("Not compiled" in line for line in source.splitlines()[:2])


@pytest.mark.parametrize(
    ("name", "sought"),
    [
        (
            "NeuralEngineModel",
            {coreml.PREFILL, coreml.DECODE, coreml.INPUT_IDS, coreml.POSITION, coreml.LAST_TOKEN},
        ),
        ("GPUModel", {coreml_gpu.INPUT_IDS, coreml_gpu.CAUSAL_MASK, coreml_gpu.LOGITS}),
    ],
)
def test_swift_uses_the_names_of_the_packages(name: str, sought: set[str]) -> None:
    source = (EXAMPLES / "ios" / "Sources" / "OpenELMChat" / f"{name}.swift").read_text(encoding="utf-8")
    code = re.sub(r"//.*", "", source)
    assert set(STRING.findall(code)) == sought


@pytest.mark.slow
@pytest.mark.parametrize("device", ["neural-engine", "gpu"])
def test_swift_reads_what_manifests_hold(tiny: Checkpoint, export_to: ExportTo, device: str) -> None:
    source = (EXAMPLES / "ios" / "Sources" / "OpenELMChat" / "LanguageModel.swift").read_text(encoding="utf-8")
    folder = export_to(tiny, "coreml", "int4", settings={"device": device})
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    settings = re.search(r"struct Settings: Decodable \{(.*?)\n    \}", source, re.DOTALL)
    assert settings is not None
    declared = re.findall(r"let (\w+): (\w+)", settings[1])
    swift = {"String": str, "Bool": bool}
    assert declared and all(type(manifest["settings"][name]) is swift[kind] for name, kind in declared)
    assert isinstance(manifest["context"], int) and manifest["settings"]["device"] == device
    assert manifest["settings"]["kv"] == "state"
    assert len(list(folder.glob("*.mlpackage"))) == 1 and (folder / "config.json").exists() and (folder / "tokenizer.json").exists()
