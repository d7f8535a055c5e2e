"""Speculative decoding in the benchmark: the same tokens plainly and with guesses, in processes of their own."""

from __future__ import annotations

import json

import pytest

from elmexport.bench import Guesses, benchmark
from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from tests.cli.conftest import Run, run  # noqa: F401  (a fixture)
from tests.conftest import MadeOnce


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--prompt-lookup", "6"), ("--draft-model", "tiny", "--num-draft-tokens", "3")], ids=["lookup", "draft"]
)
def test_figures(run: Run, options: tuple[object, ...]) -> None:  # noqa: F811
    workload = ("--prompt", "none", "--depth", "0", "--generate", "48", "--repeat", "1", "--threads", "1")
    outcome = run("bench", TINY_FOLDER, *workload, *options, "--json")
    (artifact,) = json.loads(outcome.out)["artifacts"]
    found = artifact["speculation"]
    assert found["tokens"] == 47 and 0 < found["accepted"] <= found["drafted"] and found["note"] is None
    assert found["speed_up"] == pytest.approx(found["tokens_per_s"]["median"] / found["plain_tokens_per_s"]["median"])
    if "--draft-model" in options:
        assert found["accepted"] == found["drafted"]  # the model guesses for itself


@pytest.mark.slow
def test_llama_cpps_own_lookup(run: Run, tiny_artifact: MadeOnce, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Beside ours, in the table and the document; other engines have none."""
    results = []
    monkeypatch.setattr("elmexport.bench.benchmark", lambda *given, **options: results.append(benchmark(*given, **options)) or results[-1])
    artifact = tiny_artifact("gguf", "q4_0")
    workload = ("--prompt", "none", "--depth", "0", "--generate", "40", "--repeat", "1", "--threads", "1")
    lines = run("bench", artifact, TINY_FOLDER, *workload, "--prompt-lookup", "6").out.splitlines()
    assert [line.split("  ")[0] for line in lines[-3:]] == ["lookup 6", "llama.cpp's own lookup 6", "lookup 6"]
    row, other = results[0].to_dict()["artifacts"]
    assert other["speculation"]["own"] is None
    own = row["speculation"]["own"]
    assert own["how"] == "llama.cpp's own lookup 6"
    assert own["speed_up"] == pytest.approx(own["tokens_per_s"]["median"] / own["plain_tokens_per_s"]["median"])
    assert own["plain_tokens_per_s"]["median"] == pytest.approx(row["speculation"]["plain_tokens_per_s"]["median"], rel=0.9)


@pytest.mark.parametrize(
    ("guesses", "message"),
    [
        (Guesses(0), "prompt-lookup is 0"),
        (Guesses(4, draft_model=str(TINY_FOLDER)), "exclude each other"),
        (Guesses(draft_model="nowhere"), "nowhere: no such file or folder, and no model"),
        (Guesses(draft_model="tiny", draft_tokens=0), "num-draft-tokens is 0"),
    ],
)
def test_bad_guesses(guesses: Guesses, message: str) -> None:
    with pytest.raises(ElmExportError, match=message):
        guesses.check([TINY_FOLDER])
