"""`elmexport bench`: what it hands on, what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elmexport.bench import ArtifactResult, Benchmark, DecodeResult, Machine, PrefillResult, Summary, Workload
from tests.cli.conftest import Run


def result(*artifacts: ArtifactResult) -> Benchmark:
    machine = Machine("Linux", 4, "3.12", {"torch": "2", "onnxruntime": None})
    return Benchmark(machine, 2, 3, Summary.of([2e10, 1.8e10, 2.2e10]), artifacts)


def measured(name: str, note: str | None = None) -> ArtifactResult:
    rate = Summary.of([90.0, 100.0, 110.0])
    prefill = (PrefillResult(128, rate, 1.25),)
    decode = (DecodeResult(0, 64, rate, 0.5, 1e8, 0.456), DecodeResult(1024, 64, rate, None, None, None))
    memory, load = Summary.of([1.5e9]), Summary.of([0.333])
    return ArtifactResult(name, name, "onnx", "onnxruntime", "int4", 2048, 240_000_000, load, 1, memory, prefill, decode, note)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of the library's `benchmark`, which is not run."""
    made: list[tuple[Any, ...]] = []

    def benchmark(paths: list[Path], workload: Workload, *, progress: Any, **options: Any) -> Benchmark:
        made.append((paths, workload, options))
        return result(measured("one"), measured("two", "no device"))

    monkeypatch.setattr("elmexport.bench.benchmark", benchmark)
    return made


def test_defaults(run: Run, calls: list[tuple[Any, ...]]) -> None:
    assert run("bench", "a", "b").code == 0
    assert calls == [
        (
            [Path("a"), Path("b")],
            Workload((128, 512), (0, 1024), 64),
            {"repeat": 3, "threads": None, "fit": ["prompts", "depths", "generate"], "guesses": None},
        )
    ]


def test_options(run: Run, calls: list[tuple[Any, ...]]) -> None:
    run("bench", "a", "--prompt", "5, 7", "--generate", "3", "--depth", "none", "--repeat", "9", "--threads", "2")
    assert calls == [([Path("a")], Workload((5, 7), (), 3), {"repeat": 9, "threads": 2, "fit": [], "guesses": None})]


def test_what_is_not_given_is_cut_to_what_fits(run: Run, calls: list[tuple[Any, ...]]) -> None:
    run("bench", "a", "--depth", "5")
    assert calls[0][2]["fit"] == ["prompts", "generate"]


@pytest.mark.usefixtures("calls")
def test_table(run: Run) -> None:
    outcome = run("bench", "a", "b")
    lines = outcome.out.splitlines()
    assert "read bandwidth 20.00 GB/s (spread 20%)" in lines
    assert "one       onnxruntime  240.00 MB    0.33      1.50 GB" in lines
    assert "prefill 128        one          100.0     20%   1.25" in lines
    assert "decode 64 at 0     two          100.0     20%   0.50        46%" in lines
    assert "decode 64 at 1024  two          100.0     20%      -" in lines
    assert outcome.err == "note: two: no device\n"
    assert "guesses" not in outcome.out  # none were asked for


@pytest.mark.usefixtures("calls")
def test_json_is_one_document(run: Run) -> None:
    outcome = run("bench", "a", "b", "--json")
    assert json.loads(outcome.out) == json.loads(json.dumps(result(measured("one"), measured("two", "no device")).to_dict()))
    assert outcome.err == ""


@pytest.mark.parametrize("value", ["many", "1,,2", "-1", "1.5", ""])
def test_no_numbers(run: Run, value: str) -> None:
    run("bench", "a", "--prompt", value).refused(f"--prompt is {value!r}; it takes whole numbers of tokens")


def test_nothing_there(run: Run) -> None:
    run("bench", "nowhere").refused("nowhere: no such file or folder")
