"""Chat in the form of the Instruct model's template, with OLMoE's kind of tokenizer: byte-level, and no BOS."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from elmexport.checkpoint import open_checkpoint, open_tokenizer
from elmexport.checkpoint.tokenizer.chat import Message, chat_spans
from elmexport.exporting import export
from elmexport.models.olmoe.catalog import TINY_FOLDER
from elmexport.runtimes.llama_cpp_tokenizer import LlamaCppTokenizer

# Marks of roles as plain text, the end of text after what the assistant said.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
TALK = [Message("user", "What is <it>?"), Message("assistant", "A lamp."), Message("user", "two\nlines")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instruct") / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copyfile(TINY_FOLDER / name, folder / name)
    eos = next(token["content"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"] if token["id"] == 0)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": TEMPLATE})
    )
    return folder


def test_as_transformers_renders_and_tokenizes(model: Path) -> None:
    tokenizer = open_tokenizer(open_checkpoint(str(model)))
    assert tokenizer is not None and tokenizer.chat_template == TEMPLATE
    theirs = transformers.AutoTokenizer.from_pretrained(str(model))
    messages = [{"role": message.role, "content": message.content} for message in TALK]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tokenizer.encode_spans(chat_spans(tokenizer, TALK)) == expected
    assert expected.count(0) == 1  # after the answer; nothing begins the text


@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_it_travels(model: Path, target: str, tmp_path: Path) -> None:
    export(str(model), target, out=tmp_path / "out", verify=False)
    folder = next((tmp_path / "out").rglob("tokenizer_config.json")).parent
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


def test_llama_cpp_finds_it_and_the_same_tokens(model: Path, tmp_path: Path) -> None:
    export(str(model), "gguf", out=tmp_path / "out", verify=False)
    (path,) = (tmp_path / "out").glob("*.gguf")
    found, tokenizer = LlamaCppTokenizer(path), open_tokenizer(open_checkpoint(str(model)))
    assert tokenizer is not None and found.chat_template == TEMPLATE
    assert found.encode_spans(chat_spans(found, TALK)) == tokenizer.encode_spans(chat_spans(tokenizer, TALK))
