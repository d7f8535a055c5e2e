"""A manifest spoilt in every place: each command that reads one ends in an `ElmExportError`, never in another exception.

What the commands read with is called in this process; each case is one changed manifest of a real artifact.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elmexport.artifact import MANIFEST
from elmexport.bench.rounds import _subject
from elmexport.bench.workload import Workload
from elmexport.checkpoint.random import RandomCheckpoint
from elmexport.cli.describe import describe
from elmexport.errors import ElmExportError
from elmexport.evaluation.evaluated_model import evaluated_artifact, find_reference
from elmexport.formats import FORMATS
from elmexport.inspection import inspect_artifact
from elmexport.manifest import Chain, ChainedPackage, Joint, read_manifest
from elmexport.models.base import ModelConfig
from elmexport.runtimes import artifact_kind, open_artifact
from elmexport.runtimes.artifact_tokenizer import artifact_tokenizer
from targets.coreml.lint import lint
from tests.conftest import ExportTo
from tests.damage import Place, having, places, spoilt

READERS: dict[str, Callable[[Path], object]] = {
    "inspect": lambda path: describe(inspect_artifact(path, tensors=True).artifact),
    "eval, report, pytest plugin": lambda path: (evaluated_artifact(path), find_reference(path)),
    "bench": lambda path: _subject(path, Workload((4,), (), 1), ()),
    "generate": lambda path: artifact_tokenizer(artifact_kind(path), path),
    "logits": open_artifact,
    "lint": lint,
}
OPEN = {"config", "settings", "tools"}  # the keys in these are the model's and the target's own


@pytest.fixture(scope="module")
def artifact(small_config: ModelConfig, small_tokenizer: Path, export_to: ExportTo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that may be changed. Its model is found again by the seed; its manifest has every part that a manifest can have."""
    checkpoint = RandomCheckpoint(small_config, "small", 7)
    checkpoint.tokenizer_path = small_tokenizer
    path = export_to(checkpoint, "onnx", "fp16", verify=True)
    copy = Path(shutil.copytree(path, tmp_path_factory.mktemp("damaged") / path.name))
    document = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    package = ChainedPackage("a.mlpackage", (0, 1), 9, ("hidden",), ("hidden_out",), ())
    chain = Chain({"decode": 1}, (package,), (Joint(("a", "hidden_out"), ("b", "hidden")),))
    text = {"text": "bundled prose", "text_sha256": "0" * 64, "tokens": 128, "sequential": False}
    allocation = {"max_drop": 1.0, "task": "cloze", "items": 400, "drop": 0.5, "drop_interval": [0.1, 0.9], "detectable_drop": 2.0}
    allocation |= {"trials": [{"bits_per_weight": 4.5, "drop": 0.5}], "predicted_kl": 0.1, "measured_kl": 0.2, "text": "bundled prose"}
    document["quant"] |= {"calibration": text, "allocation": allocation}
    document["fallbacks"] = [{"tensor": "a.weight", "reason": "rows of 5"}]
    document["settings"]["imatrix"] = {"file": "imatrix.gguf", "sha256": "0" * 64}
    document["chain"] = chain
    whole = read_manifest(_dumps(document), "made here")
    (copy / MANIFEST).write_bytes(whole.to_json().encode())
    return copy


def _dumps(document: Any) -> bytes:
    import msgspec

    return json.dumps(document, default=msgspec.to_builtins).encode()


def _is_open(place: Place) -> bool:
    return any(key in OPEN for key in place[:-1])


def _unusable(text: bytes) -> bool:
    try:
        read_manifest(text, MANIFEST)
    except ElmExportError as error:
        assert str(error).startswith(MANIFEST) and str(error).count("\n") == 0 and len(str(error)) < 300, error
        return True
    return False


@pytest.mark.slow
def test_the_artifact_is_sound(artifact: Path) -> None:
    for name, read in READERS.items():
        if name == "lint":
            with pytest.raises(ElmExportError, match="is an artifact for onnx"):
                read(artifact)
        else:
            read(artifact)


@pytest.mark.slow
def test_every_key(artifact: Path) -> None:
    """What no manifest may hold is refused by every command; what one may hold (another text, another number) is read or refused."""
    sound = (artifact / MANIFEST).read_bytes()
    document = json.loads(sound)
    refused: Counter[Place] = Counter()
    for place in places(document):
        if _is_open(place):
            continue
        for words, spoiled in spoilt(document, place):
            text = _dumps(spoiled)
            if not _unusable(text):
                continue
            refused[place] += 1
            (artifact / MANIFEST).write_bytes(text)
            for name, read in READERS.items():
                with pytest.raises(ElmExportError):
                    print(f"{name} read {place}: {words}", read(artifact))
    (artifact / MANIFEST).write_bytes(sound)
    unharmed = [place for place in places(document) if not _is_open(place) and refused[place] < 8]
    assert not unharmed, unharmed


@pytest.mark.slow
def test_what_a_manifest_may_hold_but_is_wrong(artifact: Path) -> None:
    """Another text or number, anything at all in the model's configuration: read, or refused, and nothing else."""
    sound = (artifact / MANIFEST).read_bytes()
    document = json.loads(sound)
    cases = 0
    for place in places(document):
        if sum(isinstance(key, int) for key in place) and place[:2] == ("model", "config"):
            continue  # the list stands for its entries
        readers = ("inspect", "bench") if _is_open(place) else READERS
        for words, spoiled in spoilt(document, place):
            text = _dumps(spoiled)
            if _unusable(text):
                continue
            cases += 1
            (artifact / MANIFEST).write_bytes(text)
            for name in readers:
                try:
                    READERS[name](artifact)
                except ElmExportError:
                    continue
                except Exception as error:
                    pytest.fail(f"{name}: {'.'.join(map(str, place))}, {words}: {error!r}")
    (artifact / MANIFEST).write_bytes(sound)
    assert cases > 300


@pytest.mark.parametrize("target", [name for name in FORMATS if name != "onnx"])
def test_files_of_another_format(artifact: Path, target: str) -> None:
    sound = (artifact / MANIFEST).read_bytes()
    (artifact / MANIFEST).write_bytes(_dumps(having(json.loads(sound), ("target",), target)))
    for name in ("generate", "logits", "lint") if target == "gguf" else ("logits", "lint"):
        with pytest.raises(ElmExportError):
            READERS[name](artifact)
    (artifact / MANIFEST).write_bytes(sound)
