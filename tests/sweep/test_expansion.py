"""Expansion: which cells a plan has, in which order, with which commands; what is left out and what is refused; what changes a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from elmexport.errors import ElmExportError
from elmexport.sweep.cell import Planned
from elmexport.sweep.expansion import Expansion
from elmexport.sweep.jobs import Kind
from tests.sweep.conftest import LEAST, Expand

RECIPE = """
name = "mine"
words = "everything int8"
activations = "fp32"
norms = "fp32"
scales = "fp16"
fallback = "fp16"
max_self_check_kl = 0.5
[[rule]]
scheme = "int8-block32"
"""


def labels(expansion: Expansion) -> list[str]:
    return [each.job.label.removeprefix("OpenELM-tiny ") for each in expansion.jobs]


def cells(expansion: Expansion) -> list[Planned]:
    return [each for each in expansion.jobs if each.job.kind is Kind.CELL]


def command(planned: Planned, step: int = 0) -> str:
    return " ".join(planned.job.steps[step].arguments)


def test_the_least_plan(expanded: Expand) -> None:
    found = expanded(LEAST)
    assert labels(found) == ["fp16 reference", "onnx int8 mse", "onnx int4 mse", "gguf int8 mse", "gguf int4 mse"]
    assert {each.after for each in cells(found)} == {found.jobs[0].job.key} and found.notes == ()
    assert len({each.job.key for each in found.jobs}) == 5
    first = cells(found)[0]
    assert command(first) == "-m elmexport onnx --model tiny --quant int8 --out OpenELM-tiny-onnx-int8"
    assert command(first, 1) == (
        "-m elmexport eval OpenELM-tiny-onnx-int8 --tasks cloze --text-tokens 8192 --limit 20 --report eval-1.json"
    )
    assert [step.name for step in first.job.steps] == ["export", "eval"]


def test_methods_share_what_they_compute(expanded: Expand) -> None:
    found = expanded(LEAST + 'methods = ["mse", "gptq", "awq", "awq+gptq"]\n')
    groups = {label: each.groups for label, each in zip(labels(found)[1:], cells(found), strict=True)}
    assert groups["onnx int4 mse"] == ()
    assert len(groups["onnx int4 gptq"]) == 1 and groups["onnx int4 gptq"] == groups["gguf int4 gptq"] != groups["gguf int8 gptq"]
    assert len(groups["onnx int8 awq"]) == 1 and groups["onnx int8 awq"] == groups["gguf int4 awq"]
    assert set(groups["onnx int4 awq+gptq"]) > set(groups["onnx int4 awq"])
    assert command(next(each for each in cells(found) if each.job.label.endswith("onnx int4 gptq"))).endswith("--method gptq")


def test_what_a_format_does_not_have_is_left_out_and_said(expanded: Expand) -> None:
    found = expanded('models = ["tiny"]\nformats = ["onnx", "gguf"]\nquants = ["int4", "q4_k_m", "fp16"]\nmethods = ["mse", "gptq"]')
    assert labels(found)[1:] == [
        *("onnx int4 mse", "onnx int4 gptq", "onnx fp16 mse"),
        *("gguf int4 mse", "gguf int4 gptq", "gguf q4_k_m mse", "gguf q4_k_m gptq", "gguf fp16 mse"),
    ]
    assert found.notes[0] == "q4_k_m is left out for onnx, which does not have it"
    assert "gptq is left out for fp16 of onnx, which has no codes to find" in found.notes


def test_settings_recipes_limits_texts_and_benchmarks(expanded: Expand, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(RECIPE)
    (tmp_path / "notes.txt").write_text("a text")
    found = expanded(
        'models = ["tiny"]\nformats = [{ format = "onnx", ops = "standard" }]\nquants = ["mine.toml"]\nmethods = ["gptq"]\ntokens = 2048\ncontext = 128\n'
        'tasks = ["cloze", "arc_easy"]\nlimit = 20\nlimits = { arc_easy = 5 }\ntexts = ["notes.txt"]\ntext_tokens = 512\n[bench]\nprompt = [8, 16]\ndepth = [0]\n'
    )
    (cell,) = cells(found)
    assert [step.name for step in cell.job.steps] == ["export", "eval", "eval 2", "bench"]
    assert command(cell) == (
        f"-m elmexport onnx --model tiny --quant {tmp_path}/mine.toml --out OpenELM-tiny-onnx-ops-standard-mine-gptq --method gptq "
        "--tokens 2048 --context 128 --ops standard"
    )
    assert f"--tasks cloze --text-tokens 512 --limit 20 --text {tmp_path}/notes.txt" in command(cell, 1)
    assert "--tasks arc_easy --text-tokens 0 --limit 5 --report eval-2.json" in command(cell, 2)
    assert command(cell, 3).endswith("--prompt 8,16 --depth 0 --repeat 1 --json")


def test_exclusions(expanded: Expand) -> None:
    found = expanded(
        LEAST + '[[exclude]]\nformat = "onnx"\nquant = ["int4"]\n[[exclude]]\nmodel = "tiny"\nformat = "gguf"\nquant = "int8"\n'
    )
    assert labels(found)[1:] == ["onnx int8 mse", "gguf int4 mse"]


def test_a_local_model_is_named_to_the_evaluation(expanded: Expand, tmp_path: Path) -> None:
    from elmexport.models import find_model

    known = find_model("tiny")
    assert known is not None and known.folder is not None
    (tmp_path / "mine").symlink_to(known.folder)
    found = expanded(LEAST.replace('"tiny"', '"./mine"'))
    folder = (tmp_path / "mine").resolve()
    assert f"--model {folder} " in command(cells(found)[0]) and f"--against {folder} " in command(cells(found)[0], 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("int8", "int9"), "no format of the plan has the quantization 'int9'; they have int4, int4-block64"),
        (('"gguf"', '"ggfu"'), "target is 'ggfu', which nothing here knows; known: onnx"),
        (('"gguf"', '{ format = "gguf", ops = "fast" }'), "gguf has no option ops; it has imatrix"),
        (('"gguf"', '{ ops = "fast" }'), "a table of formats lacks format"),
        (('"gguf"', '{ format = "gguf", imatrix = "gone.gguf" }'), "imatrix names gone.gguf, and there is no"),
        (('"gguf"', '{ format = "onnx", ops = "slow" }'), "--ops is 'slow'; choose fast or standard"),
        (('"gguf"', '{ format = "coreml", argmax = 1 }'), "argmax of coreml is 1; its default is False"),
        (('"tiny"', '"tinny"'), "unknown model 'tinny'. Did you mean tiny"),
        (('"gguf"', '{ format = "onnx", ops = "fast" }'), "OpenELM-tiny onnx int8 mse and OpenELM-tiny onnx ops=fast int8 mse are the same"),
        (('"tiny"', '{ model = "tiny", tokenizer = "none" }'), "tiny has no tokenizer to read tasks and texts with; name one"),
        (('"tiny"', '"tiny", "tiny"'), "models names 'OpenELM-tiny' twice"),
        (("int8", "gone.toml"), "quants names gone.toml, and there is no"),
        (('"cloze"', '"clozee"'), "no task is called 'clozee'"),
        (("limit = 20", "limits = { arc_easy = 3 }"), "limits names arc_easy, which is not among the tasks; they are cloze"),
        (("limit = 20", 'methods = ["gtpq"]'), "methods names 'gtpq'; known: mse, rtn, gptq"),
        (("limit = 20", "tokens = 10"), "tokens says how much of a text to read, and none of the methods reads one"),
        (("limit = 20", 'texts = ["gone.txt"]'), "texts names gone.txt, and there is no"),
        (("limit = 20", 'data = "gone"'), "data names gone, and there is no"),
        (("limit = 20", '[[exclude]]\nquant = "int5"'), "exclude[0] leaves nothing out"),
        (("limit = 20", '[[exclude]]\nmodel = "tiny"'), "leaves no cell"),
        (("limit = 20", "text_tokens = 0"), "text_tokens is 0, where a whole number of at least 1 belongs"),
        (('tasks = ["cloze"]', "tasks = []\ntexts = []"), "evaluates nothing: tasks and texts are empty, and there is no [bench]"),
        (("limit = 20", "[bench]\nprompt = [0]"), "--prompt is 0; it must be 1 or more"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_any_work(expanded: Expand, tmp_path: Path, change: tuple[str, str], said: str) -> None:
    with pytest.raises(ElmExportError) as error:
        expanded(LEAST.replace(*change))
    assert said in str(error.value), str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_model_that_a_format_cannot_hold_is_refused_with_the_lines_that_leave_it_out(expanded: Expand) -> None:
    plan = 'models = ["tiny", "tiny-moe"]\nformats = ["coreml"]\nquants = ["int4"]\n'
    with pytest.raises(ElmExportError) as error:
        expanded(plan)
    said = str(error.value)
    assert "tiny-moe as coreml int4: " in said
    lines = '[[exclude]] model = "tiny-moe", format = "coreml", quant = "int4"'
    assert said.endswith(lines)
    table, _, keys = lines.partition(" ")
    assert labels(expanded(f"{plan}{table}\n{keys.replace(', ', chr(10))}"))[1:] == ["coreml int4 mse"]


def test_a_method_that_a_scheme_does_not_have_is_refused_alone(expanded: Expand) -> None:
    plan = 'models = ["tiny"]\nformats = ["gguf"]\nquants = ["int4", "q5_0"]\nmethods = ["mse", "rtn"]\n'
    with pytest.raises(ElmExportError, match="tiny as gguf q5_0: --method rtn does not exist for ggml's Q6_K") as error:
        expanded(plan)
    lines = '[[exclude]] model = "tiny", format = "gguf", quant = "q5_0", method = "rtn"'
    assert str(error.value).endswith(lines)
    table, _, keys = lines.partition(" ")
    assert labels(expanded(f"{plan}{table}\n{keys.replace(', ', chr(10))}"))[1:] == ["gguf int4 mse", "gguf int4 rtn", "gguf q5_0 mse"]


def test_a_key_changes_with_what_determines_the_cell_and_with_nothing_else(
    expanded: Expand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text(RECIPE)
    (tmp_path / "notes.txt").write_text("a text")
    base = 'models = ["tiny"]\nformats = ["onnx"]\nquants = ["mine.toml"]\n'

    def key(text: str) -> str:
        return cells(expanded(text))[0].job.key

    same = {key(base), key(base), key(base + 'methods = ["mse"]\ntasks = ["cloze"]'), key(base.replace('["onnx"]', '["onnx", "gguf"]'))}
    assert len(same) == 1
    changed = [
        *(base + line for line in ("limit = 3", "seed = 1\nlimit = 400", "context = 128", 'texts = ["notes.txt"]', "text_tokens = 512")),
        *(base + line for line in ("tasks = []", "[bench]", 'calibrate = "none"', 'methods = ["rtn"]', 'calibrate = "notes.txt"')),
        *(base.replace('"onnx"', new) for new in ('"gguf"', '{ format = "onnx", ops = "standard" }')),
        base.replace("mine.toml", "int8"),
        base.replace('"tiny"', '"tiny-moe"'),
        base.replace('"tiny"', '{ model = "tiny", random_weights = 1 }'),
    ]
    found = [key(text) for text in changed]
    (tmp_path / "notes.txt").write_text("another text")
    found += [key(base + line) for line in ('texts = ["notes.txt"]', 'calibrate = "notes.txt"')]
    (tmp_path / "mine.toml").write_text(RECIPE.replace("int8", "int4"))
    found.append(key(base))
    monkeypatch.setattr("elmexport.sweep.cell.__version__", "99.0")
    found.append(key(base))
    assert len({*same, *found}) == len(found) + 1


def test_recipes_of_one_name_are_refused(expanded: Expand, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(RECIPE.replace("everything", name))
    with pytest.raises(ElmExportError, match="two cells are called OpenELM-tiny onnx mine mse; give the recipes different names"):
        expanded('models = ["tiny"]\nformats = ["onnx"]\nquants = ["a.toml", "b.toml"]')
