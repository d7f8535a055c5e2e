"""How the program ends early, as processes of its own: interrupts, closed pipes; and what it says to which terminal."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from elmexport.models.openelm.catalog import TINY_FOLDER
from tests.cli.conftest import Run
from tests.evaluation.report import examples


def heed_interrupts() -> None:
    """A test run in the background ignores Ctrl-C, as do its children unless told otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


PROGRAM = [sys.executable, "-m", "elmexport"]


@pytest.mark.parametrize("arguments", [["--help"], ["models"], ["onnx", "--help"]], ids=" ".join)
def test_a_reader_that_goes_away(arguments: list[str]) -> None:
    process = subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


@pytest.fixture
def stored(tmp_path: Path) -> str:
    """A report that was stored, to be printed again: the same tables as an evaluation's, without one."""
    path = tmp_path / "stored.json"
    path.write_text(examples.report().to_json(), encoding="utf-8")
    return str(path)


def test_a_report_into_a_pipe_that_is_closed(stored: str) -> None:
    """Rich, which draws it, would end the process with code 1."""
    command = [*PROGRAM, "report", stored]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word", "delay"),
    [(signal.SIGINT, 130, "interrupted", 0.0), (signal.SIGINT, 130, "interrupted", 0.5), (signal.SIGTERM, 143, "terminated", 0.0)],
    ids=["int", "int-later", "term"],
)
def test_an_export_that_is_ended(number: signal.Signals, code: int, word: str, delay: float, tmp_path: Path) -> None:
    """At once after it began to write, while coremltools may be on its way in, and later."""
    command = [*PROGRAM, "coreml", "--model", "tiny", "--calibrate", "none", "--out", str(tmp_path / "artifact")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    while process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out) == (code, ""), err
    assert err.splitlines()[-1] == f"{word}: nothing half-written was left; run the same command again"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_says_what_was_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("elmexport.evaluation.evaluate.evaluate", interrupt)
    outcome = run("eval", TINY_FOLDER)
    assert (outcome.code, outcome.err) == (130, "interrupted: answers so far are kept; the same command goes on from there\n")


# A module as coremltools has them: whatever happens while it imports something, it goes on without.
SWALLOWING = """
    import signal, sys
    from elmexport.cli.ending import clean_endings
    from elmexport.mil.coremltools_import import quiet_coremltools

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

    def swallow():
        try:
            signal.raise_signal(getattr(signal, sys.argv[1]))
            for _ in range(1000): pass
        except:
            print("swallowed")

    with clean_endings():
        try:
            with quiet_coremltools():
                swallow()
            print("went on")
        except KeyboardInterrupt as error:
            print("ended by", type(error).__name__)
"""


@pytest.mark.parametrize(("number", "name"), [("SIGINT", "Interrupted"), ("SIGTERM", "Terminated")])
def test_an_import_that_swallows_everything_does_not_lose_an_interrupt(number: str, name: str) -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(SWALLOWING), number], capture_output=True, text=True, check=True)
    assert done.stdout == f"ended by {name}\n"


# Where C calls Python, as llama.cpp does with its messages, no exception gets out.
CALLBACK = """
    import ctypes, signal, time
    from elmexport.cli.ending import clean_endings

    signal.signal(signal.SIGINT, signal.default_int_handler)

    @ctypes.CFUNCTYPE(None)
    def callback():
        signal.raise_signal(signal.SIGINT)

    with clean_endings():
        try:
            callback()
            time.sleep(10)
        except KeyboardInterrupt:
            print("ended")
"""


def test_an_interrupt_in_a_callback_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(CALLBACK)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("ended\n", "")


# As torch does where C++ asks a tensor for its shape: what Python raised meanwhile is replaced.
REPLACED = """
    import signal, sys
    import typer
    from elmexport.cli.ending import clean_endings, ended_early, go_on
    from elmexport.errors import ElmExportError

    signal.signal(signal.SIGINT, signal.default_int_handler)

    def read():
        try:
            signal.raise_signal(getattr(signal, sys.argv[1]))
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None

    try:
        with clean_endings(), ended_early(lambda: "onnx"):
            try:
                read()
            except ValueError as error:
                if sys.argv[2] == "answered":
                    go_on()
                raise ElmExportError(f"x.safetensors: {error}")
    except typer.Exit as end:
        sys.exit(end.exit_code)
"""


@pytest.mark.parametrize(("number", "word", "code"), [("SIGINT", "interrupted", 130), ("SIGTERM", "terminated", 143)])
def test_an_interrupt_that_c_code_turns_into_another_error(number: str, word: str, code: int) -> None:
    """It is neither a fault of the program nor of the file that was being read."""
    command = [sys.executable, "-c", textwrap.dedent(REPLACED), number, "unanswered"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, f"{word}: nothing half-written was left; run the same command again\n")


# The first one cannot be raised where it comes, so it comes again; by then the program is on its way out because of another.
TWICE = """
    import ctypes, signal, sys, time
    import typer
    from elmexport.cli.ending import clean_endings, ended_early

    signal.signal(signal.SIGINT, signal.default_int_handler)

    @ctypes.CFUNCTYPE(None)
    def callback():
        signal.raise_signal(signal.SIGINT)

    try:
        with clean_endings(), ended_early(lambda: "onnx"):
            callback()
            raise ValueError
    except typer.Exit as end:
        code = end.exit_code
    time.sleep(0.2)
    sys.exit(code)
"""


def test_an_interrupt_that_comes_again_when_all_is_said() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(TWICE)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted: nothing half-written was left; run the same command again\n")


# Python ends a process by SIGINT where a plain KeyboardInterrupt came through `exec` of a text: dataclasses and named tuples are made by it.
EXECUTED = """
    import signal, sys
    import typer
    from elmexport.cli.ending import clean_endings, ended_early

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with clean_endings(), ended_early(lambda: "onnx"):
            exec("signal.raise_signal(signal.SIGINT)")
    except typer.Exit as end:
        sys.exit(end.exit_code)
"""


def test_an_interrupt_while_a_class_is_made(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(EXECUTED))  # a module: Python looks at the mark at the end of `python -m` alone
    done = subprocess.run([sys.executable, "-m", "program"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted: nothing half-written was left; run the same command again\n")


def test_an_error_after_an_answered_interrupt_is_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(REPLACED), "SIGINT", "answered"], capture_output=True, text=True)
    assert "ElmExportError: x.safetensors: could not determine" in done.stderr and "interrupted" not in done.stderr


def terminal(arguments: list[str], **environment: str) -> bytes:
    """What a command writes to a terminal, both streams."""
    child, master = pty.fork()
    if not child:
        os.execve(sys.executable, [*PROGRAM, *arguments], {**os.environ, "TERM": "xterm-256color", **environment})
    written = b""
    try:
        while chunk := os.read(master, 65536):
            written += chunk
    except OSError:  # Linux says so when the last one on the terminal has gone
        pass
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, written
    return written


@pytest.mark.slow
def test_no_color(stored: str) -> None:
    styles = re.compile(rb"\x1b\[[0-9;]*m")
    assert styles.search(terminal(["report", stored], NO_COLOR=""))  # an empty one counts as none
    plain = terminal(["eval", str(TINY_FOLDER), "--limit", "2", "--text-tokens", "0", "--against", "none"], NO_COLOR="1")
    assert b"cloze" in plain and not styles.search(plain)


@pytest.mark.slow
@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "LANG": ""}], ids=str)
def test_text_in_the_plainest_locale(locale: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "PYTHONUTF8", "PYTHONIO"))}
    command = [*PROGRAM, "generate", str(TINY_FOLDER), "Où est “Zoë” ☃?", "--max-tokens", "4"]
    done = subprocess.run(command, capture_output=True, env=environment | locale)
    assert done.returncode == 0, done.stderr
    done.stdout.decode("utf-8")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    words = {"COMP_WORDS": "elmexport gen", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "elmexport gen"}
    environment = {**os.environ, **words, "_ELMEXPORT_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    code = "import sys; sys.argv = ['elmexport']; from elmexport.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "generate" in done.stdout, done
    script = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, "_ELMEXPORT_COMPLETE": f"source_{shell}"}
    )
    assert "elmexport" in script.stdout
