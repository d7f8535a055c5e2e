from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elmexport.evaluation.store import AnswerStore
from tests.conftest import MadeOnce


def test_answers_survive(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    with AnswerStore(path) as store:
        assert store.get("loglikelihood", ("a", "b")) is None
        store.add_partial("loglikelihood", ("a", "b"), (-1.5, True))
        store.add_partial("generate_until", ("a", {"until": ["\n"], "max_gen_toks": 3}), "naïve")
    with AnswerStore(path) as store:
        assert store.get("loglikelihood", ("a", "b")) == [-1.5, True]
        assert store.get("generate_until", ("a", {"max_gen_toks": 3, "until": ["\n"]})) == "naïve"
        assert store.get("loglikelihood", ("a", "c")) is None


def test_half_a_line_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerStore(path) as store:
        store.add_partial("loglikelihood", ("a", "b"), (-1.0, False))
        store.add_partial("loglikelihood", ("a", "c"), (-2.0, False))
    path.write_bytes(path.read_bytes()[:-9])
    with AnswerStore(path) as store:
        assert store.get("loglikelihood", ("a", "b")) == [-1.0, False]
        assert store.get("loglikelihood", ("a", "c")) is None
        store.add_partial("loglikelihood", ("a", "d"), (-3.0, False))
    with AnswerStore(path) as store:
        assert store.get("loglikelihood", ("a", "d")) == [-3.0, False]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_ended(tiny_artifact: MadeOnce, tmp_path: Path) -> None:
    artifact = tiny_artifact("onnx", "int8")
    command = [
        sys.executable,
        "-m",
        "elmexport",
        "eval",
        str(artifact),
        "--limit",
        "100",
        "--text-tokens",
        "0",
        "--against",
        "none",
        "--json",
    ]

    def environment(name: str) -> dict[str, str]:
        return {**os.environ, "ELMEXPORT_CACHE": str(tmp_path / name)}

    def answers() -> list[bytes]:
        return [line for file in (tmp_path / "killed").rglob("*.jsonl") for line in file.read_bytes().split(b"\n") if line]

    process = subprocess.Popen(command, env=environment("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(answers()) < 40:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = answers()[:40]
    assert len(answers()) < 400
    again = subprocess.run(command, env=environment("killed"), capture_output=True, check=True)
    assert answers()[:40] == kept
    requests = [json.loads(line)["request"] for line in answers() if line.endswith(b"}")]
    assert len(requests) == len(set(requests)) == 400  # nothing was asked twice
    whole = subprocess.run(command, env=environment("whole"), capture_output=True, check=True)
    ours, theirs = (json.loads(run.stdout)["tasks"]["cloze"] for run in (again, whole))
    assert ours["acc"] == theirs["acc"]
    assert [item["id"] for item in ours["items"]] == [item["id"] for item in theirs["items"]]
    for mine, other in zip(ours["items"], theirs["items"], strict=True):
        assert mine["scores"] == pytest.approx(other["scores"], rel=1e-4)
