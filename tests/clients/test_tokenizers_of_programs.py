"""The tokenizer files of an artifact in the programs that they are for: onnxruntime-genai, transformers.js, transformers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elmexport.checkpoint import open_checkpoint, open_tokenizer
from elmexport.checkpoint.save import save_checkpoint
from elmexport.checkpoint.tokenizer import Tokenizer
from elmexport.checkpoint.tokenizer.chat import user_turn
from elmexport.models.openelm.config import OpenELMConfig
from tests.checkpoint.tokenizer.vocabularies import GPT2, LLAMA3, QWEN2, added, byte_level, change, sentencepiece_model, write_json
from tests.clients.test_onnx_runtimes import run, transformers_js
from tests.conftest import ExportTo
from tests.memory_checkpoint import random_checkpoint

__all__ = ["transformers_js"]  # a fixture

ROWS = 640
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXTS = [
    "Hello, world! It's 1873; they're here.",
    "a<|im_end|>b <|im_start|>user",
    "two  spaces and\n\nnew lines\t",
    "naïve 日本語 🙂",
    "<tool>text</s>",
    "",
]
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True, "model_type": "bpe"}


def llama(folder: Path) -> None:
    sentencepiece_model(folder / "tokenizer.model", vocab_size=500, **LLAMA)
    change(folder / "added_tokens.json", **{"<|im_start|>": 602, "<|im_end|>": 603, "<tool>": 604})
    change(folder / "special_tokens_map.json", additional_special_tokens=["<|im_start|>"])


def llama_json(folder: Path) -> None:
    path = write_json(sentencepiece_model(folder / "made_of.model", vocab_size=500, **LLAMA), folder / "tokenizer.json")
    tokens = [added(602, "<|im_start|>"), added(603, "<|im_end|>"), added(604, "<tool>", special=False)]
    change(path, added_tokens=[*change(path)["added_tokens"], *tokens])


def bytes_of(pattern: str, **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = byte_level(folder / "tokenizer.json", pattern, specials=["<s>", "</s>", "<|im_start|>", "<|im_end|>"], **options)
        change(path, added_tokens=[*change(path)["added_tokens"], added(602, "<tool>", special=False)])

    return make


def sentencepiece_of(**options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        sentencepiece_model(folder / "tokenizer.model", **{**LLAMA, "vocab_size": 500, **options})
        change(folder / "added_tokens.json", **{"<|im_start|>": 602, "<|im_end|>": 603})
        change(folder / "special_tokens_map.json", additional_special_tokens=["<|im_start|>"])

    return make


MODELS: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {
    "Llama, added tokens": (llama, {"eos_token_id": [2, 603]}),
    "Llama, tokenizer.json": (llama_json, {"eos_token_id": 603}),
    "no space before texts": (sentencepiece_of(add_dummy_prefix=False), {"eos_token_id": [2, 603]}),
    "GPT-NeoX": (bytes_of(GPT2, nfc=True), {"bos_token_id": None, "eos_token_id": 1}),
    "Llama 3": (bytes_of(LLAMA3, ignore_merges=True), {"bos_token_id": 0, "eos_token_id": [3, 1]}),
    "Qwen": (bytes_of(QWEN2, nfc=True), {"bos_token_id": None, "eos_token_id": [3, 1]}),
}


@pytest.fixture(scope="module", params=MODELS)
def artifact(
    request: pytest.FixtureRequest, small_config: OpenELMConfig, export_to: ExportTo, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tokenizer]:
    """The ONNX artifact of a chat model with such a vocabulary, and the model's own tokenizer."""
    make, ids = MODELS[request.param]
    folder = tmp_path_factory.mktemp("model") / "chat"
    checkpoint = random_checkpoint(replace(small_config, vocab_size=ROWS))
    save_checkpoint(folder, checkpoint.config, {name: checkpoint.tensor(name) for name in checkpoint.specs})
    change(folder / "config.json", **ids)
    make(folder)
    change(folder / "tokenizer_config.json", chat_template=CHATML)
    opened = open_checkpoint(str(folder))
    tokenizer = open_tokenizer(opened)
    assert tokenizer is not None
    return export_to(opened, "onnx", "int8"), tokenizer


@pytest.mark.slow
def test_ids_in_the_small_files(artifact: tuple[Path, Tokenizer]) -> None:
    folder, tokenizer = artifact
    eos = list(tokenizer.special.eos)
    for name, part in (("generation_config.json", None), ("genai_config.json", "model")):
        facts = json.loads((folder / name).read_text())
        facts = facts if part is None else facts[part]
        assert facts["eos_token_id"] == (eos[0] if len(eos) == 1 else eos), name
        assert facts.get("bos_token_id") == tokenizer.bos_id, name


def expected(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = [tokenizer.encode(text, parse_special=True) for text in TEXTS]
    return {
        "ids": ids,
        "text": [tokenizer.decode(row) for row in ids],
        "chat": tokenizer.encode_spans(user_turn(tokenizer, "Who is there?")),
    }


GENAI = """
import json, sys
import onnxruntime_genai as og
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = og.Tokenizer(og.Model(folder))
chat = tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": "Who is there?"}]), add_generation_prompt=True)
tokenizer.update_options(add_special_tokens="false")
chat = [int(i) for i in tokenizer.encode(chat)]
tokenizer.update_options(add_special_tokens="true")
ids = [[int(i) for i in tokenizer.encode(text)] for text in texts]
print(json.dumps({"ids": ids, "text": [tokenizer.decode(row) for row in ids], "chat": chat}))
"""


@pytest.mark.slow
def test_onnxruntime_genai(artifact: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    folder, tokenizer = artifact
    found = run([sys.executable, "-c", GENAI, folder, json.dumps(TEXTS)], tmp_path)
    wanted = expected(tokenizer)
    assert found["chat"] == wanted["chat"]
    for text, ours, theirs in zip(TEXTS, wanted["ids"], found["ids"], strict=True):
        assert theirs == ours, text


JAVASCRIPT = """
import { AutoTokenizer, env } from '@huggingface/transformers';
const [, , parent, name, texts] = process.argv;
env.allowRemoteModels = false;
env.localModelPath = parent;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const ids = JSON.parse(texts).map((text) => tokenizer.encode(text));
const chat = tokenizer.apply_chat_template([{ role: 'user', content: 'Who is there?' }], { add_generation_prompt: true, return_tensor: false, return_dict: false });
console.log(JSON.stringify({ ids, text: ids.map((row) => row.length ? tokenizer.decode(row, { skip_special_tokens: true }) : ''), chat }));
"""


@pytest.mark.slow
def test_transformers_js(artifact: tuple[Path, Tokenizer], transformers_js: Path) -> None:
    folder, tokenizer = artifact
    shutil.copytree(folder, transformers_js / "models" / folder.name, dirs_exist_ok=True)
    (transformers_js / "tokenize.mjs").write_text(JAVASCRIPT)
    found = run(["node", "tokenize.mjs", transformers_js / "models", folder.name, json.dumps(TEXTS)], transformers_js)
    shutil.rmtree(transformers_js / "models")
    assert found == expected(tokenizer)


def test_transformers(artifact: tuple[Path, Tokenizer]) -> None:
    from transformers import AutoTokenizer

    folder, tokenizer = artifact
    theirs = AutoTokenizer.from_pretrained(str(folder))
    ids = [theirs(text)["input_ids"] for text in TEXTS]
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "Who is there?"}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    found = {"ids": ids, "text": [theirs.decode(row, skip_special_tokens=True) for row in ids], "chat": chat}
    assert found == expected(tokenizer)
