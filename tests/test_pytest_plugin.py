"""The fixture that other projects use, in a project of theirs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from elmexport.evaluation.gates import Limits, check_gates
from elmexport.pytest_plugin import EvaluatedReport
from tests.conftest import MadeOnce
from tests.evaluation.examples import example_report

pytest_plugins = ["pytester"]


def test_the_plugin_is_announced() -> None:
    assert [entry.value for entry in entry_points(group="pytest11", name="elmexport")] == ["elmexport.pytest_plugin"]


def test_it_costs_nothing_at_start() -> None:
    code = "import json, sys, elmexport.pytest_plugin; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert {name.split(".")[0] for name in loaded}.isdisjoint({"torch", "numpy", "lm_eval", "onnx", "coremltools", "transformers", "typer"})
    assert [name for name in loaded if name.startswith("elmexport")] == ["elmexport", "elmexport.pytest_plugin"]


def test_assertions_are_those_of_the_gates(tmp_path: Path) -> None:
    report = example_report()
    found = EvaluatedReport(report)
    found.assert_drop_below(50.0)
    found.assert_kl_below(0.01)
    found.assert_perplexity_ratio_below(1.03)
    (gate,) = check_gates(report, Limits(max_drop=49.0)).gates
    with pytest.raises(pytest.fail.Exception) as failure:
        found.assert_drop_below(49.0)
    assert failure.value.msg == gate.reason
    with pytest.raises(pytest.fail.Exception, match=r"mean KL divergence 0\.01 nats per token, 0\.001 allowed"):
        found.assert_kl_below(0.001)
    with pytest.raises(pytest.fail.Exception, match=r"perplexity is 1\.0238"):
        found.assert_perplexity_ratio_below(1.0)
    (tmp_path / "baseline.json").write_text(report.to_json(), encoding="utf-8")
    found.assert_no_regression(tmp_path / "baseline.json")


@pytest.mark.slow
def test_a_project_guards_its_artifact(tiny_artifact: MadeOnce, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = tiny_artifact("onnx", "int4")
    monkeypatch.setenv("ELMEXPORT_CACHE", str(pytester.path / "cache"))
    pytester.makepyfile(f"""
        import pytest

        ARTIFACT = {str(artifact)!r}

        @pytest.fixture(scope="module")
        def evaluated(elmexport_eval):
            return elmexport_eval(ARTIFACT, tasks=["cloze"], limit=10)

        def test_quality(evaluated):
            assert evaluated.report.tasks["cloze"].n == 10
            evaluated.assert_drop_below(20.0)
            evaluated.assert_kl_below(0.05)

        def test_too_much(evaluated):
            evaluated.assert_kl_below(1e-6)

        def test_no_artifact(elmexport_eval):
            elmexport_eval("nowhere")
    """)
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*mean KL divergence * nats per token, 1e-06 allowed*", "*nowhere: no such file or folder*"])
