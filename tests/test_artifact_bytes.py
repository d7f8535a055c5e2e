"""Bytes of `tiny` artifacts, every target and quantization, against recorded hashes: what an export writes changes on purpose only.

`python -m tests.test_artifact_bytes` records them anew; a change belongs in the changelog. Codes are rounded to nearest (tables come from
k-means), without calibration: nothing that depends on the order in which a processor adds. Not recorded: the manifest, which names versions
of packages, and the check script of Core ML artifacts.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from calibration.options import WeightOptions
from elmexport.exporting import export

RECORDED = Path(__file__).with_name("artifact_bytes.json")
UNRECORDED = ("manifest.json", "verify.py")
# Settings beside the defaults, and the quantizations that are exported with them.
SETTINGS: dict[str, list[tuple[dict[str, Any], tuple[str, ...] | None]]] = {
    "gguf": [({}, None), ({"split_max_size": "2M"}, ("int4",))],
    "onnx": [({}, None), ({"ops": "standard"}, ("int4", "int4-asym", "fp32"))],
    "coreml": [
        ({}, None),
        ({"device": "gpu"}, ("int4", "int8", "fp16")),
        ({"kv": "io", "argmax": True}, ("int4",)),
        ({"max_package_mb": 3.0}, ("int4",)),
    ],
    "mlx": [({}, None), ({"max_shard_size": "1M"}, ("int4",))],
}
QUANTS = {
    "gguf": ("int4", "int8", "fp16", "bf16", "fp32", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q6_k", "iq4_xs"),
    "onnx": ("int4", "int4-block64", "int4-block128", "int4-asym", "int4-all", "int8", "fp16", "fp32"),
    "coreml": ("int4", "int8", "lut4", "lut6", "lut8", "fp16"),
    "mlx": ("int4", "int4-group64", "int4-group128", "int4-asym", "int3", "int5", "int6", "int8", "mxfp4", "fp16", "bf16"),
}
CASES = [
    (target, quant, json.dumps(settings))
    for target, rows in SETTINGS.items()
    for settings, quants in rows
    for quant in quants or QUANTS[target]
]


def hashes(target: str, quant: str, settings: str, folder: Path) -> dict[str, str]:
    """SHA-256 by file of an export."""
    methods = {"method": "mse"} if quant.startswith("lut") or (target == "gguf" and quant not in ("int4", "int8")) else {"method": "rtn"}
    weights = WeightOptions(calibrate="none", **methods)  # type: ignore[arg-type]
    export("tiny", target, quant, out=folder, settings=json.loads(settings), weights=weights, verify=False)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNRECORDED)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(("target", "quant", "settings"), CASES)
def test_bytes_are_those_recorded(target: str, quant: str, settings: str, tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert hashes(target, quant, settings, tmp_path / "artifact") == recorded[f"{target} {quant} {settings}"]


def test_everything_recorded_is_exported() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert set(recorded) == {f"{target} {quant} {settings}" for target, quant, settings in CASES}


if __name__ == "__main__":
    found = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as temporary:
            found[" ".join(case)] = hashes(*case, Path(temporary) / "artifact")
    RECORDED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
