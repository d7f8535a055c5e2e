"""From the workers' answers to figures: arithmetic on made-up answers, and the structure of a real run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from elmexport.bench import Workload, benchmark
from elmexport.bench.bandwidth import read_bandwidth
from elmexport.bench.results import Summary, benchmark_schema
from elmexport.bench.rounds import EXECUTOR_NOTE, _Subject, summarize
from elmexport.bench.traffic import Traffic
from elmexport.bench.workload import PARTS
from elmexport.errors import ElmExportError, MissingDependencyError
from tests.conftest import SmallArtifact


def answer(prefill: dict[int, float], decode: dict[int, float], **facts: Any) -> dict[str, Any]:
    """A worker's answer as it comes out of JSON, whose keys are text."""
    default = {"engine": "onnxruntime", "context": 2048, "generate": 64, "load_s": 1.0, "before_bytes": 50, "peak_bytes": 100}
    return {**default, **facts, "prefill_s": {str(n): s for n, s in prefill.items()}, "decode_s": {str(n): s for n, s in decode.items()}}


def subject(name: str, traffic: Traffic | None = None) -> _Subject:
    return _Subject(Path(name), "onnx", "int4", 12345, traffic)


def test_summary() -> None:
    summary = Summary.of([3.0, 1.0, 2.0])
    assert (summary.median, summary.lowest, summary.highest, summary.runs) == (2.0, 1.0, 3.0, (3.0, 1.0, 2.0))
    assert summary.spread == 1.0


def test_rates_ratios_and_bandwidth() -> None:
    first = [answer({128: 2.0}, {0: 4.0, 1024: 8.0}), answer({128: 1.0}, {0: 2.0, 1024: 8.0}), answer({128: 4.0}, {0: 1.0, 1024: 8.0})]
    second = [answer({128: 1.0, 512: 2.0}, {0: 1.0}, load_s=load, peak_bytes=peak) for load, peak in ((1, 7), (2, 9), (6, 8))]
    one, two = summarize([subject("a", Traffic(1000, 10)), subject("b")], [first, second], 1e6)
    assert one.prefill[0].tokens_per_s.runs == (64, 128, 32)
    assert (one.prefill[0].tokens_per_s.median, one.prefill[0].ratio) == (64, 1)
    assert [(row.depth, row.tokens, row.tokens_per_s.median, row.ratio) for row in one.decode] == [(0, 64, 32, 1), (1024, 64, 8, 1)]
    assert one.decode[1].bytes_per_token == 1000 + 10 * (1024 + 32.5)
    assert one.decode[1].bandwidth_fraction == pytest.approx(8 * (1000 + 10 * 1056.5) / 1e6)
    assert [(row.tokens, row.ratio) for row in two.prefill] == [(128, 2), (512, None)]  # the first did not measure 512
    assert [(row.ratio, row.bytes_per_token, row.bandwidth_fraction) for row in two.decode] == [(2, None, None)]
    assert (two.load_s.median, two.peak_bytes.median, two.file_bytes, two.note) == (2, 8, 12345, None)


def test_generations_of_different_lengths_have_no_ratio() -> None:
    results = summarize([subject("a"), subject("b")], [[answer({}, {0: 1.0})], [answer({}, {0: 1.0}, generate=10)]], 1e6)
    assert [row.ratio for result in results for row in result.decode] == [1, None]


def test_the_executor_is_no_device() -> None:
    (result,) = summarize([subject("a")], [[answer({}, {0: 1.0}, engine="mil executor")]], 1e6)
    assert result.note == EXECUTOR_NOTE


def test_read_bandwidth_is_a_rate() -> None:
    assert read_bandwidth(2, size=1 << 16, passes=1) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"repeat": 0}, "repeat is 0"), ({"threads": 0}, "threads is 0")],
)
def test_counts(small_artifact: SmallArtifact, options: dict[str, int], message: str) -> None:
    with pytest.raises(ElmExportError, match=message):
        benchmark([small_artifact("onnx", "int4")], Workload(), **options)


def test_windows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(MissingDependencyError, match="run it on Linux or macOS"):
        benchmark([tmp_path], Workload())


def test_beyond_the_context_is_refused_before_any_work(small_artifact: SmallArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ElmExportError, match=r"64 tokens at depth 65 need a context of 129, and that of .* is 128"):
        benchmark([small_artifact("onnx", "int4")], Workload((128,), (65,)))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match="no such file or folder"):
        benchmark([tmp_path / "nowhere"], Workload())


def worker(path: Path, **job: Any) -> dict[str, Any]:
    job = {"path": str(path), "prompts": [5], "depths": [3], "generate": 2, "fit": []} | job
    done = subprocess.run(
        [sys.executable, "-m", "elmexport.bench.worker"], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_worker_s_error_is_an_answer(small_artifact: SmallArtifact, tmp_path: Path) -> None:
    path = next(small_artifact("onnx", "int4").glob("onnx/*.onnx"))
    found = worker(path, prompts=[129])  # a bare file: nobody knows its context before it is open
    assert (found["exit_code"], "a prompt of 129 tokens does not fit model_q4.onnx, whose context is 128" in found["error"]) == (2, True)
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    assert "cannot be opened" in worker(tmp_path / "broken.onnx")["error"]


def test_an_error_of_a_worker_is_raised_as_what_it_was(small_artifact: SmallArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"error": "no engine", "exit_code": 3})
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, f"{said}\n", ""))
    with pytest.raises(MissingDependencyError, match="no engine"):
        benchmark([small_artifact("onnx", "int4")], Workload(), fit=PARTS)


def test_a_process_that_is_killed(small_artifact: SmallArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9, "", "one\nlast words\n"))
    with pytest.raises(ElmExportError, match=r"ended with -9 \(it said: last words\).*memory ran out"):
        benchmark([small_artifact("onnx", "int4")], Workload(), fit=PARTS)


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(benchmark_schema())


@pytest.mark.slow
def test_a_run_of_three_engines(small_artifact: SmallArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elmexport.bench.rounds._BANDWIDTH_BYTES", 1 << 22)
    folders = [small_artifact(target, "int4") for target in ("onnx", "gguf", "coreml")]
    bare = next(folders[0].glob("onnx/*.onnx"))
    result = benchmark([*folders, bare], Workload((16, 96), (0, 64), 8), repeat=2, threads=1)
    document = json.loads(json.dumps(result.to_dict()))
    jsonschema.validate(document, benchmark_schema())
    assert [one.engine for one in result.artifacts] == ["onnxruntime", "llama.cpp", "mil executor", "onnxruntime"]
    assert [one.note for one in result.artifacts] == [None, None, EXECUTOR_NOTE, None]
    assert result.artifacts[0].file_bytes == sum(file.stat().st_size for file in folders[0].rglob("*") if file.is_file())
    assert result.artifacts[3].file_bytes == sum(file.stat().st_size for file in bare.parent.iterdir())
    for one in result.artifacts:
        assert [row.tokens for row in one.prefill] == [16, 96]
        assert [(row.depth, row.tokens) for row in one.decode] == [(0, 8), (64, 8)]
        assert all(len(row.tokens_per_s.runs) == 2 for row in (*one.prefill, *one.decode))
        assert one.before_bytes is None or one.peak_bytes.lowest > one.before_bytes
        assert (one.decode[0].bandwidth_fraction is None) == (one.path == str(bare))
