"""JUnit XML of the gates, for CI systems to show as tests: a case for every gate, and one for the evaluation itself."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from elmexport.errors import ElmExportError
from elmexport.evaluation.results import Report

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 cannot hold


def junit_xml(report: Report) -> str:
    """Format the gates as one `testsuite` named after the artifact. A failed gate is a `failure` whose message is the gate's reason."""
    label = _clean(report.artifact.label)
    failures = sum(not gate.passed for gate in report.gates)
    counts = {
        "tests": str(1 + len(report.gates)),
        "failures": str(failures),
        "errors": "0",
        "skipped": "0",
        "time": f"{report.seconds:.3f}",
    }
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": f"elmexport.{label}", **counts})
    evaluation = {"classname": f"elmexport.{label}", "name": "evaluation", "time": f"{report.seconds:.3f}"}
    ElementTree.SubElement(ElementTree.SubElement(suite, "testcase", evaluation), "system-out").text = _clean(_summary(report))
    for gate in report.gates:
        name = gate.name if gate.task is None else f"{gate.name} {gate.task}"
        case = ElementTree.SubElement(suite, "testcase", {"classname": f"elmexport.{label}", "name": _clean(name), "time": "0.000"})
        if gate.passed:
            ElementTree.SubElement(case, "system-out").text = _clean(gate.reason)
        else:
            ElementTree.SubElement(case, "failure", {"type": gate.name, "message": _clean(gate.reason)}).text = _clean(gate.reason)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def write_junit(report: Report, path: Path) -> None:
    """Write the JUnit XML file.

    Raises:
        ElmExportError: the file cannot be written.
    """
    try:
        path.write_text(junit_xml(report), encoding="utf-8")
    except OSError as error:
        raise ElmExportError(f"cannot write {path}: {error.strerror or error}; choose another place") from None


def _summary(report: Report) -> str:
    lines = []
    for name, task in report.tasks.items():
        drop = None if task.comparison is None else task.comparison.drop
        lines.append(
            f"{name}: {task.metric} {task.metrics[task.metric]:.4g}, {task.n} items" + ("" if drop is None else f", drop {drop:.2f} points")
        )
    if report.kl is not None:
        lines.append(f"KL divergence: mean {report.kl.mean:.4g}, 99 % {report.kl.p99:.4g} nats per token")
    if report.perplexity is not None:
        ratio = report.perplexity.ratio
        lines.append(f"perplexity: {report.perplexity.value:.4f}" + ("" if ratio is None else f", {ratio:.4f} of the reference's"))
    return "\n".join(lines)


def _clean(text: str) -> str:
    return _UNPRINTABLE.sub("�", text)
