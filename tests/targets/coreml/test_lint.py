from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from typer.testing import CliRunner

from benchmarks.coreml_stock import export_stock
from elmexport.checkpoint.base import Checkpoint
from elmexport.cli.main import app
from elmexport.errors import ElmExportError
from elmexport.models import known_models
from targets.coreml.lint import LintResult, lint
from targets.coreml.rules import RULES, Severity
from tests.conftest import ExportTo, MadeOnce
from tests.memory_checkpoint import MemoryCheckpoint
from tests.mil.packages import function, write_package
from tests.targets.coreml.hollow import hollow_package

CONFIGS = {model.alias: model.config for model in known_models()}


def rules(result: LintResult) -> set[str]:
    return {finding.rule.id for finding in result.findings}


def checked(tmp_path: Path, specs: dict[str, Any], build: Callable[..., Any]) -> LintResult:
    return lint(write_package(tmp_path / "m.mlpackage", {"main": function(specs, build)}))


def half(*shape: int | Any) -> Any:
    return mb.TensorSpec(shape, dtype=types.fp16)


def weight(*shape: int) -> Any:
    return np.ones(shape, np.float16)


def conv(x: Any, channels: int = 64) -> Any:
    return mb.conv(x=x, weight=weight(channels, x.shape[1], 1, 1))


# The Neural Engine's form -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ({"kv": "io"}, {"argmax": True}, {"prefill": 32}, {"max_package_mb": 2.0})
        ),
    ],
    ids=str,
)
def test_our_form_of_the_trained_model_has_no_finding(tiny: Checkpoint, export_to: ExportTo, settings: dict[str, Any]) -> None:
    result = lint(export_to(tiny, "coreml", "int4", settings=settings))
    assert len(result.packages) == (3 if "max_package_mb" in settings else 1)
    assert result.findings == ()
    assert {finding.operation for finding in result.edges} >= {"gather", "add"}  # of the embedding, the RoPE tables and the position


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "quant", "settings"),
    [
        ("270M", "int4", {}),
        ("3B", "int4", {"kv": "io", "argmax": True, "prefill": 512}),
        ("1.1B", "fp16", {}),
    ],
    ids=str,
)
def test_our_form_of_every_size_has_no_finding(
    size: str, quant: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = lint(hollow_package(tmp_path / size, CONFIGS[size], quant, monkeypatch, **settings))
    assert result.findings == ()
    assert len(result.packages) == {"fp16": 3, "lut6": 3}.get(quant, 2 if size == "3B" else 1)


@pytest.mark.slow
def test_the_form_for_gpus_has_findings(tiny: Checkpoint, export_to: ExportTo) -> None:
    result = lint(export_to(tiny, "coreml", "int4", settings={"device": "gpu"}))
    assert {"NE003", "NE102", "NE104"} <= rules(result)
    assert {"inputIds", "causalMask"} <= {finding.name for finding in result.findings if finding.rule.id == "NE003"}


@pytest.mark.slow
def test_the_stock_route_has_findings(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    config = small_checkpoint.config
    export_stock(small_checkpoint, tmp_path / "stock.mlpackage", prefill=32, context=64)
    result = lint(tmp_path / "stock.mlpackage")
    assert {"NE006", "NE102", "NE104"} <= rules(result)
    assert result.failed
    linear = [finding for finding in result.findings if finding.operation == "linear" and finding.function == "prefill"]
    assert len(linear) == 4 * config.num_transformer_layers + 1
    assert {finding.shape for finding in linear} >= {(1, 32, config.vocab_size)}


# Rules, one by one --------------------------------------------------------------------------------------------------------------------


def only(result: LintResult, rule: str) -> list[tuple[str, str, tuple[int | None, ...]]]:
    assert rules(result) == {rule}, result.findings
    return [(finding.operation, finding.function, finding.shape) for finding in result.findings]


def test_a_dimension_too_large(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        return conv(mb.relu(x=mb.concat(values=[conv(x, 16384), conv(x, 32)], axis=1)))

    found = only(checked(tmp_path, {"x": half(1, 64, 1, 32)}, build), "NE001")
    assert found == [("concat", "main", (1, 16416, 1, 32)), *[("relu", "main", (1, 16416, 1, 32))] * 2, ("conv", "main", (1, 64, 1, 32))]


def test_too_many_axes(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        y = mb.transpose(x=mb.reshape(x=conv(x), shape=[1, 2, 4, 8, 1, 32]), perm=[0, 2, 1, 3, 4, 5])
        return conv(mb.reshape(x=y, shape=[1, 64, 1, 32]))

    found = only(checked(tmp_path, {"x": half(1, 64, 1, 32)}, build), "NE002")
    assert {operation for operation, _, _ in found} == {"reshape", "transpose"}


def test_shapes_that_are_not_fixed(tmp_path: Path) -> None:
    size = ct.converters.mil.mil.get_new_symbol()
    result = checked(tmp_path, {"x": half(1, 64, 1, size)}, lambda x: conv(x))
    assert next((finding.operation, finding.name) for finding in result.findings if finding.rule.id == "NE003") == ("input", "x")
    assert rules(result) == {"NE003"}


def test_shapes_that_follow_from_values(tmp_path: Path) -> None:
    def build(x: Any, count: Any) -> Any:
        return conv(mb.slice_by_size(x=conv(x), begin=[0, 0, 0, 0], size=mb.concat(values=[np.int32([1, 64, 1]), count], axis=0)))

    result = checked(tmp_path, {"x": half(1, 64, 1, 32), "count": mb.TensorSpec((1,), dtype=types.int32)}, build)
    assert [finding.operation for finding in result.findings if finding.rule.id == "NE004"] == ["slice_by_size"]


def test_types_that_the_engine_does_not_have(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        wide = mb.cast(x=conv(x), dtype="fp32")
        return conv(mb.cast(x=mb.exp(x=wide), dtype="fp16"))

    assert [operation for operation, _, _ in only(checked(tmp_path, {"x": half(1, 64, 1, 32)}, build), "NE005")] == ["cast", "exp"]


def test_integers_before_all_work_are_no_finding(tmp_path: Path) -> None:
    def build(x: Any, position: Any) -> Any:
        angles = mb.gather(x=weight(128, 32), indices=mb.add(x=position, y=np.int32(1)), axis=0)
        return conv(mb.mul(x=conv(x), y=mb.reshape(x=angles, shape=[1, 1, 1, 32])))

    result = checked(tmp_path, {"x": half(1, 64, 1, 32), "position": mb.TensorSpec((1,), dtype=types.int32)}, build)
    assert result.findings == ()
    assert {finding.operation for finding in result.edges} == {"add", "gather"}


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.finfo(np.float32).min])
def test_infinite_constants(value: float, tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        mask = np.where(np.tri(32) > 0, 0, value).astype(np.float32 if np.isfinite(value) else np.float16)[None, None]
        return conv(mb.add(x=conv(x), y=mb.cast(x=mask, dtype="fp16")))

    found = only(checked(tmp_path, {"x": half(1, 64, 32, 32)}, build), "NE006")
    assert found[0] == ("const", "main", (1, 1, 32, 32))


def test_minus_40000_is_a_mask(tmp_path: Path) -> None:
    mask = np.where(np.tri(32) > 0, 0, -4e4).astype(np.float16)[None, None]
    assert checked(tmp_path, {"x": half(1, 64, 32, 32)}, lambda x: conv(mb.add(x=conv(x), y=mask))).findings == ()


@pytest.mark.parametrize("operation", ["gather", "gather_nd", "topk"])
def test_operations_without_a_path(operation: str, tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        y = conv(x)
        if operation == "topk":
            return conv(mb.topk(x=y, k=32, axis=3)[0])
        if operation == "gather":
            return conv(mb.gather(x=y, indices=np.arange(32, dtype=np.int32), axis=3))
        return conv(mb.gather_nd(x=y, indices=np.zeros((1, 1), np.int32)))

    result = checked(tmp_path, {"x": half(1, 64, 1, 32)}, build)
    assert operation in [finding.operation for finding in result.findings if finding.rule.id == "NE007"]


def test_arg_max(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        token = mb.reduce_argmax(x=conv(x, 4096), axis=1, keep_dims=True)
        return conv(mb.mul(x=conv(x), y=mb.cast(x=token, dtype="fp16")))

    found = [finding.operation for finding in checked(tmp_path, {"x": half(1, 64, 1, 32)}, build).findings if finding.rule.id == "NE008"]
    assert found == ["reduce_argmax"]


def test_wide_kernels(tmp_path: Path) -> None:
    found = only(
        checked(tmp_path, {"x": half(1, 64, 1, 64)}, lambda x: mb.conv(x=x, weight=weight(8, 64, 1, 17), pad_type="same")), "NE009"
    )
    assert found == [("conv", "main", (1, 8, 1, 64))]


def states(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {"x": half(1, 64, 1, 32)} | {name: mb.StateTensorSpec(shape, dtype=types.fp16) for name, shape in shapes.items()}


def with_states(x: Any, **given: Any) -> Any:
    for state in given.values():
        mb.coreml_update_state(state=state, value=mb.mul(x=mb.read_state(input=state), y=np.float16(2)))
    return conv(x)


def test_states(tmp_path: Path) -> None:
    found = only(checked(tmp_path, states(a=(1, 4, 32, 48)), with_states), "NE010")
    assert found == [("state", "main", (1, 4, 32, 48))]


def test_states_of_different_shapes(tmp_path: Path) -> None:
    found = only(checked(tmp_path, states(a=(1, 4, 32, 64), b=(1, 2, 32, 64)), with_states), "NE107")
    assert [shape for _, _, shape in found] == [(1, 4, 32, 64), (1, 2, 32, 64)]
    assert checked(tmp_path / "same", states(a=(1, 4, 32, 64), b=(1, 4, 32, 64)), with_states).findings == ()


def test_weight_files(tmp_path: Path) -> None:
    package = write_package(tmp_path / "m.mlpackage", {"main": function({"x": half(1, 64, 1, 32)}, lambda x: conv(x))})
    file = package / "Data/com.apple.CoreML/weights/weight.bin"
    for size, wanted in ((2**30, set()), (2**30 + 1, {"NE101"}), (2**31, {"NE101"}), (2**31 + 1, {"NE011"})):
        with file.open("r+b") as opened:
            opened.truncate(size)  # holes behind the weights
        assert rules(lint(package)) == wanted


def test_projections(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        y = mb.linear(x=x, weight=weight(64, 64))
        return mb.matmul(x=y, y=weight(64, 64))

    found = only(checked(tmp_path, {"x": half(1, 32, 64)}, build), "NE102")
    assert [operation for operation, _, _ in found] == ["linear", "matmul"]


def test_layout(tmp_path: Path) -> None:
    found = only(checked(tmp_path, {"x": half(1, 64, 32)}, lambda x: mb.conv(x=x, weight=weight(64, 64, 1))), "NE103")
    assert found == [("conv", "main", (1, 64, 32))]


def test_heads(tmp_path: Path) -> None:
    x = half(1, 4, 32, 64)
    found = only(checked(tmp_path, {"x": x}, lambda x: mb.matmul(x=x, y=x, transpose_y=True)), "NE104")
    assert found == [("matmul", "main", (1, 4, 32, 32))]
    one = half(1, 1, 128, 64)
    assert checked(tmp_path / "one", {"x": one}, lambda x: mb.matmul(x=x, y=x, transpose_y=True)).findings == ()


def test_padding(tmp_path: Path) -> None:
    # Sums over the last axis leave rows of one value, 64 bytes each: 16384 of them are 1 MiB, 65536 are 4.
    kept = checked(tmp_path / "kept", {"x": half(1, 16384, 1, 32)}, lambda x: mb.reduce_sum(x=x, axes=[3], keep_dims=True))
    assert "NE105" not in rules(kept)
    result = checked(tmp_path, {"x": half(1, 65536, 1, 32)}, lambda x: mb.reduce_sum(x=x, axes=[3], keep_dims=True))
    assert [(finding.operation, finding.shape) for finding in result.findings if finding.rule.id == "NE105"] == [
        ("reduce_sum", (1, 65536, 1, 1))
    ]


def test_alignment_of_inputs(tmp_path: Path) -> None:
    found = only(checked(tmp_path, {"x": half(1, 64, 1, 48)}, lambda x: mb.reshape(x=conv(x), shape=[1, 1, 48, 64])), "NE106")
    assert found == [("input", "main", (1, 64, 1, 48))]
    one_row = half(1, 1, 1, 48)
    assert checked(tmp_path / "row", {"x": one_row}, lambda x: mb.relu(x=x)).findings == ()


# The command, and what it cannot read ---------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["lint", *arguments])


def test_the_command(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        y = mb.linear(x=mb.linear(x=x, weight=weight(64, 64), name="first"), weight=weight(64, 64), name="second")
        return mb.linear(x=mb.gather(x=y, indices=np.arange(32, dtype=np.int32), axis=1, name="rows"), weight=weight(64, 64), name="last")

    package = write_package(tmp_path / "m.mlpackage", {"main": function({"x": half(1, 32, 64)}, build)})
    text = run(str(package))
    assert text.exit_code == 1
    assert re.search(r"^NE007 error: .*\n  https://github.com/hollance/", text.stdout, re.MULTILINE)
    assert re.search(r"main +linear +1x32x64 +first and 2 more", text.stdout)
    assert "m.mlpackage: 1 error, 3 warnings" in text.stdout

    document = json.loads(run(str(package), "--json").stdout)
    assert [(finding["rule"], finding["name"]) for finding in document["findings"] if finding["operation"] == "gather"] == [
        ("NE007", "rows")
    ]
    first = next(finding for finding in document["findings"] if finding["rule"] == "NE102")
    assert first == {
        "rule": "NE102",
        "title": "projections as 1x1 convolutions",
        "severity": "warning",
        "sources": list(next(rule for rule in RULES if rule.id == "NE102").sources),
        "package": "m.mlpackage",
        "function": "main",
        "operation": "linear",
        "name": "first",
        "shape": [1, 32, 64],
        "detail": "a 1x1 convolution does the same",
    }


def test_warnings_alone_do_not_fail(tmp_path: Path) -> None:
    package = write_package(
        tmp_path / "m.mlpackage", {"main": function({"x": half(1, 32, 64)}, lambda x: mb.linear(x=x, weight=weight(64, 64)))}
    )
    assert run(str(package)).exit_code == 0


def test_no_finding(tmp_path: Path) -> None:
    package = write_package(tmp_path / "m.mlpackage", {"main": function({"x": half(1, 64, 1, 32)}, lambda x: conv(x))})
    found = run(str(package))
    assert (found.exit_code, found.stdout) == (0, "m.mlpackage: no finding\n")


def test_what_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"does not exist; give an artifact folder or an \.mlpackage"):
        lint(tmp_path / "none")
    with pytest.raises(ElmExportError, match=r"holds no \.mlpackage; give an artifact folder"):
        lint(tmp_path)


@pytest.mark.slow
def test_an_artifact_of_another_target(tiny_artifact: MadeOnce) -> None:
    with pytest.raises(ElmExportError, match="is an artifact for onnx; the rules of the Neural Engine are for Core ML"):
        lint(tiny_artifact("onnx", "int4"))


def test_every_rule_has_an_id_a_source_and_one_check() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert sum(check is not None for check in (rule.operation, rule.constant, rule.function, rule.file)) == 1
        assert rule.sources and all(re.fullmatch(r"https://\S+", source) for source in rule.sources)
        assert rule.id.startswith("NE0") == (rule.severity is Severity.ERROR)


def test_the_documented_table_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[3] / "docs" / "coreml.md").read_text(encoding="utf-8")
    rows = [
        f"| {rule.id} | {rule.severity} | {'yes' if rule.edges or rule.operation is None else 'no'} | {rule.title} | "
        f"{', '.join(f'[{number}]({source})' for number, source in enumerate(rule.sources, 1))} |"
        for rule in RULES
    ]
    assert [line for line in text.splitlines() if line.startswith("| NE")] == rows
