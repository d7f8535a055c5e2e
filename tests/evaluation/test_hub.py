"""Rows from a hub on loopback, with lm-eval's stock definitions. Each run is a process of its own: the libraries read their settings at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elmexport.models.openelm.catalog import TINY_FOLDER
from tests.evaluation.lm_eval_backend import ROWS
from tests.hub_server import HubServer

ARC = "datasets/allenai/ai2_arc"
SUPER_GLUE = "datasets/aps/super_glue"
NO_HUB = "http://127.0.0.1:9"  # a port that refuses


class Outcome(NamedTuple):
    code: int
    report: dict[str, Any]
    errors: str


class Client:
    """Runs `elmexport eval` on `tiny` in another process, with its own caches."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder, self.endpoint = folder, endpoint
        self.env: dict[str, str] = {}

    def eval(self, *arguments: str) -> Outcome:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
        env = {
            **kept,
            "HF_HOME": str(self.folder / "hf"),
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "ELMEXPORT_CACHE": str(self.folder / "answers"),
            **self.env,
        }
        command = [sys.executable, "-m", "elmexport", "eval", str(TINY_FOLDER), "--against", "none", "--text-tokens", "0", "--json"]
        done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=300)
        return Outcome(done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(tmp_path, hub.url)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROWS / name).read_text(encoding="utf-8").split("\n") if line]


def publish(hub: HubServer, folder: Path, repo: str, config: str, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Parquet files in folders by configuration and a card that lists them, as the hub has them."""
    (folder / config).mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, content in splits.items():
        pq.write_table(pa.Table.from_pylist(content), folder / config / f"{split}-00000-of-00001.parquet")
        lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
    hub.push(repo, folder)


@pytest.fixture
def arc(hub: HubServer, tmp_path: Path) -> None:
    train, test = rows("arc_easy.train.jsonl"), rows("arc_easy.test.jsonl")
    publish(hub, tmp_path / "arc", ARC, "ARC-Easy", {"train": train, "validation": train[:1], "test": test})


def figures(report: dict[str, Any], name: str) -> dict[str, Any]:
    """All that must not depend on where the rows come from."""
    task = report["tasks"][name]
    return {key: task[key] for key in ("acc", "n", "fewshot", "stderr", "items")} | {"acc_norm": task.get("acc_norm")}


@pytest.mark.slow
def test_arc_easy_from_the_hub_then_from_its_cache(hub: HubServer, client: Client, arc: None) -> None:
    arguments = ("--tasks", "arc_easy", "--fewshot", "2", "--limit", "3")
    from_hub = client.eval(*arguments)
    assert from_hub.code == 0, from_hub.errors
    assert from_hub.report["settings"]["data"] == "hub"
    local = client.eval(*arguments, "--data", str(ROWS))
    assert figures(from_hub.report, "arc_easy") == figures(local.report, "arc_easy")
    client.endpoint = NO_HUB
    assert figures(client.eval(*arguments).report, "arc_easy") == figures(local.report, "arc_easy")


@pytest.mark.slow
def test_boolq_is_part_of_super_glue(hub: HubServer, client: Client, tmp_path: Path) -> None:
    def as_on_hub(name: str) -> list[dict[str, Any]]:
        return [
            {"question": row["question"], "passage": row["passage"], "idx": i, "label": int(row["answer"])}
            for i, row in enumerate(rows(name))
        ]

    splits = {"train": as_on_hub("boolq.train.jsonl"), "validation": as_on_hub("boolq.validation.jsonl")}
    publish(hub, tmp_path / "glue", SUPER_GLUE, "boolq", splits | {"test": splits["validation"]})
    from_hub = client.eval("--tasks", "boolq")
    assert from_hub.code == 0, from_hub.errors
    assert figures(from_hub.report, "boolq") == figures(client.eval("--tasks", "boolq", "--data", str(ROWS)).report, "boolq")


@pytest.mark.slow
def test_no_network(client: Client) -> None:
    client.endpoint = NO_HUB
    outcome = client.eval("--tasks", "arc_easy")
    assert outcome.code == 3 and not outcome.report
    (line,) = outcome.errors.strip().splitlines()
    assert "cannot reach the hub for the data set allenai/ai2_arc" in line and "--data FOLDER" in line


@pytest.mark.slow
def test_offline(hub: HubServer, client: Client, arc: None) -> None:
    client.env["HF_HUB_OFFLINE"] = "1"
    outcome = client.eval("--tasks", "arc_easy")
    assert outcome.code == 3 and "HF_HUB_OFFLINE forbids downloading" in outcome.errors
    assert not hub.requests


@pytest.mark.slow
def test_a_data_set_that_the_hub_does_not_have(client: Client) -> None:
    outcome = client.eval("--tasks", "sciq")
    assert outcome.code == 2
    (line,) = outcome.errors.strip().splitlines()
    assert "'allenai/sciq' doesn't exist on the Hub" in line and "--data FOLDER" in line


@pytest.mark.slow
def test_an_interrupted_download_is_taken_up(hub: HubServer, client: Client, arc: None) -> None:
    name = "ARC-Easy/test-00000-of-00001.parquet"
    hub.cut[name] = [1000]
    outcome = client.eval("--tasks", "arc_easy")
    assert outcome.code == 0, outcome.errors
    assert not hub.cut[name] and len(hub.downloads(name)) > 1
    assert outcome.report["tasks"]["arc_easy"]["n"] == len(rows("arc_easy.test.jsonl"))


@pytest.mark.slow
def test_a_download_that_fails_for_good(hub: HubServer, client: Client, arc: None) -> None:
    name = "ARC-Easy/test-00000-of-00001.parquet"
    hub.cut[name] = [1000] * 100
    outcome = client.eval("--tasks", "arc_easy")
    assert outcome.code == 3 and "Traceback" not in outcome.errors
    assert "the data set allenai/ai2_arc could not be loaded from the hub" in outcome.errors and "run the command again" in outcome.errors
    hub.cut.clear()
    assert client.eval("--tasks", "arc_easy").code == 0
