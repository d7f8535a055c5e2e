"""Whole exports that do not come to their end: a disk that fills up, a process that is killed. Nothing may look finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibration.options import WeightOptions
from elmexport.errors import ElmExportError
from elmexport.exporting import export
from elmexport.runtimes import open_artifact

pytestmark = pytest.mark.slow

TARGETS = ("onnx", "coreml", "gguf", "mlx")

# For each target, an export without a limit, then with the largest file cut at several places; the system refuses what goes beyond, as a full
# disk does.
FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
from calibration.options import WeightOptions
from elmexport.errors import ElmExportError
from elmexport.exporting import export

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
weights = WeightOptions(calibrate="none")

def attempt(target, out):
    try:
        return export("tiny", target, "int4", out=out, weights=weights, verify=False).path
    except ElmExportError as error:
        return str(error)

found = {}
for target in sys.argv[2:]:
    out = Path(sys.argv[1], target, "artifact")
    out.parent.mkdir()
    whole = attempt(target, out)
    size = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    whole.rename(out.with_name("whole"))
    found[target] = {}
    for limit in (100, size // 3, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        message = attempt(target, out)
        found[target][limit] = [str(message), sorted(path.name for path in out.parent.iterdir())]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(found))
"""


def test_full_disk(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path), *TARGETS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == list(TARGETS)
    for target, cases in found.items():
        assert len(cases) == 3
        for limit, (message, left) in cases.items():
            assert message.startswith(f"cannot write {tmp_path}/{target}/artifact: "), f"{target}, {limit} bytes: {message}"
            assert left == ["whole"], f"{target}, {limit} bytes: {left}"


@pytest.mark.parametrize("target", TARGETS)
def test_kill(target: str, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    command = [sys.executable, "-m", "elmexport", target, "--model", "tiny", "--quant", "int4", "--calibrate", "none", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(path.is_file() for path in tmp_path.rglob("*")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".artifact.partial-") and left.name.endswith(f"-{process.pid}")
    for path in (out, *tmp_path.iterdir()):
        with pytest.raises(ElmExportError):
            open_artifact(path)

    export("tiny", target, "int4", out=out, weights=WeightOptions(calibrate="none"), verify=False)  # the next one cleans up
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
