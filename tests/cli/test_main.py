"""The program as a whole: what it lists, how it ends, what it imports."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from elmexport import __version__
from elmexport.cli.main import app
from elmexport.errors import ElmExportError, MissingDependencyError, VerificationError
from elmexport.formats import FORMATS, load
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.target import options
from tests.cli.conftest import Run

COMMANDS = (
    *(
        "onnx",
        "coreml",
        "gguf",
        "mlx",
        "calibrate",
        "eval",
        "report",
        "bench",
        "sweep",
        "models",
        "generate",
        "compare",
        "inspect",
        "push",
        "logits",
    ),
)
EXPORT = (
    "--model",
    "--quant",
    "--out",
    "--context",
    "--method",
    "--calibrate",
    "--tokens",
    "--bits-per-weight",
    "--max-drop",
    "--weights-from",
    "--save-weights",
    "--random-weights",
    "--tokenizer",
    "--revision",
    "--force",
    "--no-verify",
    "--json",
)
OPTIONS = dict.fromkeys(("onnx", "coreml", "gguf", "mlx"), EXPORT) | {
    "models": ("--json",),
    "calibrate": ("--model", "--text", "--dataset", "--tokens", "--window", "--hessian", "--out", "--imatrix", "--force", "--json"),
    "generate": (
        *("--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed", "--stop", "--tokenizer"),
        *("--prompts", "--prompt-lookup", "--ngram-size", "--draft-model", "--num-draft-tokens", "--chat", "--json"),
    ),
    "compare": ("--prompts", "--max-tokens", "--against", "--json"),
    "push": ("--report", "--private", "--force"),
    "inspect": ("--tensors", "--json"),
    "eval": (
        *("--tasks", "--preset", "--fewshot", "--limit", "--seed", "--against", "--data", "--text", "--text-tokens", "--tokenizer"),
        *("--max-drop", "--max-kl", "--max-ppl-ratio", "--baseline", "--report", "--junit", "--json"),
    ),
    "report": ("--out", "--tasks", "--preset", "--fewshot", "--limit", "--against", "--data", "--text", "--text-tokens", "--json"),
    "bench": ("--prompt", "--generate", "--depth", "--repeat", "--threads", "--prompt-lookup", "--draft-model", "--json"),
    "sweep": ("--out", "--workers", "--scheduler", "--retries", "--dry-run"),
    "logits": ("--ids-file", "--out"),
}
HEAVY = (
    "coremltools",
    "datasets",
    "gguf",
    "huggingface_hub",
    "lm_eval",
    "mlx",
    "mlx_lm",
    "numpy",
    "onnx",
    "onnxruntime",
    "rich",
    "sentencepiece",
    "tokenizers",
    "torch",
)


def test_help_lists_every_command_in_full(run: Run) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in outcome.out
    assert "..." not in outcome.out.split("Commands:")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(run: Run, command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert f"  elmexport {command}" in outcome.out.split("Example:")[1]
    for option in OPTIONS[command]:
        assert f"\n  {option} " in outcome.out


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help_fits_80_columns(run: Run, command: tuple[str, ...]) -> None:
    lines = run(*command, "--help").out.splitlines()
    assert lines and [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("option", ["--model", "--quant"])
@pytest.mark.parametrize("target", ["onnx", "gguf"])
def test_an_empty_option(run: Run, target: str, option: str) -> None:
    outcome = run(target, option, "")
    outcome.refused("int4" if option == "--quant" else "--model is empty; give one of tiny, tiny-moe, 270M")
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("onnx", "--out"),
        ("coreml", "--method", "gptq", "--save-weights"),
        ("calibrate", "--out"),
        ("calibrate", "--imatrix"),
        ("logits", TINY_FOLDER, "--ids-file", "ids.txt", "--out"),
        ("report", TINY_FOLDER, "--out"),
        ("eval", TINY_FOLDER, "--report"),
        ("eval", TINY_FOLDER, "--junit"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:1] + arguments[-1:])),
)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    run: Run, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    for name in (
        "elmexport.exporting.open_checkpoint",
        "calibration.calibrate.open_checkpoint",
        "elmexport.evaluation.evaluate.evaluated_artifact",
    ):
        monkeypatch.setattr(name, work)
    monkeypatch.setattr("elmexport.runtimes.open_artifact", work)
    Path("ids.txt").write_text("1 2")
    run(*arguments, "/proc/there.html").refused("cannot write", "/proc")  # where not even root can make a file


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from elmexport.cli.main import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print('imported:', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_alone_it_greets_with_three_commands(run: Run) -> None:
    outcome = run()
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    commands = [shlex.split(line) for line in lines if line.startswith("  elmexport ")]
    assert [name for _, name, *_ in commands] == ["coreml", "eval", "generate"]
    program: Any = typer.main.get_command(app)
    for _, name, *arguments in commands:
        program.get_command(None, name).make_context(name, arguments)  # parses; runs nothing


@pytest.mark.parametrize("target", ["onnx", "coreml", "gguf", "mlx"])
def test_options_of_an_export_are_in_groups(run: Run, target: str) -> None:
    page = run(target, "--help").out
    heads = re.findall(r"^(\w+):$", page, re.MULTILINE)
    assert heads == ["Model", "Quantization", "Output", "Format", "Options"]
    model, quantization, output, own, other = re.split(r"^(?:Model|Quantization|Output|Format|Options):$", page, flags=re.MULTILINE)[1:]
    assert "  --model " in model and "  --quant " in quantization and "  --out " in output
    assert own.count("\n  --") == len(options(load(FORMATS[target].target))) > 0
    assert re.findall(r"--\w+", other) == ["--help"]


def test_version(run: Run) -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.out) == (0, f"elmexport {__version__}\n")


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "elmexport", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"elmexport {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("onx",), "No such command 'onx'"),
        (("onnx", "--quantize", "int4"), "No such option"),
        (("onnx", "--context", "0"), "--context"),
        (("onnx", "--context", "many"), "--context"),
        (("onnx", "--calibrate", "always"), "--calibrate"),
        (("onnx", "--random-weights", "-1"), "--random-weights"),
        (("generate", "somewhere"), "prompt"),
    ],
)
def test_bad_use(run: Run, arguments: tuple[str, ...], message: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert message.casefold() in outcome.err.casefold()
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ElmExportError("what, allowed, fix"), 2),
        (VerificationError("what, allowed, fix"), 1),
        (MissingDependencyError("what, allowed, fix"), 3),
    ],
)
def test_an_error_is_one_line_and_its_code(run: Run, monkeypatch: pytest.MonkeyPatch, error: ElmExportError, code: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("elmexport.exporting.export", fail)
    outcome = run("onnx")
    assert (outcome.code, outcome.out, outcome.err) == (code, "", "error: what, allowed, fix\n")


@pytest.mark.parametrize("command", ["inspect {}", "generate {} Hello", "onnx --model {}", "onnx --tokenizer {}", "onnx --out {}"])
def test_a_name_that_the_file_system_refuses(run: Run, command: str) -> None:
    outcome = run(*command.format("x" * 5000).split())
    assert outcome.code == 2 and len(outcome.err) < 700
    assert outcome.err.startswith("error: ") and "name too long" in outcome.err and outcome.err.count("\n") == 1


def test_an_interrupt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("elmexport.exporting.export", interrupt)
    outcome = run("onnx")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
