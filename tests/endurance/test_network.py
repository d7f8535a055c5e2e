"""No command contacts anybody unasked: a trace of the system calls of an evaluation shows no address but this machine's own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elmexport.checkpoint.base import Checkpoint
from tests.conftest import ExportTo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("strace") is None, reason="strace, which shows what is contacted, is not installed: apt-get install strace"
    ),
]

_ADDRESS = re.compile(r"sa_family=AF_INET6?.*?(?:inet_addr\(|inet_pton\(AF_INET6, )\"([^\"]+)\"")


def contacted(command: list[str], folder: Path) -> set[str]:
    """Addresses that the process, or one that it started, tried to reach. The environment is bare: onnxruntime is silent where CI is set."""
    trace = folder / "trace"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "ELMEXPORT_THREADS": "1",
    }
    traced = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(trace), *command]
    done = subprocess.run(traced, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return set(_ADDRESS.findall(trace.read_text(errors="replace")))


def test_the_trace_sees_what_is_contacted(tmp_path: Path) -> None:
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('203.0.113.7', 9))"
    assert contacted([sys.executable, "-c", code], tmp_path) == {"203.0.113.7"}


def test_an_evaluation_contacts_nobody(tiny: Checkpoint, export_to: ExportTo, tmp_path: Path) -> None:
    artifact = export_to(tiny, "onnx", "int4")
    command = [sys.executable, "-m", "elmexport", "eval", str(artifact), "--limit", "2", "--text-tokens", "64"]
    assert contacted(command, tmp_path) == set()
