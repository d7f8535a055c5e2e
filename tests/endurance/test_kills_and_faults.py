"""A sample of the kills and faults of the scripts beside this file; a hundred kills of each command where ELMEXPORT_ENDURANCE is set.

Kills of `calibrate` and `eval` are in `tests/calibration/test_resume.py` and `tests/evaluation/test_store.py` too, so the sample is of exports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and watched as on Linux")]

# In a process of its own, as it forks: a test's may have threads.
CODE = """
import json
from tests.endurance.faults import inject
from tests.endurance.kill import kills, prepared

with prepared(None) as corpus:
    for name in {commands}:
        print(json.dumps(kills(name, corpus, {count}, 0)))
    for name, fault in {faults}:
        print(json.dumps(inject(corpus, name, fault)))
"""
FAULTS = (
    *(("export", "older cache"), ("calibrate", "clock set back"), ("calibrate", "memory")),
    *(("eval", "older cache"), ("eval", "memory"), ("export", "renames")),
)


def test_killed_and_disturbed_commands_leave_nothing_half_done(tmp_path: Path) -> None:
    night = "ELMEXPORT_ENDURANCE" in os.environ
    commands, count, faults = (("export", "calibrate", "eval"), 100, FAULTS) if night else (("export",), 4, FAULTS[:3])
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    code = CODE.format(commands=commands, count=count, faults=faults)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    killed, disturbed = found[: len(commands)], found[len(commands) :]
    assert [row["kills"] for row in killed] == [count] * len(commands)
    assert all(row["largest difference"] == 0.0 for row in killed)
    assert all(row["runs"] for row in disturbed) and len(disturbed) == len(faults)
