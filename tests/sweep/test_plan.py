"""Plans: what is read, and how mistakes are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from elmexport.errors import ElmExportError
from elmexport.sweep.plan import Benchmark, Exclusion, FormatChoice, ModelChoice, read_plan
from tests.sweep.conftest import LEAST

REST = 'formats = ["onnx"]\nquants = ["int4"]\n'


def test_the_least_form(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(LEAST)
    plan = read_plan(path)
    assert plan.model_choices() == [ModelChoice("tiny")] and plan.methods == ("mse",)
    assert plan.format_choices("") == [FormatChoice("onnx"), FormatChoice("gguf")]
    assert (plan.quants, plan.tasks, plan.limit, plan.texts, plan.bench) == (("int8", "int4"), ("cloze",), 20, ("bundled",), None)


def test_the_long_forms(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(
        'models = [{ model = "450M", random_weights = 3, tokenizer = "none" }]\nformats = ["gguf", { format = "coreml", device = "gpu" }]\n'
        'quants = ["int4", "mine.toml"]\n[bench]\nprompt = [8]\n[[exclude]]\nformat = ["coreml"]\nquant = "int4"\n'
    )
    plan = read_plan(path)
    assert plan.model_choices() == [ModelChoice("450M", tokenizer="none", random_weights=3)]
    assert plan.format_choices("")[1].label == "coreml device=gpu"
    assert plan.bench == Benchmark(prompt=(8,)) and plan.exclude == (Exclusion(format=("coreml",), quant="int4"),)
    exclusion = plan.exclude[0]
    assert exclusion.matches("m", "coreml", "int4", "mse") and not exclusion.matches("m", "coreml", "int8", "mse")
    assert not exclusion.matches("m", "gguf", "int4", "mse")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models = ", "not valid TOML"),
        ("models = " + "[" * 3000 + "]" * 3000, "not valid TOML"),
        ("", "lacks models"),
        ('models = "tiny"\n' + REST, "models is 'tiny', where a list belongs"),
        ('models = [{ model = "tiny", quant = "int4" }]\n' + REST, "models[0] holds 'quant', which does not belong there"),
        ('models = ["tiny"]\nlimit = 0\n' + REST, "limit is 0, where a whole number of at least 1 belongs"),
        ('models = ["tiny"]\nquantizations = []\n' + REST, "holds 'quantizations', which does not belong there; a plan has models, formats, quants"),
        ('models = ["tiny"]\nformats = ["onnx"]\nquants = ["int4", "int4"]', "quants names 'int4' twice"),
        ('models = ["tiny"]\n[bench]\nprompt = [-1]\n' + REST, "where"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(ElmExportError) as error:
        read_plan(path)
    assert said in str(error.value) and str(path) in str(error.value)


def test_no_plan(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"cannot read the plan .*: No such file or directory; give a TOML file"):
        read_plan(tmp_path / "plan.toml")
