"""The ONNX folder, unchanged, in other people's runtimes: onnxruntime-genai, transformers.js, optimum. Greedy tokens must be the same.

The expected tokens come from a loop over plain onnxruntime, one prompt at a time, with a cache that grows.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache as kept_result
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.tokenizer import Tokenizer, load_tokenizer
from tests.clients.kept import kept

ROOT = Path(__file__).parents[2]
TRANSFORMERS_JS = "4.3.1"
OPTIMUM = ("optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
PROMPTS = ["The old captain looked at the sea", "Once upon a time", "“No,” said she; and the door"]
NEW = 24
NEW_LARGE = 8  # of 270M, whose tokens take fifty times as long
INT4 = ("int4", "int4-block64", "int4-block128", "int4-asym", "int4-all")
DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", **dict.fromkeys(INT4, "q4")}  # transformers.js's names
QUANTS = tuple(DTYPES)
MOE = ("moe-fp32", "moe-int4", "moe-int8")  # of `tiny-moe`

Artifact = Callable[[str], Path]
Tokens = list[list[int]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """`artifact("tiny-int4")`, or `"270M-int4"` with random weights and tiny's tokenizer, made once."""
    from calibration.options import WeightOptions
    from elmexport.exporting import export_checkpoint

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            model, quant = name.split("-", 1)
            model = {"moe": "tiny-moe"}.get(model, model)
            tokenizer = None if model.startswith("tiny") else str(open_checkpoint("tiny").tokenizer_path)
            checkpoint = open_checkpoint(model, random_weights=None if tokenizer is None else 5, tokenizer=tokenizer)
            out = tmp_path_factory.mktemp("onnx") / name
            made[name] = export_checkpoint(checkpoint, "onnx", quant, out=out, verify=False, weights=WeightOptions(calibrate="none")).path
        return made[name]

    yield get
    for folder in made.values():
        shutil.rmtree(folder)


def tokenizer_of(folder: Path) -> Tokenizer:
    """The model's own, where the folder holds it in two forms."""
    return load_tokenizer(next(path for path in (folder / "tokenizer.model", folder / "tokenizer.json") if path.is_file()))


def new_tokens(folder: Path) -> int:
    return NEW_LARGE if folder.name.startswith("270M") else NEW


@kept_result
def greedy(folder: Path) -> Tokens:
    """Prompt and continuation of each prompt, by plain onnxruntime."""
    import onnxruntime

    tokenizer = tokenizer_of(folder)
    session = onnxruntime.InferenceSession(next(folder.glob("onnx/*.onnx")), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    pasts = [entry for entry in session.get_inputs() if entry.name.startswith("past_key_values.")]
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    result, new = [], new_tokens(folder)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        feed: dict[str, Any] = {entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtypes[entry.type]) for entry in pasts}
        fed = 0
        while len(ids) < len(tokenizer.encode(prompt)) + new and (fed == 0 or ids[-1] != tokenizer.eos_id):
            feed |= {"input_ids": np.array([ids[fed:]]), "attention_mask": np.ones((1, len(ids)), np.int64)}
            out = dict(zip(names, session.run(names, feed), strict=True))
            assert out["logits"].shape[1] == 1  # the head of the last token only
            feed |= {entry.name: out[entry.name.replace("past_key_values", "present")] for entry in pasts}
            fed = len(ids)
            ids.append(int(out["logits"][0, -1].argmax()))
        result.append(ids)
    return result


def run(command: Sequence[object], cwd: Path) -> Any:
    """The JSON document on the last line of what the program prints; a failure fails the test."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        pytest.fail(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# onnxruntime-genai

GENAI = """
import json, sys
import onnxruntime_genai as og
folder, shared, new, *prompts = sys.argv[1:]
model = og.Model(folder)
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")
def generate(ids, longest, batch=1):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=longest + int(new), do_sample=False, batch_size=batch, past_present_share_buffer=shared == "shared")
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(i) for i in generator.get_sequence(row)] for row in range(batch)]
ids = [[int(i) for i in tokenizer.encode(prompt)] for prompt in prompts]
alone = [generate(row, len(row))[0] for row in ids]
batch = generate(tokenizer.encode_batch(prompts), max(map(len, ids)), len(prompts))
print(json.dumps({"ids": ids, "alone": alone, "batch": batch,
                  "text": [tokenizer.decode(ids) for ids in alone]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["shared", "growing"])
@pytest.mark.parametrize("name", [*(f"tiny-{quant}" for quant in QUANTS), "270M-int4", *MOE])
def test_onnxruntime_genai(artifact: Artifact, tmp_path: Path, name: str, cache: str) -> None:
    folder = artifact(name)
    expected = greedy(folder)
    found = run([sys.executable, "-c", GENAI, folder, cache, new_tokens(folder), *PROMPTS], tmp_path)
    tokenizer = tokenizer_of(folder)
    assert found["ids"] == [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert found["alone"] == expected
    for ids, row, alone in zip(found["ids"], found["batch"], expected, strict=True):  # rows are padded on the right
        assert row[: len(ids)] == ids
        answer = [i for i in row[len(ids) :] if i != tokenizer.eos_id]
        assert answer == alone[len(ids) :][: len(answer)]
        assert len(answer) > new_tokens(folder) // 2
    if name.startswith("tiny"):
        assert found["text"] == [tokenizer.decode(ids) for ids in expected]


# transformers.js

JAVASCRIPT = """
import { AutoTokenizer, AutoModelForCausalLM, env } from '@huggingface/transformers';
const [, , parent, name, dtype, count, ...prompts] = process.argv;
env.allowRemoteModels = false;
env.localModelPath = parent;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, { dtype });
const generate = async (texts) => {
  const output = await model.generate({ ...tokenizer(texts, { padding: true }), max_new_tokens: Number(count), do_sample: false });
  return { ids: output.tolist().map((row) => row.map(Number)), text: tokenizer.batch_decode(output, { skip_special_tokens: true }) };
};
const alone = [];
for (const prompt of prompts) alone.push(await generate([prompt]));
console.log(JSON.stringify({ alone, batch: await generate(prompts) }));
"""


@pytest.fixture(scope="module")
def transformers_js() -> Path:
    """A folder with `run.mjs` beside the installed library."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.fail("transformers.js needs Node.js: install node and npm")

    def install(folder: Path) -> None:
        (folder / "package.json").write_text(json.dumps({"private": True, "dependencies": {"@huggingface/transformers": TRANSFORMERS_JS}}))
        # Without its install scripts: onnxruntime's would fetch libraries for graphics cards.
        subprocess.run([npm, "install", "--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund"], cwd=folder, check=True)

    folder = kept(f"transformers.js-{TRANSFORMERS_JS}", install)
    (folder / "run.mjs").write_text(JAVASCRIPT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"tiny-{quant}" for quant in QUANTS), "270M-int4", *MOE])
def test_transformers_js(artifact: Artifact, transformers_js: Path, name: str) -> None:
    folder = artifact(name)
    expected = greedy(folder)
    command = ["node", "run.mjs", folder.parent, folder.name, DTYPES[name.split("-", 1)[1]], new_tokens(folder), *PROMPTS]
    check(run(command, transformers_js), expected, folder)


def check(found: Any, expected: Tokens, folder: Path) -> None:
    """`found` holds every prompt alone, and all in a batch with padding on the left."""
    tokenizer = tokenizer_of(folder)
    assert [one["ids"][0] for one in found["alone"]] == expected
    if folder.name.startswith("tiny"):  # other models have more ids than tiny's tokenizer
        assert [one["text"][0] for one in found["alone"]] == [tokenizer.decode(ids) for ids in expected]
    for row, alone in zip(found["batch"]["ids"], expected, strict=True):
        padding = max(map(len, (tokenizer.encode(prompt) for prompt in PROMPTS))) - (len(alone) - new_tokens(folder))
        assert row == [tokenizer.eos_id] * padding + alone


# optimum, in an environment of its own: it needs an older transformers

PYTHON = """
import json, sys
from transformers import AutoTokenizer
from elmexport.integrations.optimum import ORTOpenELMForCausalLM
folders, prompts = json.loads(sys.argv[1]), sys.argv[2:]
def answers(folder, new):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ORTOpenELMForCausalLM.from_pretrained(folder)
    def generate(texts):
        inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        return {"ids": output.tolist(), "text": tokenizer.batch_decode(output, skip_special_tokens=True)}
    return {"alone": [generate([prompt]) for prompt in prompts], "batch": generate(prompts)}
print(json.dumps([answers(folder, new) for folder, new in folders.items()]))
"""


@pytest.fixture(scope="module")
def optimum_packages() -> Path:
    """optimum and the older packages that it needs, to be put before those of this environment, which brings the rest."""

    def install(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *OPTIMUM], check=True)

    return kept("optimum-onnx-0.1.0", install)


@pytest.mark.slow
def test_optimum(artifact: Artifact, optimum_packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process: to start it takes longer than its answers."""
    folders = [artifact(name) for name in (*(f"tiny-{quant}" for quant in QUANTS), "270M-int4")]
    monkeypatch.setenv("PYTHONPATH", f"{optimum_packages}:{ROOT}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = json.dumps({str(folder): new_tokens(folder) for folder in folders})
    found = run([sys.executable, "-c", PYTHON, asked, *PROMPTS], tmp_path)
    for folder, answers in zip(folders, found, strict=True):
        check(answers, greedy(folder), folder)


OPTIMUM_CLI = "import sys; from optimum.commands.optimum_cli import main; sys.argv[0] = 'optimum-cli'; main()"


@pytest.mark.slow
def test_optimum_cli(artifact: Artifact, optimum_packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed elmexport brings the command, which writes what ours writes."""
    own = ROOT
    if not any(Path(place, "optimum/commands/register/register_elmexport.py").is_file() for place in sys.path):
        own = tmp_path / "installed"  # optimum would register twice what it finds in two places
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--target", own, ROOT], check=True)
    monkeypatch.setenv("PYTHONPATH", f"{own}:{optimum_packages}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-c", OPTIMUM_CLI, "export", "openelm", "--model", "tiny", "--quant", "int8", "out"]
    subprocess.run(command, check=True, cwd=tmp_path)
    ours = artifact("tiny-int8")  # codes of 8 bits do not depend on a calibration
    for name in ("onnx/model_quantized.onnx", "onnx/model_quantized.onnx_data", "genai_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (ours / name).read_bytes(), name
    again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (again.returncode, again.stderr.splitlines()[-1].split(";")[0]) == (2, "error: out exists already")
