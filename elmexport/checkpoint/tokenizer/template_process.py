"""Rendering of chat templates in a process of its own, which is ended when it takes too long; see `template_worker`."""

from __future__ import annotations

import atexit
import contextlib
import json
import queue
import subprocess
import sys
import threading
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

SECONDS = 10.0  # of one prompt; Jinja2 makes one in some milliseconds


class TemplateFailure(Exception):
    """Failure of a template; the text says why."""


def render(template: str, variables: dict[str, Any], now: datetime, *, seconds: float = SECONDS) -> str:
    """Render a chat template with JSON values.

    Raises:
        TemplateFailure: the template fails, runs too long, or takes too much memory.
    """
    return _worker().render(template, variables, now, seconds)


@cache
def _worker() -> _Worker:
    worker = _Worker()
    atexit.register(worker.close)
    return worker


class _Worker:
    """The process, started when it is needed, and again after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()

    def render(self, template: str, variables: dict[str, Any], now: datetime, seconds: float) -> str:
        with self._lock:
            if self._process is None:
                self._start()
            assert self._process is not None and self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps({"template": template, "variables": variables, "now": now.isoformat()}) + "\n")
                self._process.stdin.flush()
                line = self._answers.get(timeout=seconds)
            except queue.Empty:
                self.close()
                raise TemplateFailure(f"it runs for more than {seconds:g} seconds") from None
            except OSError:
                line = ""
            except BaseException:  # Ctrl-C: an answer that comes later would be taken for the next one's
                self.close()
                raise
            if not line:
                self.close()
                raise TemplateFailure("it ended the process that renders it")
        answer = json.loads(line)
        if "error" in answer:
            raise TemplateFailure(answer["error"])
        text: str = answer["text"]
        return text

    def _start(self) -> None:
        self._answers = queue.Queue()
        command = [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
        )
        threading.Thread(target=_read, args=(self._process, self._answers), daemon=True).start()
        self._answers.get()  # that it is ready: its start is no part of a prompt's time

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


def _read(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError):  # closed
        for line in process.stdout:
            answers.put(line)
    answers.put("")
