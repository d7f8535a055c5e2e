"""Downloads, from a hub on loopback. Each runs in a process of its own, as the command does: the library reads its settings at import."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from elmexport.checkpoint import hub as hub_module
from elmexport.checkpoint import is_local, open_checkpoint
from elmexport.checkpoint.save import save_checkpoint
from elmexport.errors import ElmExportError
from elmexport.models import find_model
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.models.openelm.config import OpenELMConfig
from tests.hub_server import HubServer

LLAMA = "meta-llama/Llama-2-7b-hf"
SCRIPT = """
import json, sys
from elmexport.checkpoint import open_checkpoint
from elmexport.errors import ElmExportError

class Steps:
    stages, done = [], 0
    def stage(self, name, total=None): self.stages.append([name, total])
    def advance(self, n): self.done += n

steps, options = Steps(), json.loads(sys.argv[1])
read = options.pop("read", False)
try:
    c = open_checkpoint(progress=steps, **options)
    answer = dict(name=c.source.name, origin=c.source.origin, revision=c.source.revision, stages=steps.stages, done=steps.done,
                  tokenizer=c.tokenizer_path and c.tokenizer_path.name, identity=c.identity() if read else None)
except ElmExportError as error:
    answer = dict(error=str(error), code=error.exit_code)
print(json.dumps(answer))
"""


@dataclass
class Client:
    """Runs `open_checkpoint` in another process, with its own cache folder."""

    home: Path
    endpoint: str
    env: dict[str, str] = field(default_factory=dict)

    def open(self, model: str, **options: Any) -> dict[str, Any]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
        env = kept | {"HF_HOME": str(self.home), "HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"} | self.env
        command = [sys.executable, "-c", SCRIPT, json.dumps({"model": model, **options})]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(tmp_path / "hf", hub.url)


@pytest.mark.slow
def test_download_then_offline(hub: HubServer, client: Client) -> None:
    commit = hub.push("someone/OpenELM-mini", TINY_FOLDER)
    online = client.open("someone/OpenELM-mini", read=True)
    assert (online["name"], online["origin"], online["revision"]) == ("OpenELM-mini", "hub:someone/OpenELM-mini", commit)
    assert online["tokenizer"] == "tokenizer.model"
    assert online["identity"] == open_checkpoint("tiny").identity()
    size = (TINY_FOLDER / "model.safetensors").stat().st_size
    assert online["stages"] == [["downloading someone/OpenELM-mini", size]] and online["done"] == size
    assert not hub.downloads("train.py") and not hub.downloads("README.md")  # only what is needed

    client.env["HF_HUB_OFFLINE"] = "1"
    asked = len(hub.requests)
    offline = client.open("someone/OpenELM-mini", read=True)
    assert len(hub.requests) == asked
    assert offline == online | {"stages": [], "done": 0}


def test_offline_and_never_downloaded(client: Client) -> None:
    client.env["HF_HUB_OFFLINE"] = "1"
    answer = client.open("270M")
    assert answer["code"] == 3
    assert "apple/OpenELM-270M is not (completely) in the local cache" in answer["error"] and "unset HF_HUB_OFFLINE" in answer["error"]


@pytest.mark.slow
def test_revision_is_pinned(hub: HubServer, client: Client, tmp_path: Path) -> None:
    old = hub.push("someone/model", TINY_FOLDER)
    shutil.copytree(TINY_FOLDER, tmp_path / "new")
    (tmp_path / "new" / "README.md").write_text("a new commit")
    new = hub.push("someone/model", tmp_path / "new")
    assert client.open("someone/model")["revision"] == new
    assert client.open("someone/model", revision=old)["revision"] == old
    missing = client.open("someone/model", revision="v9")
    assert "someone/model has no revision 'v9'" in missing["error"] and missing["code"] == 2


@pytest.mark.slow
def test_interrupted_download_resumes(hub: HubServer, client: Client, tmp_path: Path, small_config: OpenELMConfig) -> None:
    import torch

    config = replace(small_config, vocab_size=36_000)
    tensors = {spec.name: torch.ones(spec.shape) for spec in config.weights()}
    save_checkpoint(tmp_path / "model", config, tensors)
    hub.push("someone/model", tmp_path / "model")
    hub.cut["model.safetensors"] = [15_000_000]  # the library hands over blocks of 10 MiB
    answer = client.open("someone/model", tokenizer="none", read=True)
    assert "error" not in answer and answer["tokenizer"] is None
    assert [request.range for request in hub.downloads("model.safetensors")] == [None, f"bytes={10 * 2**20}-"]
    assert answer["done"] == (tmp_path / "model" / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_rerun_after_a_failed_download_fetches_only_the_rest(
    hub: HubServer, client: Client, tmp_path: Path, small_config: OpenELMConfig
) -> None:
    import torch

    tensors = {spec.name: torch.ones(spec.shape) for spec in small_config.weights()}
    save_checkpoint(tmp_path / "model", small_config, tensors, shards=2)
    hub.push("someone/model", tmp_path / "model")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    hub.broken.add(second)
    answer = client.open("someone/model", tokenizer="none")
    assert "was interrupted" in answer["error"] and "complete files are kept" in answer["error"] and answer["code"] == 3
    client.env["HF_HUB_OFFLINE"] = "1"
    assert "not (completely) in the local cache" in client.open("someone/model", tokenizer="none")["error"]

    client.env.clear()
    hub.broken.clear()
    assert client.open("someone/model", tokenizer="none")["name"] == "model"
    assert len(hub.downloads(first)) == 1
    assert len(hub.downloads(second)) == 2


@pytest.mark.slow
def test_gated_without_and_with_a_token(hub: HubServer, client: Client) -> None:
    hub.push("someone/model", TINY_FOLDER)
    hub.repos["someone/model"].readers = {"hf_reader"}
    hub.tokens = {"hf_reader", "hf_other"}
    answer = client.open("someone/model")
    assert answer["code"] == 3 and "no token is set" in answer["error"]
    assert "accept the licence" in answer["error"] and "HF_TOKEN" in answer["error"]
    client.env["HF_TOKEN"] = "hf_other"
    assert "has not been granted it" in client.open("someone/model")["error"]
    client.env["HF_TOKEN"] = "hf_wrong"
    assert "valid token" in client.open("someone/model")["error"]
    client.env["HF_TOKEN"] = "hf_reader"
    assert client.open("someone/model")["name"] == "model"


@pytest.mark.slow
def test_content_that_is_not_what_the_hub_lists(hub: HubServer, client: Client) -> None:
    sound = (TINY_FOLDER / "model.safetensors").read_bytes()
    hub.push("someone/model", TINY_FOLDER)
    hub.wrong["model.safetensors"] = sound[:-1] + bytes([sound[-1] ^ 1])
    answer = client.open("someone/model")
    assert "what came for model.safetensors of hub repository someone/model is not the file that the hub lists" in answer["error"]
    for other in (sound[:-5], sound + b"more"):  # whose size the library looks at
        hub.wrong["model.safetensors"] = other
        assert "error" in client.open("someone/model")
    del hub.wrong["model.safetensors"]
    assert client.open("someone/model", read=True)["identity"] == open_checkpoint("tiny").identity()


@pytest.mark.slow
def test_a_token_goes_to_the_hub_alone(hub: HubServer, client: Client) -> None:
    with HubServer() as elsewhere:
        for server in (hub, elsewhere):
            server.push("someone/model", TINY_FOLDER)
        hub.elsewhere, hub.tokens, client.env["HF_TOKEN"] = elsewhere, {"hf_secret"}, "hf_secret"
        answer = client.open("someone/model", read=True)
    assert "Bearer hf_secret" in hub.authorizations
    assert elsewhere.downloads("model.safetensors") and not elsewhere.authorizations
    assert "hf_secret" not in json.dumps(answer)


@pytest.mark.slow
def test_unknown_repository(client: Client) -> None:
    answer = client.open("apple/OpenELM-720M")
    assert "no hub repository apple/OpenELM-720M" in answer["error"] and "did you mean apple/OpenELM-270M?" in answer["error"]
    assert answer["code"] == 2


def test_unreachable_hub(client: Client) -> None:
    client.endpoint = "http://127.0.0.1:9"  # nobody listens
    answer = client.open("someone/model")
    assert "could not be reached" in answer["error"] and "HF_ENDPOINT" in answer["error"] and answer["code"] == 3


@pytest.mark.slow
def test_other_architecture_is_refused_before_its_weights_are_fetched(hub: HubServer, client: Client, tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"x" * 100_000)
    hub.push("someone/llama", tmp_path / "llama")
    assert "model_type is 'llama'" in client.open("someone/llama")["error"]
    assert not hub.downloads("model.safetensors")


@pytest.fixture
def bare_model(hub: HubServer, tmp_path: Path) -> str:
    """As Apple publishes them: weights without a tokenizer."""
    shutil.copytree(TINY_FOLDER, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.model", "__pycache__"))
    hub.push("apple/OpenELM-bare", tmp_path / "bare")
    return "apple/OpenELM-bare"


@pytest.mark.slow
def test_tokenizer_of_the_gated_repository(hub: HubServer, client: Client, bare_model: str, tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    shutil.copy(TINY_FOLDER / "tokenizer.model", tmp_path / "llama")
    hub.push(LLAMA, tmp_path / "llama")
    hub.repos[LLAMA].readers = hub.tokens = {"hf_reader"}

    refused = client.open(bare_model)
    assert refused["code"] == 3 and not hub.downloads("model.safetensors")
    for part in ("comes without a tokenizer", LLAMA, "accept the licence", "HF_TOKEN", "--tokenizer PATH", "--tokenizer none"):
        assert part in refused["error"]
    assert client.open(bare_model, tokenizer="none")["tokenizer"] is None
    given = client.open(bare_model, tokenizer=str(TINY_FOLDER / "tokenizer.model"))
    assert given["tokenizer"] == "tokenizer.model"

    client.env["HF_TOKEN"] = "hf_reader"
    assert client.open(bare_model)["tokenizer"] == "tokenizer.model"
    # A local folder without one finds it in the cache from now on, asking nobody.
    asked = len(hub.requests)
    assert client.open(str(tmp_path / "bare"))["tokenizer"] == "tokenizer.model"
    assert len(hub.requests) == asked


@pytest.mark.slow
def test_tokenizer_by_hub_id(hub: HubServer, client: Client, bare_model: str, tmp_path: Path) -> None:
    hub.push("someone/words", TINY_FOLDER)
    assert client.open(bare_model, tokenizer="someone/words")["tokenizer"] == "tokenizer.model"
    assert len(hub.downloads("model.safetensors")) == 1  # the model's own
    hub.push("someone/nothing", tmp_path / "bare")
    assert (
        "someone/nothing holds neither tokenizer.json nor tokenizer.model" in client.open(bare_model, tokenizer="someone/nothing")["error"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_repository_with_pytorch_weights_only(hub: HubServer, client: Client, tmp_path: Path, shards: int) -> None:
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "bin"
    shutil.copytree(TINY_FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    tensors = load_file(TINY_FOLDER / "model.safetensors")
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i + 1:05d}-of-00002.bin" for i in range(shards)]
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, folder / file)
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    hub.push("someone/bin", folder)
    assert client.open("someone/bin", read=True)["identity"] == open_checkpoint("tiny").identity()
    assert not hub.downloads("optimizer.pt")
    client.env["HF_HUB_OFFLINE"] = "1"
    assert client.open("someone/bin", read=True)["name"] == "bin"


@pytest.mark.slow
def test_repository_of_an_adapter(hub: HubServer, client: Client, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "apple/OpenELM-270M"}))
    hub.push("someone/lora", tmp_path / "adapter")
    error = client.open("someone/lora")["error"]
    assert "hub repository someone/lora holds an adapter, not a model: give its base with --model apple/OpenELM-270M" in error
    assert "--adapter DIR" in error


def test_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(ElmExportError, match=r"no space left on the disk while downloading .* set HF_HOME to a folder on a larger disk"):
        hub_module.download_description("someone/model", None)


@pytest.mark.slow
def test_cached(hub: HubServer, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    model = find_model("270M")
    assert model is not None and model.hub_id is not None
    hub.push(model.hub_id, TINY_FOLDER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(client.home / "hub"))
    assert not is_local(model)
    client.open("270M")
    assert is_local(model)
