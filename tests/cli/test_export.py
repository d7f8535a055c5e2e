"""`elmexport onnx|coreml|gguf`: what is asked of the library, and what is printed."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from calibration.options import WeightOptions
from elmexport.artifact import Artifact, write_manifest
from elmexport.errors import ElmExportError
from elmexport.exporting import ExportResult
from elmexport.formats import FORMATS
from elmexport.manifest import Calibration, Fallback, SelfCheck
from elmexport.progress import SilentProgress
from elmexport.target import find_target, options
from tests.cli.conftest import Run
from tests.manifests import example_manifest


@pytest.fixture
def calls(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for the library: notes what it was asked, gives `artifact`."""
    asked: list[dict[str, Any]] = []

    def export(model: str, target: str, quant: str | None, **options: Any) -> ExportResult:
        asked.append({"model": model, "target": target, "quant": quant} | options)
        return ExportResult(artifact, Artifact.open(artifact).manifest, ("one thing to know",), has_tokenizer=True)

    monkeypatch.setattr("elmexport.exporting.export", export)
    return asked


def test_the_defaults(run: Run, calls: list[dict[str, Any]]) -> None:
    assert run("onnx").code == 0
    progress = calls[0].pop("progress")
    assert isinstance(progress, SilentProgress)
    assert calls == [
        {
            "model": "tiny",
            "target": "onnx",
            "quant": None,
            "out": None,
            "context": None,
            "weights": WeightOptions(),
            "verify": True,
            "force": False,
            "settings": {"ops": "fast"},
            "random_weights": None,
            "tokenizer": None,
            "revision": None,
            "adapter": None,
        }
    ]


def test_every_option(run: Run, calls: list[dict[str, Any]]) -> None:
    line = (
        "gguf --model 3B-Instruct --quant int8 --out here --context 512 --method gptq --calibrate text.txt --tokens 99 --bits-per-weight 4.5 "
        "--save-weights b.safetensors --random-weights 7 "
        "--tokenizer meta/llama --revision v1 --adapter lora --force --no-verify"
    )
    assert run(*line.split()).code == 0
    del calls[0]["progress"], calls[0]["settings"]
    assert calls == [
        {
            "model": "3B-Instruct",
            "target": "gguf",
            "quant": "int8",
            "out": Path("here"),
            "context": 512,
            "weights": WeightOptions("gptq", Path("text.txt"), 99, None, Path("b.safetensors"), 4.5),
            "verify": False,
            "force": True,
            "random_weights": 7,
            "tokenizer": "meta/llama",
            "revision": "v1",
            "adapter": Path("lora"),
        }
    ]


def test_options_that_exclude_those(run: Run, calls: list[dict[str, Any]]) -> None:
    assert run("onnx", "--weights-from", "a.safetensors").code == run("onnx", "--max-drop", "2").code == 0
    assert [call["weights"] for call in calls] == [WeightOptions(weights_from=Path("a.safetensors")), WeightOptions(max_drop=2)]
    outcome = run("onnx", "--weights-from", "a.safetensors", "--method", "gptq")
    assert outcome.code == 2 and "--weights-from brings the codes" in outcome.err and len(calls) == 2


@pytest.mark.usefixtures("calls")
def test_the_summary(run: Run, artifact: Path) -> None:
    outcome = run("coreml")
    assert outcome.err == "note: one thing to know\n"
    for fact in (
        "OpenELM-450M, 457,179,136 parameters (hub:apple/OpenELM-450M, revision 0a1b2c)",
        "int4: 4-bit blocks of 32",
        "1.50 MB, 4.75 bits per weight",
        "2,048 tokens",
        "KL divergence 0.0123 nats per token, top-1 agreement 93.8%, over 128 tokens of bundled prose",
        f'elmexport generate {artifact} "Once upon a time"',
    ):
        assert fact in outcome.out
    assert "residual scale" not in outcome.out


@pytest.mark.usefixtures("calls")
def test_the_summary_of_what_is_out_of_the_ordinary(run: Run, artifact: Path) -> None:
    unusual = example_manifest(
        alpha=0.0625,
        calibration=Calibration("measured", "bundled prose", 128, 12.5),
        fallbacks=(Fallback("a.weight", "rows of 5"),),
        self_check=SelfCheck(done=False, reason="not asked for"),
    )
    write_manifest(artifact, unusual)
    out = run("coreml").out
    assert "0.0625, so that fp16 cannot overflow (measured)" in out
    assert re.search(r"fallback +a.weight: rows of 5", out)
    assert re.search(r"self-check +not done: not asked for", out)


def test_no_text_is_suggested_without_a_tokenizer(run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = ExportResult(artifact, Artifact.open(artifact).manifest, (), has_tokenizer=False)
    monkeypatch.setattr("elmexport.exporting.export", lambda *_, **__: result)
    out = run("gguf").out
    assert out.endswith(f"Try it:\n  elmexport inspect {artifact}\n") and "elmexport generate" not in out


@pytest.mark.usefixtures("calls")
def test_json_is_one_document(run: Run, artifact: Path) -> None:
    outcome = run("onnx", "--json")
    assert json.loads(outcome.out) == {"path": str(artifact), **json.loads(Artifact.open(artifact).manifest.to_json())}
    assert outcome.err == "note: one thing to know\n"


@pytest.mark.parametrize("target", FORMATS)
def test_help_lists_the_target_s_quantizations(run: Run, target: str) -> None:
    kind = find_target(target)
    listed = run(target, "--help").out.split("--quant is one of")[1].split("Example:")[0]
    names = re.findall(r"^ {4}(\S+) +(\d+\.\d)  \S", listed, re.MULTILINE)
    assert [name for name, _ in names] == list(kind.quants)
    assert listed.count("(default)") == 1
    words = " ".join(listed.split())
    assert all(kind.stored_recipe(quant).words in words for quant in kind.quants)
    assert f"{kind.stored_recipe(kind.quants[0]).words} (default)" in words


@pytest.mark.parametrize(("target", "quant", "bits"), [("gguf", "q4_k_m", "5.1"), ("onnx", "fp16", "16.0"), ("coreml", "int4", "4.9")])
def test_help_says_how_large_a_quantization_is(run: Run, target: str, quant: str, bits: str) -> None:
    assert re.search(rf"^ {{4}}{quant} +{bits} ", run(target, "--help").out, re.MULTILINE)


def test_a_quantization_that_the_target_lacks(run: Run, tmp_path: Path) -> None:
    run("coreml", "--quant", "fp32").refused("--quant fp32 is not available for coreml: the Neural Engine computes in fp16")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_nobody_knows(run: Run, tmp_path: Path) -> None:
    run("onnx", "--model", "tinny").refused("tinny")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists(run: Run, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    run("onnx", "--out", "here").refused("here exists already; pass --force to replace it")


@pytest.mark.slow
@pytest.mark.parametrize("target", FORMATS)
def test_from_the_model_to_text(run: Run, target: str, tmp_path: Path) -> None:
    outcome = run(target, "--model", "tiny", "--quant", "int8", "--out", "out")
    assert outcome.code == 0, outcome.err
    assert "KL divergence" in outcome.out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run("inspect", "out").code == 0
    text = run("generate", "out", "It was a dark", "--max-tokens", "12")
    assert text.code == 0, text.err
    assert len(text.out.split()) > 3
    for bare in [path for path in Path("out").rglob("*") if path.suffix in FORMATS[target].suffixes]:
        assert run("generate", bare, "It was a dark", "--max-tokens", "12") == text
    run(target, "--quant", "int8", "--out", "out").refused("exists already")
    assert run(target, "--quant", "int8", "--out", "out", "--no-verify", "--force").code == 0


@pytest.mark.parametrize("target", FORMATS)
def test_every_setting_of_a_target_is_an_option_of_its_command(run: Run, target: str) -> None:
    kind = type(find_target(target))
    own = set(options(kind))
    assert own == {field.name for field in fields(kind)}  # type: ignore[arg-type]
    page = run(target, "--help").out
    assert all(f"\n  --{name.replace('_', '-')}" in page for name in own)


def test_settings_reach_the_library_as_plain_values(run: Run, calls: list[dict[str, Any]]) -> None:
    assert run("coreml", "--device", "gpu", "--argmax", "--max-package-mb", "7.5").code == 0
    settings = calls[0]["settings"]
    assert settings == {"device": "gpu", "kv": "state", "prefill": None, "argmax": True, "max_package_mb": 7.5}
    assert type(settings["device"]) is str


def test_a_choice_that_there_is_not(run: Run, tmp_path: Path) -> None:
    outcome = run("onnx", "--ops", "slow")
    assert outcome.code == 2 and "'slow' is not one of 'fast', 'standard'" in outcome.err
    with pytest.raises(ElmExportError, match="--ops is 'slow'; choose fast or standard"):
        find_target("onnx", {"ops": "slow"})
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_the_target_does_not_have_is_refused() -> None:
    with pytest.raises(ElmExportError, match="onnx has no setting 'colour'"):
        find_target("onnx", {"colour": "red"})


@pytest.mark.usefixtures("calls")
def test_quiet_prints_the_path_alone(run: Run, artifact: Path) -> None:
    outcome = run("onnx", "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{artifact}\n", "")
    assert json.loads(run("onnx", "--quiet", "--json").out)["path"] == str(artifact)


@pytest.mark.usefixtures("calls")
def test_verbose_says_how_long_it_took(run: Run) -> None:
    outcome = run("onnx", "--verbose")
    assert re.fullmatch(r" +\d+\.\d s  start\n +\d+\.\d s  in all\nnote: one thing to know\n", outcome.err)
    assert run("onnx", "--quiet", "--verbose").code == 2
