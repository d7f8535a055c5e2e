"""Pytest fixture for projects that ship artifacts: `elmexport_eval` evaluates one, and its result asserts what it may have cost.

    def test_quality(elmexport_eval):
        report = elmexport_eval("build/450M-coreml-int4", tasks=["arc_easy"], limit=200)
        report.assert_drop_below(2.0)
        report.assert_kl_below(0.05)

pytest loads this module at every start wherever elmexport is installed, so it imports nothing but pytest until the fixture is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from elmexport.evaluation.results import Report


class EvaluatedReport:
    """The report of an evaluation. `report` holds every figure; the assertions name the ones that matter in a test."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def assert_drop_below(self, points: float) -> None:
        """No task may drop by more than `points` percentage points."""
        self._assert(max_drop=points)

    def assert_kl_below(self, nats: float) -> None:
        """The mean KL divergence from the reference may not exceed `nats` per token."""
        self._assert(max_kl=nats)

    def assert_perplexity_ratio_below(self, ratio: float) -> None:
        """The perplexity may not exceed `ratio` times the reference's."""
        self._assert(max_ppl_ratio=ratio)

    def assert_no_regression(self, baseline: str | Path) -> None:
        """Nothing may be worse, beyond noise, than in the report stored in `baseline`."""
        from elmexport.evaluation.results import read_report

        self._assert(baseline=read_report(Path(baseline)))

    def _assert(self, *, baseline: Report | None = None, **limits: float) -> None:
        __tracebackhide__ = True
        from elmexport.evaluation.gates import Limits, check_gates

        failed = [gate.reason for gate in check_gates(self.report, Limits(**limits), baseline).gates if not gate.passed]
        if failed:
            pytest.fail("; ".join(failed), pytrace=False)


class Evaluate(Protocol):
    """Evaluates the artifact `path` as `elmexport eval` does; the options are its options."""

    def __call__(
        self,
        path: str | Path,
        *,
        tasks: Sequence[str] | Mapping[str, int | None] | None = None,  # or names with few-shot examples; None: the bundled cloze task
        limit: int | None = None,
        seed: int = 0,
        data: str | Path | None = None,
        text: str | Path | None = None,
        text_tokens: int | None = None,
        against: str | Path | None = "fp16",
        tokenizer: str | Path | None = None,
    ) -> EvaluatedReport: ...


@pytest.fixture(scope="session")
def elmexport_eval() -> Evaluate:
    """Fixture that evaluates an artifact: `elmexport_eval(path, tasks=["arc_easy"], limit=200)`.

    Bad input fails the test with the command's message.
    """

    def call(
        path: str | Path,
        *,
        tasks: Sequence[str] | Mapping[str, int | None] | None = None,
        limit: int | None = None,
        seed: int = 0,
        data: str | Path | None = None,
        text: str | Path | None = None,
        text_tokens: int | None = None,
        against: str | Path | None = "fp16",
        tokenizer: str | Path | None = None,
    ) -> EvaluatedReport:
        __tracebackhide__ = True
        from elmexport.errors import ElmExportError
        from elmexport.evaluation.evaluate import Settings, evaluate
        from elmexport.evaluation.tasks.presets import DEFAULT_TASK
        from elmexport.evaluation.windows import DEFAULT_TOKENS

        names = [DEFAULT_TASK] if tasks is None else tasks
        settings = Settings(
            tasks=dict(names) if isinstance(names, Mapping) else dict.fromkeys(names),
            limit=limit,
            seed=seed,
            data=_path(data),
            text=_path(text),
            text_tokens=DEFAULT_TOKENS if text_tokens is None else text_tokens,
        )
        try:
            report = evaluate(Path(path), settings, against=None if against is None else str(against), tokenizer=_path(tokenizer))
        except ElmExportError as error:
            pytest.fail(str(error), pytrace=False)
        return EvaluatedReport(report)

    return call


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)
