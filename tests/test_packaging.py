"""What is installed: the wheel that is built from the source distribution, the core without any extra, and the extras that errors name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from elmexport.evaluation.tasks import suite
from tests.cli.conftest import Run, run  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE_ONLY = """
import importlib.metadata as metadata, json, sys
from packaging.requirements import Requirement

def closure(requirements, found):
    for requirement in map(Requirement, requirements):
        name = normal(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            closure(metadata.requires(requirement.name) or (), found)
    return found

def normal(name):
    return name.lower().replace("_", "-").replace(".", "-")

core = closure(json.loads(sys.argv[1]), {"elmexport"})
hidden = {top for top, owners in metadata.packages_distributions().items() if not core & set(map(normal, owners))}

class Core:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *place):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, *place)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = list(map(Core, sys.meta_path))
import elmexport
from elmexport.cli.main import main
codes = {}
for command in sys.argv[2:]:
    try:
        main(command.split())
    except SystemExit as end:
        codes[command] = end.code or 0
print(json.dumps({"file": elmexport.__file__, "hidden": sorted(hidden), "codes": codes}))
"""


@pytest.mark.slow
def test_the_wheel_of_the_source_distribution_without_any_extra(tmp_path: Path) -> None:
    """Packages that only extras bring are hidden; an artifact is exported and run, and a text compared."""
    build = [sys.executable, "-m", "hatchling", "build", "--directory", str(tmp_path)]
    subprocess.run([*build, "--target", "sdist"], check=True, capture_output=True, cwd=ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    subprocess.run(["tar", "xzf", archive], check=True, cwd=tmp_path)
    subprocess.run(
        [*build, "--target", "wheel"], check=True, capture_output=True, cwd=archive.with_name(archive.name.removesuffix(".tar.gz"))
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")
    assert (tmp_path / "site" / "optimum" / "commands" / "register" / "register_elmexport.py").is_file()  # where optimum looks
    export = "coreml --model tiny --quant int4 --out a"  # as in README, checked by running the package
    text, tasks, drop = "eval a --tasks none --text-tokens 64", "eval a --limit 3", "onnx --max-drop 1 --out c"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "ELMEXPORT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", CORE_ONLY, json.dumps(PROJECT["dependencies"]), export, text, tasks, drop]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["codes"] == {export: 0, text: 0, tasks: 3, drop: 3}, done.stderr
    assert Path(found["file"]).is_relative_to(tmp_path / "site")
    assert {"lm_eval", "datasets", "sklearn", "pyarrow", "pandas", "scipy", "transformers"} <= set(found["hidden"])
    assert "self-check    KL divergence" in done.stdout
    assert done.stderr.count("pip install 'elmexport[eval]'") == 2
    assert not (tmp_path / "c").exists()


def test_tasks_without_lm_eval_are_refused_before_any_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    monkeypatch.setattr("elmexport.evaluation.evaluate.evaluated_artifact", work)
    monkeypatch.setattr("elmexport.exporting.open_checkpoint", work)
    run("eval", "somewhere").refused("pip install 'elmexport[eval]'", "--tasks none", code=3)
    run("eval", "somewhere", "--tasks", "one_that_only_lm_eval_knows").refused("pip install 'elmexport[eval]'", code=3)
    run("onnx", "--max-drop", "1").refused("pip install 'elmexport[eval]'", "--bits-per-weight", code=3)


def test_every_extra_that_a_message_names_is_one() -> None:
    sources = [path for package in ("elmexport", "targets", "calibration") for path in (ROOT / package).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"pip install 'elmexport\[(\w+)\]'", path.read_text(encoding="utf-8"))}
    assert named == {"eval", "ggml", "llama", "mlx", "sweep"}
    assert named <= set(PROJECT["optional-dependencies"])
