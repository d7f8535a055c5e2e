"""Checkpoints and MLX artifacts that we write, opened by mlx-lm, which has its own OpenELM: the same logits as numpy's, and as our runtimes'.

mlx-lm runs in one process of its own, with nothing of ours imported.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from elmexport.artifact import Artifact
from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.save import save_checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.runtimes import open_artifact
from elmexport.weights import Role
from tests.clients.interpreter import Interpreter
from tests.conftest import ExportTo, MadeOnce
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.moe_models import SMALL, random_moe, some_ids, transformers_logits
from tests.reference import kl, log_probs, reference_logits

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mlx[cpu]' mlx-lm")
pytestmark = pytest.mark.slow

CLIENT = """
import sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

folder, ids_file, split, out, wide = sys.argv[1:]
model, config = load_model(Path(folder))
if wide == "True":
    model.set_dtype(mx.float32)
ids = mx.array(np.load(ids_file))[None]
cache = make_prompt_cache(model)
parts = [model(ids[:, : int(split)], cache=cache)]
parts += [model(ids[:, i : i + 1], cache=cache) for i in range(int(split), ids.shape[1])]
np.save(out, np.array(mx.concatenate(parts, axis=1)[0].astype(mx.float32)))
assert not any(name.split(".")[0] in ("elmexport", "targets", "tests") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def mlx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    interpreter = Interpreter(tmp_path_factory.mktemp("mlx-lm") / "stderr.txt")
    yield interpreter
    interpreter.close()


def mlx_logits(mlx: Interpreter, folder: Path, ids: NDArray[np.int64], *, decode: int = 4, wide: bool = False) -> NDArray[np.float32]:
    """Logits by mlx-lm: a prefill, then `decode` tokens one by one; computed as stored, or all in fp32 where `wide`."""
    np.save(folder / "ids.npy", ids)
    mlx.run(CLIENT, folder, folder / "ids.npy", str(len(ids) - decode), folder / "logits.npy", str(wide), folder=folder)
    return np.load(folder / "logits.npy")


def arrays(checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    return {name: checkpoint.tensor(name).float().numpy() for name in checkpoint.specs}


def check(mlx: Interpreter, folder: Path, checkpoint: Checkpoint, **save_options: Any) -> None:
    """Save in float32, compare three implementations on the saved folder."""
    weights = arrays(checkpoint)
    save_checkpoint(folder, checkpoint.config, {name: torch.from_numpy(array) for name, array in weights.items()}, **save_options)
    ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 48)
    expected = reference_logits(checkpoint.config, weights, ids)
    for found in (mlx_logits(mlx, folder, ids), open_artifact(folder).logits(ids)):
        assert np.abs(log_probs(found) - log_probs(expected)).max() < 1e-4
        assert kl(expected, found).max() < 1e-9


def test_tiny(mlx: Interpreter, tiny: Checkpoint, tmp_path: Path) -> None:
    check(mlx, tmp_path, tiny)


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_qk_projections": False}, {"share_input_output_layers": False}, {"qkv_multipliers": 1.0, "ffn_multipliers": 2.0}],
    ids=["odd-heads", "no-qk-norm", "untied", "uniform"],
)
def test_random_weights(mlx: Interpreter, small_config: Any, options: dict[str, Any], tmp_path: Path) -> None:
    check(mlx, tmp_path, random_checkpoint(replace(small_config, **options), seed=3))


def test_sharded(mlx: Interpreter, small_config: Any, tmp_path: Path) -> None:
    check(mlx, tmp_path, random_checkpoint(small_config), shards=3)


def test_bfloat16(mlx: Interpreter, small_config: Any, tmp_path: Path) -> None:
    """As the published checkpoints are stored. mlx-lm computes in bfloat16 then, so it can only agree to its 8 bits."""
    checkpoint = random_checkpoint(small_config)
    save_checkpoint(tmp_path, small_config, {name: torch.from_numpy(array).bfloat16() for name, array in checkpoint.arrays.items()})
    ids = np.random.default_rng(1).integers(0, small_config.vocab_size, 48)
    expected = reference_logits(small_config, arrays(open_checkpoint(str(tmp_path))), ids)
    assert kl(expected, open_artifact(tmp_path).logits(ids)).max() < 1e-9
    assert kl(expected, mlx_logits(mlx, tmp_path, ids)).mean() < 0.01


# Artifacts, their folders unchanged.

EVERYTHING = """
import json, sys
from types import SimpleNamespace
import mlx.core as mx
import numpy as np
from lm_eval.api.instance import Instance
from mlx_lm import generate, load
from mlx_lm.evaluate import MLXLM
from mlx_lm.perplexity import eval_ppl
from mlx_lm.server import ModelProvider

folder, ids_file, prompt = sys.argv[1:]
ids = mx.array(np.load(ids_file))
model, tokenizer = load(folder)
perplexity, _ = eval_ppl(model, ids[None], batch_size=1)
lm = MLXLM(folder)
request = Instance(request_type="loglikelihood", doc={}, arguments=(prompt, " time"), idx=0)
class Options(SimpleNamespace):
    def __getattr__(self, name):  # every option of the server that is not given is off
        return None

served = ModelProvider(Options(chat_template="", trust_remote_code=False))
served.load(folder)
print("RESULT", json.dumps({
    "ids": tokenizer.encode(prompt),
    "text": generate(model, tokenizer, prompt, max_tokens=12),
    "perplexity": perplexity,
    "loglikelihood": lm.loglikelihood([request])[0][0],
    "served": served.model.model_type,
    "eos": sorted(tokenizer.eos_token_ids),
}))
assert not any(name.split(".")[0] in ("elmexport", "targets", "tests") for name in sys.modules)
"""
PROMPT = "Once upon a"


def result(printed: str) -> Any:
    """What a program printed after RESULT."""
    return json.loads(printed.rpartition("RESULT")[2])


FEW = 8  # tokens, where mlx-lm computes in 16 bits: MLX multiplies quantized matrices at a hundredth of the speed on CPUs


@pytest.fixture(scope="module")
def prose(tiny: Checkpoint) -> NDArray[np.int64]:
    """Tokens of the bundled text."""
    assert tiny.tokenizer_path is not None
    text = (files("calibration") / "texts" / "weighting.txt").read_text(encoding="utf-8")
    return np.array(load_tokenizer(tiny.tokenizer_path).encode(text)[:24])


@pytest.mark.parametrize("quant", ["int4", "bf16"])
def test_load_generate_perplexity_evaluate_and_server(
    mlx: Interpreter, tiny: Checkpoint, tiny_artifact: MadeOnce, prose: NDArray[np.int64], quant: str, tmp_path: Path
) -> None:
    folder = tiny_artifact("mlx", quant)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    prose = prose[: 2 * FEW]
    np.save(tmp_path / "ids.npy", prose)
    found = result(mlx.run(EVERYTHING, folder, tmp_path / "ids.npy", PROMPT, folder=tmp_path))
    runtime = open_artifact(folder)
    assert tiny.tokenizer_path is not None
    tokenizer = load_tokenizer(tiny.tokenizer_path)
    assert found["ids"] == tokenizer.encode(PROMPT) and found["eos"] == [2] and found["served"] == "openelm"
    rows = log_probs(runtime.logits(prose))
    nll = -rows[np.arange(len(prose) - 1), prose[1:]].mean()
    assert np.log(found["perplexity"]) == pytest.approx(nll, abs=0.02)  # mlx-lm computes in 16 bits
    ids = tokenizer.encode(PROMPT + " time")
    assert ids[:-1] == found["ids"]
    assert found["loglikelihood"] == pytest.approx(log_probs(runtime.logits(ids))[-2, ids[-1]], abs=0.05)
    assert len(found["text"].split()) > 4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("quant", ["int4", "int3", "mxfp4", "fp16"])
def test_logits_are_ours(mlx: Interpreter, tiny_artifact: MadeOnce, prose: NDArray[np.int64], quant: str, tmp_path: Path) -> None:
    """In fp32, in which our runtime computes on CPUs, to the order of sums; in fp16, as mlx-lm does by itself, to its rounding."""
    folder = shutil.copytree(tiny_artifact("mlx", quant), tmp_path / "artifact")
    logits = open_artifact(folder).logits(prose)
    assert np.abs(log_probs(logits) - log_probs(mlx_logits(mlx, folder, prose, wide=True))).max() < 1e-3
    assert kl(logits[:FEW], mlx_logits(mlx, folder, prose[:FEW])).mean() < 2e-4


@pytest.mark.parametrize(
    "options", [{"normalize_qk_projections": False}, {"share_input_output_layers": False}], ids=["no-qk-norm", "untied"]
)
def test_logits_of_other_shapes(mlx: Interpreter, small_config: Any, export_to: ExportTo, options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = random_checkpoint(replace(small_config, **options), seed=3)
    folder = shutil.copytree(export_to(checkpoint, "mlx", "fp16"), tmp_path / "artifact")
    ids = np.random.default_rng(1).integers(0, small_config.vocab_size, 48)
    assert kl(reference_logits(checkpoint.config, checkpoint.arrays, ids), mlx_logits(mlx, folder, ids)).max() < 1e-3


TIE = 0.02  # of a logit; those of `tiny` spread over some 20, and fp16 rounds them and the activations before by up to this much


def greedy(folder: Path, prompt: Sequence[int], tokens: int) -> list[int]:
    runtime = open_artifact(folder)
    ids = [runtime.greedy(prompt)]
    while len(ids) < tokens:
        ids.append(runtime.greedy(ids[-1:], len(prompt) + len(ids) - 1))
    return ids


GREEDY = """
import json, sys
from mlx_lm import load
from mlx_lm.generate import generate_step
import mlx.core as mx
model, _ = load(sys.argv[1])
steps = generate_step(mx.array(json.loads(sys.argv[2])), model, max_tokens=int(sys.argv[3]))
print("RESULT", json.dumps([int(token) for token, _ in steps]))
"""


def assert_same_but_for_ties(found: Sequence[int], expected: Sequence[int], folder: Path, prompt: Sequence[int], who: str) -> None:
    """The same tokens, or others from where two stand so close that an engine's own rounding decides: the artifact in float32 tells."""
    if list(found) == list(expected):
        return
    first = next(i for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)) if ours != theirs)
    logits = open_artifact(folder).logits(np.array([*prompt, *expected[:first]]))[-1]
    behind = logits.max() - logits[[found[first], expected[first]]]
    assert behind.max() < TIE, (
        f"{who}: token {first} is {found[first]}, expected {expected[first]}; these stand {behind} below the best logit"
    )


@pytest.mark.parametrize("prompt", ["Once upon a", "It was a dark"])
def test_greedy_tokens_are_those_of_the_other_formats(
    mlx: Interpreter, tiny: Checkpoint, tiny_artifact: MadeOnce, tmp_path: Path, prompt: str
) -> None:
    assert tiny.tokenizer_path is not None
    ids = load_tokenizer(tiny.tokenizer_path).encode(prompt)
    folder = tiny_artifact("mlx", "int4")
    found = result(mlx.run(GREEDY, folder, json.dumps(ids), "8", folder=tmp_path))
    expected = greedy(folder, ids, 16)  # in float32
    assert_same_but_for_ties(found, expected[:8], folder, ids, "mlx-lm")
    for target in ("onnx", "coreml", "gguf"):
        assert_same_but_for_ties(greedy(tiny_artifact(target, "int4"), ids, 16), expected, folder, ids, target)


# mlx-lm's own conversion.

CONVERT = """
import json, sys
from pathlib import Path
from mlx_lm.convert import convert
source, out, options = sys.argv[1:]
options = json.loads(options)
wide = options.pop("wide_embedding", False)
predicate = lambda path, module: {"group_size": 32, "bits": 8, "mode": "affine"} if "embeddings" in path else True
convert(source, out, quant_predicate=predicate if wide else None, **options)
print("RESULT", json.dumps(sum(path.stat().st_size for path in Path(out).glob("*.safetensors"))))
"""


def saved(checkpoint: Checkpoint, artifact: Path, folder: Path) -> Path:
    """`checkpoint` in Apple's layout, fp16, with the tokenizer files of `artifact`."""
    tensors = {name: checkpoint.tensor(name).to(torch.float16) for name in checkpoint.specs}
    save_checkpoint(folder, checkpoint.config, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        if (artifact / name).is_file():
            shutil.copyfile(artifact / name, folder / name)
    return folder


@pytest.mark.parametrize(
    ("quant", "options"),
    [
        ("int8", {"quantize": True, "q_bits": 8, "q_group_size": 32}),
        ("int4", {"quantize": True, "q_bits": 4, "q_group_size": 32, "wide_embedding": True}),
        ("int4-group64", {"quantize": True, "q_bits": 4, "q_group_size": 64, "wide_embedding": True}),
        ("int3", {"quantize": True, "q_bits": 3, "q_group_size": 32, "wide_embedding": True}),
        ("fp16", {"dtype": "float16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_are_as_large_as_mlx_lms_own(
    mlx: Interpreter, tiny: Checkpoint, tiny_artifact: MadeOnce, tmp_path: Path, quant: str, options: dict[str, Any]
) -> None:
    source = saved(tiny, tiny_artifact("mlx", "fp16"), tmp_path / "source")
    theirs = result(mlx.run(CONVERT, source, tmp_path / "theirs", json.dumps(options), folder=tmp_path))
    ours = sum(path.stat().st_size for path in tiny_artifact("mlx", quant).glob("*.safetensors"))
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("quant", ["fp16", "int4"])
def test_an_inflated_stream(
    mlx: Interpreter, tiny: Checkpoint, export_to: ExportTo, tiny_artifact: MadeOnce, prose: NDArray[np.int64], tmp_path: Path, quant: str
) -> None:
    """The residual stream of `tiny` times 2^14, its logits the same: in fp16 mlx-lm's own conversion gives NaN, ours what the model says."""
    prose = prose[:FEW]
    large = MemoryCheckpoint(tiny.config, arrays(tiny), tokenizer_path=tiny.tokenizer_path)
    for name, spec in large.specs.items():
        if spec.role.writes_to_stream:
            large.arrays[name] *= np.float32(2**14)
        elif spec.role is Role.NORM_FINAL:
            large.arrays[name] /= np.float32(2**14)
    source = saved(large, tiny_artifact("mlx", "fp16"), tmp_path / "source")
    options = {"dtype": "float16"} if quant == "fp16" else {"quantize": True, "q_bits": 4, "q_group_size": 32, "dtype": "float16"}
    mlx.run(CONVERT, source, tmp_path / "theirs", json.dumps(options), folder=tmp_path)
    assert np.isnan(mlx_logits(mlx, tmp_path / "theirs", prose)).any()
    folder = shutil.copytree(export_to(large, "mlx", quant), tmp_path / "ours")
    assert Artifact.open(folder).manifest.alpha < 2**-3
    stored = mlx_logits(mlx, folder, prose)
    assert kl(mlx_logits(mlx, shutil.copytree(tiny_artifact("mlx", quant), tmp_path / "plain"), prose), stored).mean() < 1e-3
    if quant == "fp16":
        assert kl(reference_logits(tiny.config, arrays(tiny), prose), stored).mean() < 1e-3


@pytest.mark.parametrize("quant", ["fp16", "int4"])
def test_a_mixture_of_experts(mlx: Interpreter, export_to: ExportTo, quant: str) -> None:
    """Of fp16 numbers transformers' logits; of quantized ones what our runtime makes of them."""
    checkpoint = random_moe()
    halves = {name: array.astype(np.float16).astype(np.float32) for name, array in checkpoint.arrays.items()}
    checkpoint = MemoryCheckpoint(checkpoint.config, halves, name="experts")
    folder, ids = export_to(checkpoint, "mlx", quant), some_ids(SMALL)
    expected = transformers_logits(checkpoint, ids) if quant == "fp16" else open_artifact(folder).logits(ids)
    assert kl(expected, mlx_logits(mlx, folder, ids, wide=True)).max() < 1e-9
