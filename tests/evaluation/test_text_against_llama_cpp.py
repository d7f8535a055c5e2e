"""The text pass on a pair of GGUF files against `llama-perplexity --kl-divergence`, which stores the reference's log-probabilities in 16 bits.

llama-perplexity prints six decimals, but its own rounding of the reference weighs more: steps of up to 16 / 65535 nats. Its two passes are
made to compute what ours do: keys and values in float32, plain attention, batches of one window.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.text import bundled_text
from elmexport.checkpoint.base import Checkpoint
from elmexport.divergence import log_softmax
from elmexport.evaluation.distributions import ReferencePass, window_logits
from elmexport.evaluation.text import text_pass
from elmexport.evaluation.windows import Windows, text_windows
from elmexport.progress import SilentProgress
from elmexport.runtimes import open_artifact
from elmexport.runtimes.artifact_tokenizer import artifact_tokenizer
from tests.clients.llama_cpp_tools import llama_cpp_tools
from tests.conftest import MadeOnce

WINDOW = 128


def figure(printed: str, label: str) -> float:
    found = re.search(rf"^{re.escape(label)}\s*:\s*(-?[\d.]+)", printed, re.MULTILINE)
    assert found is not None, printed
    return float(found[1])


def stored_log_probs(path: Path, windows: Windows) -> tuple[list[NDArray[np.float32]], NDArray[np.int64]]:
    """What `--kl-divergence-base` wrote: log-probabilities `[tokens, vocab]` of the counted part of each window; and the windows."""
    data = path.read_bytes()
    assert data[:8] == b"_logits_"
    length, vocab, count = np.frombuffer(data, np.int32, 3, 8).tolist()
    assert (count, length) == windows.ids.shape
    codes = np.frombuffer(data, np.uint16, offset=20 + 4 * count * length).reshape(count, windows.length - 1 - windows.first, -1)
    step, least = np.moveaxis(codes[:, :, :4].copy().view(np.float32), -1, 0)
    return list(step[..., None] * codes[:, :, 4 : 4 + vocab] + least[..., None]), windows.ids


def kl_of_stored(stored: NDArray[np.float32], logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """llama-perplexity's KL divergence: what it stored is taken as it is, though rounding keeps it from adding up to 1, down to exp(-16)."""
    log_p = stored.astype(np.float64)
    return np.where(log_p > -16, np.exp(log_p) * (log_p - log_softmax(logits[-len(stored) :])), 0).sum(axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["f16", "f32"])
def test_figures_are_those_of_llama_perplexity(base: str, tiny: Checkpoint, tiny_artifact: MadeOnce, tmp_path: Path) -> None:
    tools = llama_cpp_tools()
    reference, artifact = tiny_artifact("gguf", base), tiny_artifact("gguf", "q4_0")
    text, kept = tmp_path / "prose.txt", tmp_path / "base.kld"
    text.write_text(bundled_text("weighting"), encoding="utf-8")
    alike = ["-c", WINDOW, "-b", WINDOW, "-ub", WINDOW, "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", 2, "--kl-divergence-base", kept]
    tools.run("llama-perplexity", "-m", *reference.glob("*.gguf"), "-f", text, *alike)
    printed = tools.run("llama-perplexity", "-m", *artifact.glob("*.gguf"), "--kl-divergence", *alike)

    windows = text_windows(artifact_tokenizer("gguf", artifact), tiny.config.vocab_size, WINDOW, path=text)
    runtime = open_artifact(artifact)
    found = text_pass(runtime, windows, ReferencePass(base, lambda: open_artifact(reference), tmp_path / "cache"), SilentProgress())
    theirs = np.concatenate(
        [kl_of_stored(stored, window_logits(runtime, ids)) for stored, ids in zip(*stored_log_probs(kept, windows), strict=True)]
    )
    runtime.close()

    # From the log-probabilities that llama-perplexity stored, all that it prints.
    for label, value in (("Mean    KLD", theirs.mean()), ("Median  KLD", np.median(theirs)), ("99.0%   KLD", np.quantile(theirs, 0.99))):
        assert value == pytest.approx(figure(printed, label), abs=2e-6)
    assert theirs.max() == pytest.approx(figure(printed, "Maximum KLD"), abs=2e-6)

    assert len(windows.ids) == len(re.findall(r"^ *\d+ +[\d.]+ ± ", printed, re.MULTILINE))
    assert found.kl is not None and found.perplexity.reference is not None and found.perplexity.ratio is not None
    assert found.perplexity.value == pytest.approx(figure(printed, "Mean PPL(Q)"), rel=2e-6)
    assert found.perplexity.reference == pytest.approx(figure(printed, "Mean PPL(base)"), rel=1e-5)
    assert found.perplexity.ratio == pytest.approx(figure(printed, "Mean PPL(Q)/PPL(base)"), abs=1e-5)
    assert found.kl.mean == pytest.approx(figure(printed, "Mean    KLD"), abs=1e-5)
    assert found.kl.median == pytest.approx(figure(printed, "Median  KLD"), abs=1e-4)
    assert found.kl.p99 == pytest.approx(figure(printed, "99.0%   KLD"), abs=3e-4)
    assert found.kl.max == pytest.approx(figure(printed, "Maximum KLD"), abs=3e-4)
    assert 100 * found.kl.top1_agreement == pytest.approx(figure(printed, "Same top p"), abs=5e-4)
