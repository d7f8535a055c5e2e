"""The text pass: windows, the reference kept on disk, and the figures against scipy on every token."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats

from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import Tokenizer, load_tokenizer
from elmexport.errors import ElmExportError, VerificationError
from elmexport.evaluation.distributions import ReferencePass
from elmexport.evaluation.results import TextResult
from elmexport.evaluation.text import text_pass
from elmexport.evaluation.windows import Windows, evaluation_text, text_windows
from elmexport.progress import SilentProgress
from tests.evaluation.table_runtime import TableRuntime


@pytest.fixture(scope="module")
def tokenizer(tiny: Checkpoint) -> Tokenizer:
    assert tiny.tokenizer_path is not None
    return load_tokenizer(tiny.tokenizer_path)


def windows(count: int = 6, length: int = 64) -> Windows:
    return Windows(np.random.Generator(np.random.PCG64(9)).integers(0, 50, (count, length)), "random ids")


def run(artifact: TableRuntime, reference: TableRuntime, folder: Path, text: Windows | None = None) -> TextResult:
    return text_pass(artifact, text or windows(), ReferencePass("reference", lambda: reference, folder), SilentProgress())


def test_windows_are_those_of_llama_perplexity(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(evaluation_text())
    found = text_windows(tokenizer, 4096, 256, tokens=1000)
    assert found.ids.shape == (3, 256) and found.first == 128 and found.counted == 3 * 127
    assert (found.ids[:, 0] == tokenizer.bos_id).all()
    np.testing.assert_array_equal(found.ids[1, 1:], ids[257:512])
    assert found.text == f"bundled prose, the first 768 of {len(ids)} tokens"
    whole = text_windows(tokenizer, 4096, 100_000)
    assert whole.ids.shape == (len(ids) // 512, 512) and whole.text == "bundled prose"


def test_windows_of_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("It was a dark night, and the ship went down. " * 8, encoding="utf-8")
    found = text_windows(tokenizer, 4096, 256, path=path)
    assert found.text == "own.txt" and found.ids.size == len(tokenizer.encode(path.read_text(encoding="utf-8")))
    path.write_text("Short.", encoding="utf-8")
    with pytest.raises(ElmExportError, match=r"at least 16 are needed \(own.txt has 4 tokens"):
        text_windows(tokenizer, 4096, 256, path=path)
    path.write_text("  \n", encoding="utf-8")
    with pytest.raises(ElmExportError, match="is empty"):
        text_windows(tokenizer, 4096, 256, path=path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ElmExportError, match="not UTF-8"):
        text_windows(tokenizer, 4096, 256, path=path)
    with pytest.raises(ElmExportError, match="--tokenizer"):
        text_windows(None, 4096, 256, path=path)


def test_without_a_tokenizer_ids_are_random_but_the_same() -> None:
    a, b = text_windows(None, 512, 128), text_windows(None, 512, 128)
    assert a.hash == b.hash and a.text == "pseudo-random ids"


def test_figures_equal_scipys(tmp_path: Path) -> None:
    reference, artifact, text = TableRuntime(), TableRuntime(noise=0.3), windows()
    found = run(artifact, reference, tmp_path)
    p, q = (np.stack([runtime.logits(ids[:-1]) for ids in text.ids]).astype(np.float64) for runtime in (reference, artifact))
    kl = scipy.stats.entropy(scipy.special.softmax(p, -1), scipy.special.softmax(q, -1), axis=-1)
    counted = kl[:, 32:]
    assert found.kl is not None and found.blocks.kl is not None
    assert found.kl.tokens == counted.size == 6 * 31
    # What the 16-bit codes cost, see elmexport.evaluation.distributions.
    assert found.kl.mean == pytest.approx(counted.mean(), rel=1e-5)
    assert found.kl.median == pytest.approx(np.median(counted), rel=1e-3)
    assert found.kl.p99 == pytest.approx(np.quantile(counted, 0.99), rel=1e-3)
    assert found.kl.max == pytest.approx(counted.max(), rel=1e-3)
    assert found.kl.top1_agreement == (p.argmax(-1) == q.argmax(-1))[:, 32:].mean()
    nll = [-np.take_along_axis(scipy.special.log_softmax(x, -1), text.ids[:, 1:, None], -1)[:, 32:, 0] for x in (q, p)]
    assert found.perplexity.value == pytest.approx(np.exp(nll[0].mean()), rel=1e-9)
    assert found.perplexity.reference == pytest.approx(np.exp(nll[1].mean()), rel=1e-9)
    assert found.perplexity.ratio == pytest.approx(np.exp(nll[0].mean() - nll[1].mean()), rel=1e-9)
    for interval, value in ((found.kl.mean_ci, found.kl.mean), (found.perplexity.ratio_ci, found.perplexity.ratio)):
        assert interval is not None and value is not None and interval[0] < value < interval[1]
    assert [(bucket.start, bucket.end) for bucket in found.kl.by_depth][:2] == [(0, 8), (8, 16)]
    assert sum(bucket.tokens for bucket in found.kl.by_depth) == kl.size
    assert found.kl.by_depth[1].mean == pytest.approx(kl[:, 8:16].mean(), rel=1e-3)
    assert sum(found.blocks.tokens) == counted.size
    assert sum(found.blocks.kl) == pytest.approx(counted.sum(), rel=1e-5)
    assert found.blocks.nll[0] == pytest.approx(nll[0][0].sum())


def test_blocks_are_runs_within_a_window(tmp_path: Path) -> None:
    text = windows(2, 64)
    assert run(TableRuntime(), TableRuntime(), tmp_path, text).blocks.tokens == (31, 31)
    longer = windows(3, 200)
    runtime = TableRuntime(context=200)
    assert run(runtime, runtime, tmp_path, longer).blocks.tokens == (32, 32, 32, 3) * 3


def test_a_model_is_no_distance_from_itself(tmp_path: Path) -> None:
    found = run(TableRuntime(), TableRuntime(), tmp_path)
    assert found.kl is not None
    assert 0 <= found.kl.max < 1e-6 and found.kl.mean < 3e-8 and found.kl.top1_agreement == 1
    assert found.perplexity.ratio == 1 and found.perplexity.ratio_ci == (1, 1)


def test_without_a_reference_there_is_perplexity_only() -> None:
    found = text_pass(TableRuntime(), windows(), None, SilentProgress())
    assert found.kl is None and found.blocks.kl is None and found.perplexity.ratio is None
    assert found.perplexity.value > 1


def test_the_reference_is_computed_once(tmp_path: Path) -> None:
    reference = TableRuntime()
    first = run(TableRuntime(noise=0.3), reference, tmp_path)
    assert reference.calls == 6
    assert run(TableRuntime(noise=0.3), reference, tmp_path) == first
    assert reference.calls == 6
    run(TableRuntime(), reference, tmp_path, windows(5))
    assert reference.calls == 11
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_pass_is_computed_again(tmp_path: Path) -> None:
    reference = TableRuntime()
    first = run(TableRuntime(noise=0.3), reference, tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])
    assert run(TableRuntime(noise=0.3), reference, tmp_path) == first
    assert reference.calls == 12


def test_an_interrupted_pass_leaves_nothing(tmp_path: Path) -> None:
    reference = TableRuntime()
    reference.table[40] = np.nan
    with pytest.raises(VerificationError, match="not finite"):
        run(TableRuntime(), reference, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_passes_longest_unused_go_first(tmp_path: Path) -> None:
    def run_one(identity: str, limit: int) -> None:
        list(ReferencePass(identity, TableRuntime, tmp_path, limit=limit).windows(windows(), 50, SilentProgress()))

    run_one("a", 1 << 20)
    size = next(tmp_path.iterdir()).stat().st_size
    kept = {"a": next(tmp_path.iterdir())}
    for age, identity in ((300, "b"), (200, "c")):
        run_one(identity, 1 << 20)
        kept[identity] = next(path for path in tmp_path.iterdir() if path not in kept.values())
        os.utime(kept[identity], (kept[identity].stat().st_mtime - age,) * 2)
    os.utime(kept["a"], (kept["a"].stat().st_mtime - 400,) * 2)
    run_one("a", 1 << 20)  # used again: now the youngest
    run_one("d", 3 * size)
    assert not kept["b"].exists() and kept["a"].exists() and kept["c"].exists()
    with pytest.raises(ElmExportError, match="use at most 64 tokens"):
        run_one("e", size // 4)


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match="vocabulary of 40, the artifact one of 50"):
        run(TableRuntime(), TableRuntime(40), tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ElmExportError, match="ELMEXPORT_CACHE"):
        run(TableRuntime(), TableRuntime(), tmp_path / "file")


def test_an_artifact_that_overflows_fails(tmp_path: Path) -> None:
    artifact = TableRuntime()
    artifact.table[50] = np.inf
    with pytest.raises(VerificationError, match="not finite"):
        run(artifact, TableRuntime(), tmp_path)
