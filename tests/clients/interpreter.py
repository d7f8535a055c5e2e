"""Python process that runs many small programs: what a program imports, which takes seconds with the large libraries, stays imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_LOOP = """
import contextlib, io, json, os, sys, traceback
answers = os.fdopen(int(sys.argv[1]), "w")
for line in sys.stdin:
    job = json.loads(line)
    sys.argv = ["-c", *job["arguments"]]
    os.chdir(job["folder"])
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(job["program"], {"__name__": "__main__"})
        answer = {"printed": printed.getvalue()}
    except SystemExit as end:
        answer = {"error": f"exit status {end.code}"} if end.code else {"printed": printed.getvalue()}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    answers.write(json.dumps(answer) + "\\n")
    answers.flush()
"""


class Interpreter:
    """Python process without anything of ours; `close` ends it."""

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        """What programs and libraries write to stderr goes into the file `log`. `environment`: this process's own where None."""
        answers, theirs = os.pipe()
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LOOP, str(theirs)],
                stdin=subprocess.PIPE,
                stderr=stderr,
                text=True,
                pass_fds=[theirs],
                cwd=log.parent,
                env=environment,
            )
        os.close(theirs)
        self._answers, self._log = os.fdopen(answers), log

    def run(self, program: str, *arguments: str | Path, folder: Path) -> str:
        """Run `program` in `folder` with `arguments` as `sys.argv[1:]`; returns what it printed, fails with its traceback where it failed."""
        assert self._process.stdin is not None
        job = {"program": program, "arguments": [str(argument) for argument in arguments], "folder": str(folder)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._answers.readline()
        assert line, f"the process ended: {self._log.read_text(errors='replace')[-2000:]}"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return str(answer["printed"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._answers.close()
