"""A sample of the kills and faults of the scripts beside this file; a hundred kills of each command where ELMEXPORT_ENDURANCE is set."""

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
    for name in ("export", "calibrate", "eval"):
        print(json.dumps(kills(name, corpus, {count}, 0)))
    for name, fault in (("export", "renames"), ("eval", "older cache"), ("calibrate", "clock set back")):
        print(json.dumps(inject(corpus, name, fault)))
"""


def test_killed_and_disturbed_commands_leave_nothing_half_done(tmp_path: Path) -> None:
    count = 100 if "ELMEXPORT_ENDURANCE" in os.environ else 4
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CODE.format(count=count)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    killed, disturbed = found[:3], found[3:]
    assert [row["kills"] for row in killed] == [count] * 3
    assert [row["largest difference"] for row in killed] == [0.0] * 3
    assert all(row["runs"] for row in disturbed) and len(disturbed) == 3
