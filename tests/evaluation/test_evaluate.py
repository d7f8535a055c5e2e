"""An evaluation from end to end, on the artifacts of `tiny`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.evaluation.evaluate import Settings, evaluate, evaluate_reference
from elmexport.evaluation.results import Report
from elmexport.models.openelm.catalog import TINY_FOLDER
from tests.conftest import ExportTo, MadeOnce
from tests.evaluation.lm_eval_backend import ROWS

TASKS: Mapping[str, int | None] = {"arc_easy": 0, "winogrande": 2, "crows_pairs_english": 0, "hellaswag": 0, "wikitext": None}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_engines_agree_item_by_item(tiny_artifact: MadeOnce) -> None:
    settings = Settings(TASKS, data=ROWS, text_tokens=0)
    paths = (TINY_FOLDER, tiny_artifact("onnx", "fp32"), tiny_artifact("gguf", "fp32"))
    torch, onnx, gguf = (evaluate(path, settings, against=None) for path in paths)
    assert [report.artifact.engine for report in (torch, onnx, gguf)] == ["torch", "onnxruntime", "llama.cpp"]
    for name, task in torch.tasks.items():
        for other in (onnx.tasks[name], gguf.tasks[name]):
            assert other.metrics == pytest.approx(task.metrics, rel=2e-3)
            for mine, theirs in zip(task.items, other.items, strict=True):
                assert (mine.id, mine.hash) == (theirs.id, theirs.hash)
                assert theirs.scores == pytest.approx(mine.scores, abs=0.02, rel=2e-4)
                if name != "wikitext":
                    assert theirs.metrics == pytest.approx(mine.metrics, abs=0.05)


@pytest.mark.slow
def test_a_reference_that_was_evaluated_before_serves_every_format(
    tiny: Checkpoint, export_to: ExportTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever kind of file the tokenizer comes from: SentencePiece's for the model, `tokenizer.json` for ONNX, the GGUF file's own."""
    artifacts = [export_to(tiny, "onnx", "int8"), export_to(tiny, "gguf", "int8")]
    settings = Settings({"cloze": None}, limit=4, text_tokens=128)
    alone = evaluate(artifacts[0], settings)
    monkeypatch.setenv("ELMEXPORT_CACHE", str(artifacts[0].parent / "another cache"))
    evaluate_reference(tiny, tiny.config.dims.context, settings)

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the reference was computed again")

    monkeypatch.setattr("elmexport.runtimes.torch.TorchRuntime.logits", refuse)
    found = [evaluate(artifact, settings) for artifact in artifacts]
    assert msgspec.structs.replace(found[0], seconds=alone.seconds) == alone
    assert found[1].reference == found[0].reference and found[1].kl is not None


@pytest.mark.slow
def test_report_and_second_run(tiny_artifact: MadeOnce, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = tiny_artifact("onnx", "int8")
    settings = Settings({"cloze": None, "piqa": 1}, limit=4, data=ROWS, text_tokens=512)
    notes: list[str] = []
    report = evaluate(artifact, settings, note=notes.append)
    assert Report.from_json(report.to_json(), "it") == report
    assert set(report.tasks) == {"cloze", "piqa"} and report.tasks["piqa"].fewshot == 1
    assert report.tasks["cloze"].n == 4 and report.tasks["cloze"].comparison is not None
    assert report.kl is not None and 0 < report.kl.mean < 0.05
    assert report.settings["notes"] == notes

    from elmexport.runtimes.torch import TorchRuntime

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the reference was computed again")

    monkeypatch.setattr(TorchRuntime, "_forward", refuse)
    again = evaluate(artifact, settings)
    assert {name: task.metrics for name, task in again.tasks.items()} == {name: task.metrics for name, task in report.tasks.items()}
    assert again.kl == report.kl


@pytest.mark.slow
def test_prompts_longer_than_the_context_are_noted(tiny: Checkpoint, export_to: ExportTo) -> None:
    notes: list[str] = []
    artifact = export_to(tiny, "onnx", "int8", context=64)
    evaluate(artifact, Settings({"boolq": 1}, data=ROWS, text_tokens=0), against=None, note=notes.append)
    assert any("longer than the context of 64 tokens" in note for note in notes)


@pytest.mark.slow
def test_unknown_task_and_missing_artifact(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match="no such file or folder"):
        evaluate(tmp_path / "absent")
    with pytest.raises(ElmExportError, match="did you mean piqa"):
        evaluate(TINY_FOLDER, Settings({"piqaa": None}, data=ROWS), against=None)


@pytest.mark.slow
def test_generated_answers_end_at_stop_strings(tiny: Checkpoint) -> None:
    from lm_eval.api.instance import Instance

    from elmexport.checkpoint.tokenizer import load_tokenizer
    from elmexport.evaluation.lm import RuntimeLM
    from elmexport.runtimes.torch import TorchRuntime

    assert tiny.tokenizer_path is not None
    lm = RuntimeLM(TorchRuntime(tiny), load_tokenizer(tiny.tokenizer_path))

    def ask(prompt: str, **settings: Any) -> str:
        return lm.generate_until([Instance("generate_until", {}, (prompt, settings), 0)])[0]

    free = ask("It was a dark night, and", max_gen_toks=24)
    assert len(free.split()) > 8
    stop = free[len(free) // 2 :][:3]
    assert ask("It was a dark night, and", max_gen_toks=24, until=[stop]) == free[: free.index(stop)]
    with pytest.raises(ElmExportError, match="only greedy decoding"):
        ask("It", do_sample=True)
    with pytest.raises(ElmExportError, match="generates up to 256 tokens, this artifact holds 256"):
        ask("It")


@pytest.mark.slow
def test_command_line(tiny_artifact: MadeOnce, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from elmexport.cli.main import main

    artifact = str(tiny_artifact("onnx", "int4"))
    arguments = ["eval", artifact, "--limit", "6", "--text-tokens", "512"]

    def run(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *more])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    page, baseline, junit = tmp_path / "page.html", tmp_path / "report.json", tmp_path / "gates.xml"
    code, out, _ = run("--json", "--report", str(page), "--report", str(baseline), "--max-kl", "1", "--junit", str(junit))
    assert code == 0
    assert json.loads(out)["tasks"]["cloze"]["n"] == 6
    assert page.stat().st_size and junit.stat().st_size
    assert run("--baseline", str(baseline))[0] == 0
    code, out, err = run("--max-kl", "1e-9")
    assert code == 1 and "KL divergence" in err and "cloze" in out
    code, _, err = run("--tasks", "cloze", "--preset", "zero-shot")
    assert code == 2 and "has no cloze" in err
    code, _, err = run("--report", str(tmp_path / "page.pdf"))
    assert code == 2 and ".html" in err


def test_answers_are_kept_for_what_gave_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another tokenizer with the same pieces, another beginning or end of texts, another version of the engine: asked anew."""
    from sentencepiece import sentencepiece_model_pb2

    from elmexport.checkpoint.tokenizer import ModelIds, load_tokenizer
    from elmexport.evaluation.evaluate import _store_name
    from elmexport.evaluation.evaluated_model import evaluated_artifact

    subject = evaluated_artifact(TINY_FOLDER).subject
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((TINY_FOLDER / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    changed = tmp_path / "tokenizer.model"
    changed.write_bytes(model.SerializeToString())
    own = load_tokenizer(TINY_FOLDER / "tokenizer.model")
    others = [load_tokenizer(changed), load_tokenizer(TINY_FOLDER / "tokenizer.model", ModelIds(1, (2, 5), 4096))]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    others.append(load_tokenizer(changed))
    assert others[0].pieces() == own.pieces()
    names = [_store_name(subject, 256, tokenizer.fingerprint()) for tokenizer in (own, *others)]
    assert names[0] == _store_name(subject, 256, load_tokenizer(TINY_FOLDER / "tokenizer.model").fingerprint())
    monkeypatch.setattr("elmexport.runtimes.version", lambda package: "99.0")
    names.append(_store_name(subject, 256, own.fingerprint()))
    assert len(set(names)) == 5
