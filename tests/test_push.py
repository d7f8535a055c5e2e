"""Model cards, and uploads to a hub on loopback, each in a process of its own: the library reads its settings at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from elmexport.artifact import Artifact
from elmexport.card import model_card
from elmexport.checkpoint.base import Checkpoint
from elmexport.models import find_model
from elmexport.target import Usage
from tests.conftest import ExportTo
from tests.hub_server import HubServer
from tests.manifests import example_manifest

REPO = "me/OpenELM-tiny"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.tokens.add("writer")
        yield server


@pytest.fixture(scope="module")
def artifact(tiny: Checkpoint, export_to: ExportTo) -> Path:
    return export_to(tiny, "mlx", "int4", verify=True)


def push(hub: HubServer, home: Path, *arguments: object, token: str | None = "writer") -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    environment = kept | {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    if token is not None:
        environment["HF_TOKEN"] = token
    return subprocess.run(
        [sys.executable, "-m", "elmexport", "push", *map(str, arguments)], env=environment, capture_output=True, text=True
    )


def files(hub: HubServer) -> dict[str, bytes]:
    repo = hub.repos[REPO]
    return repo.commits[repo.branches["main"]]


@pytest.mark.slow
def test_upload_and_refusal(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    done = push(hub, tmp_path, artifact, REPO)
    assert (done.returncode, done.stdout.strip()) == (0, f"{hub.url}/{REPO}"), done.stderr
    stored = {path.relative_to(artifact).as_posix(): path.read_bytes() for path in artifact.rglob("*") if path.is_file()}
    assert files(hub) == stored and any(len(content) > 1 << 16 for content in stored.values())  # a large file goes another way

    again = push(hub, tmp_path, artifact, REPO)
    assert again.returncode == 2 and "already; pass --force to replace files" in again.stderr
    hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["README.md"] = b"mine"
    assert push(hub, tmp_path, artifact, REPO).returncode == 2 and files(hub)["README.md"] == b"mine"
    assert push(hub, tmp_path, artifact, REPO, "--force").returncode == 0 and files(hub) == stored


@pytest.mark.slow
def test_figures_of_a_report(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "elmexport", "eval", str(artifact), "--limit", "5", "--text-tokens", "64", "--report", str(report)]
    subprocess.run(command, check=True, capture_output=True)
    assert push(hub, tmp_path, artifact, REPO, "--report", report).returncode == 0
    found = files(hub)
    cloze = json.loads(report.read_text(encoding="utf-8"))["tasks"]["cloze"]
    card = ModelCard(found["README.md"].decode())
    assert card.data.eval_results is not None
    assert {(result.metric_type, result.metric_value) for result in card.data.eval_results} >= {(cloze["metric"], cloze[cloze["metric"]])}
    for name, content in found.items():
        (tmp_path / "again" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "again" / name).write_bytes(content)
    assert Artifact.open(tmp_path / "again").verify() == []  # the manifest is that of the new card

    report.write_text(report.read_text(encoding="utf-8").replace(json.loads(report.read_text())["artifact"]["identity"], "0" * 64))
    done = push(hub, tmp_path, artifact, REPO, "--report", report, "--force")
    assert done.returncode == 2 and "evaluate this artifact" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, "reader"])
def test_no_right_to_write(hub: HubServer, artifact: Path, tmp_path: Path, token: str | None) -> None:
    done = push(hub, tmp_path, artifact, REPO, token=token)
    assert done.returncode == 3 and "HF_TOKEN" in done.stderr and done.stderr.count("\n") == 1
    assert REPO not in hub.repos


@pytest.mark.slow
def test_a_hub_that_is_not_there(artifact: Path, tmp_path: Path) -> None:
    with HubServer() as gone:
        pass
    done = push(gone, tmp_path, artifact, REPO)
    assert done.returncode == 3 and "could not be reached" in done.stderr and done.stderr.count("\n") == 1


def test_a_bad_name(hub: HubServer, tmp_path: Path) -> None:
    done = push(hub, tmp_path, tmp_path, "no-slash")
    assert done.returncode == 2 and "is no name of a hub repository; give user/name" in done.stderr and not hub.requests


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_of_a_published_model() -> None:
    """As the hub's own library reads it."""
    import msgspec

    manifest = example_manifest()
    model = msgspec.structs.replace(manifest.model, name="OpenELM-450M", source="hub:apple/OpenELM-450M")
    text = model_card(msgspec.structs.replace(manifest, model=model), [Usage("program", "run it")])
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("apple/OpenELM-450M", manifest.target, "text-generation")
    known = find_model("450M")
    assert known is not None and (data.license, data.license_name) == ("other", known.license)
    assert data.base_model_relation == "quantized" and manifest.quant.name in (data.tags or [])
    assert "```bash\nrun it\n```" in text and "(https://huggingface.co/apple/OpenELM-450M)" in text


def test_the_card_of_a_model_that_nobody_knows() -> None:
    """No licence is claimed for weights of somebody's folder, whatever it is called."""
    import msgspec

    manifest = example_manifest()
    model = msgspec.structs.replace(manifest.model, name="OpenELM-450M", source="local folder")
    data = metadata(model_card(msgspec.structs.replace(manifest, model=model), []))
    assert "license" not in data and "base_model" not in data


@pytest.mark.slow
def test_the_self_checks_figures(artifact: Path) -> None:
    check = Artifact.open(artifact).manifest.self_check
    card = (artifact / "README.md").read_text(encoding="utf-8")
    data = metadata(card)
    figures = {metric["type"]: metric["value"] for metric in data["model-index"][0]["results"][0]["metrics"]}
    assert figures == {"kl_divergence": check.kl_mean, "top1_agreement": check.top1_agreement}
    assert data["license"] == "apache-2.0" and data["library_name"] == "mlx" and "mlx_lm.generate --model ." in card
