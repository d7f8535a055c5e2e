"""`elmexport generate`, on the checkpoint folder of `tiny`."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.runtimes.text import StopStrings
from tests.cli.conftest import Run

PROMPT = "It was a dark"


@pytest.mark.slow
def test_greedy_is_the_default_and_repeats_itself(run: Run) -> None:
    texts = [run("generate", TINY_FOLDER, PROMPT, "--max-tokens", "8") for _ in range(2)]
    assert texts[0].code == 0, texts[0].err
    assert texts[0] == texts[1]
    assert texts[0].out.endswith("\n") and not texts[0].out.startswith("It was") and len(texts[0].out.split()) > 1
    assert texts[0].err == ""


@pytest.mark.slow
def test_is_what_the_reference_finds_most_likely(run: Run) -> None:
    from elmexport.checkpoint.tokenizer import load_tokenizer
    from elmexport.runtimes import open_artifact

    tokenizer = load_tokenizer(TINY_FOLDER / "tokenizer.model")
    ids = tokenizer.encode(PROMPT)
    assert ids[0] == 1
    prompt = tokenizer.decode(ids)
    runtime = open_artifact(TINY_FOLDER)
    for _ in range(4):  # each step a forward pass of the whole text, no cache
        ids.append(int(runtime.logits(ids)[-1].argmax()))
    assert run("generate", TINY_FOLDER, PROMPT, "--max-tokens", "4").out == tokenizer.decode(ids)[len(prompt) :] + "\n"


@pytest.mark.slow
def test_sampling_follows_the_seed(run: Run) -> None:
    options = ("--max-tokens", "12", "--temperature", "1.2", "--top-k", "200", "--top-p", "0.99", "--seed")
    texts = [run("generate", TINY_FOLDER, PROMPT, *options, seed).out for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_a_full_context_is_noted(run: Run) -> None:
    outcome = run("generate", TINY_FOLDER, "word " * 250, "--max-tokens", "500")
    assert outcome.code == 0
    assert outcome.err.startswith("note: stopped because the context is full")


def test_another_tokenizer(run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(TINY_FOLDER, tmp_path / "model")
    (folder / "tokenizer.model").rename(tmp_path / "other.model")
    run("generate", folder, PROMPT).refused("no tokenizer", "--tokenizer PATH")
    assert run("generate", folder, PROMPT, "--tokenizer", "other.model", "--max-tokens", "4").code == 0
    run("generate", folder, PROMPT, "--tokenizer", "none.model").refused("none.model: no such tokenizer file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-tokens", "0"), "max-tokens is 0; it must be 1 or above"),
        (("--temperature", "-1"), "temperature is -1"),
        (("--temperature", "1", "--top-k", "0"), "top-k is 0"),
        (("--temperature", "1", "--top-p", "1.5"), "top-p is 1.5"),
        (("--top-p", "0.5"), "no effect at temperature 0"),
    ],
)
def test_bad_settings(run: Run, options: tuple[str, ...], message: str) -> None:
    run("generate", TINY_FOLDER, PROMPT, *options).refused(message)


def test_nothing_there(run: Run) -> None:
    run("generate", "nowhere", PROMPT).refused("nowhere: no such file or folder; give the folder that an export printed")


def test_a_prompt_that_is_not_text(run: Run) -> None:
    run("generate", TINY_FOLDER, "a\udcffb").refused("the prompt 'a\\udcffb' is not text", "use UTF-8")


def test_a_prompt_too_long(run: Run) -> None:
    run("generate", TINY_FOLDER, "word " * 300).refused("need a context of", "this artifact holds 256")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with two more rows for ChatML's tokens; either ends a text."""
    import torch

    from elmexport.checkpoint import open_checkpoint
    from elmexport.checkpoint.save import save_checkpoint

    folder = tmp_path_factory.mktemp("chat") / "model"
    tiny = open_checkpoint("tiny")
    table = "transformer.token_embeddings.weight"
    weights = {name: tiny.tensor(name) for name in tiny.specs}
    weights[table] = torch.cat([weights[table], weights[table][[300, 301]]])
    save_checkpoint(folder, replace(tiny.config, vocab_size=4098), weights)
    shutil.copy(TINY_FOLDER / "tokenizer.model", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 4097]}')
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 4096, "<|im_end|>": 4097}')
    (folder / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<|im_start|>"]}')
    (folder / "chat_template.jinja").write_text("<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant\n")
    return folder


@pytest.mark.slow
def test_chat(run: Run, chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template goes around what the user says, whose own control tokens are text."""
    from elmexport.runtimes import text as module

    asked: list[tuple[list[int], tuple[int, ...]]] = []
    generate = module.generate

    def watched(runtime: Any, ids: list[int], **options: Any) -> Any:
        asked.append((ids, options["eos_ids"]))
        return generate(runtime, ids, **options)

    monkeypatch.setattr(module, "generate", watched)
    outcome = run("generate", chat_model, "Say <|im_end|> please", "--chat", "--max-tokens", "4")
    assert outcome.code == 0 and outcome.out.strip(), outcome.err
    ((ids, ends),) = asked
    assert (ids[0], ids.count(4096), ids.count(4097), ends) == (4096, 2, 1, (2, 4097))
    assert run("generate", chat_model, "Say please", "--max-tokens", "4").code == 0
    assert asked[1][0][0] == 1 and 4096 not in asked[1][0]  # without --chat a text after BOS


@pytest.mark.slow
def test_chat_in_an_artifact(run: Run, chat_model: Path, tmp_path: Path) -> None:
    """The template and the ends of text travel; GGUF carries them inside."""
    said = ("Who is there?", "--chat", "--max-tokens", "6")
    wanted = run("generate", chat_model, *said).out
    for target in ("onnx", "gguf"):
        out = tmp_path / target
        assert run(target, "--model", chat_model, "--quant", "fp32", "--out", out, "--no-verify").code == 0
        assert run("generate", out, *said).out == wanted, target


def test_chat_without_a_template(run: Run) -> None:
    run("generate", TINY_FOLDER, "Hi", "--chat").refused("comes without a chat template", "leave out --chat")


@pytest.mark.parametrize("prompt", ["", "🙂🎉👩‍👩‍👧‍👦", "\n"])
def test_unusual_prompts(run: Run, prompt: str) -> None:
    """Nothing but BOS, characters that are not in the vocabulary, a line end."""
    outcome = run("generate", TINY_FOLDER, prompt, "--max-tokens", "4")
    assert (outcome.code, outcome.err) == (0, "") and outcome.out.endswith("\n")


def test_ten_thousand_characters(run: Run) -> None:
    run("generate", TINY_FOLDER, "a" * 10_000).refused("the prompt has 10001 tokens", "this artifact holds 256", "shorten the prompt")


@pytest.mark.slow
def test_stop_strings(run: Run) -> None:
    whole = json.loads(run("generate", TINY_FOLDER, PROMPT, "--max-tokens", "24", "--json").out)
    assert (whole["stop"], len(whole["tokens"])) == ("max tokens", 24)
    text = whole["text"]
    for stop in (text[9:13], text[5:6], "never said"):
        found = json.loads(run("generate", TINY_FOLDER, PROMPT, "--max-tokens", "24", "--stop", "never", "--stop", stop, "--json").out)
        assert found["text"] == text.partition(stop)[0]
        assert found["stop"] == ("stop string" if stop in text else "max tokens")
    run("generate", TINY_FOLDER, PROMPT, "--stop", "").refused("a stop string is empty")


def test_stop_strings_across_pieces() -> None:
    """What may be the beginning of a stop string is held back until it is none, and no longer."""
    ends = StopStrings(("abc", "bd"))
    assert [ends.feed(piece) for piece in ("xa", "b", "x", "ab", "", "d", "more")][:6] == ["x", "", "abx", "", "", "a"]
    assert ends.found
    ends = StopStrings(("abc",))
    assert (ends.feed("zab"), ends.finish(), ends.found) == ("z", "ab", False)


@pytest.mark.slow
def test_guesses(run: Run) -> None:
    plain = run("generate", TINY_FOLDER, PROMPT, "--max-tokens", "48")
    for options in (("--prompt-lookup", "4"), ("--draft-model", TINY_FOLDER, "--num-draft-tokens", "3"), ("--draft-model", "tiny")):
        outcome = run("generate", TINY_FOLDER, PROMPT, "--max-tokens", "48", *options)
        assert (outcome.code, outcome.out) == (0, plain.out)
        assert re.fullmatch(
            r"note: \d+ of \d+ guesses accepted, [\d.]+ in a step; [\d.]+ tokens/s, [\d.]+ times plain decoding\n", outcome.err
        )
    both = ("--prompt-lookup", "4", "--draft-model", TINY_FOLDER)
    run("generate", TINY_FOLDER, PROMPT, *both).refused("--prompt-lookup and --draft-model exclude each other")


@pytest.mark.slow
def test_many_prompts(run: Run) -> None:
    Path("lines.txt").write_text("It was a dark\n\nOnce upon é\r\n", encoding="utf-8")
    Path("rows.jsonl").write_text('{"prompt": "It was a dark", "id": 1}\n"Once upon \\u00e9"\n', encoding="utf-8")
    ones = [
        json.loads(run("generate", TINY_FOLDER, prompt, "--max-tokens", "6", "--json").out) for prompt in ("It was a dark", "Once upon é")
    ]
    for file in ("lines.txt", "rows.jsonl"):
        found = json.loads(run("generate", TINY_FOLDER, "--prompts", file, "--max-tokens", "6", "--json").out)["completions"]
        assert [(one["prompt"], one["tokens"]) for one in found] == [(one["prompt"], one["tokens"]) for one in ones]
    shown = run("generate", TINY_FOLDER, "--prompts", "lines.txt", "--max-tokens", "6").out
    assert shown == "\n".join(f"{one['prompt']}{one['text']}\n" for one in ones)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot read none.txt"),
        ("empty.txt", b"\n \n", "empty.txt holds no prompt"),
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 text"),
        ("bad.jsonl", b'"a"\n{"text": "b"}', "bad.jsonl, line 2 holds no prompt"),
        ("worse.jsonl", b"{", "worse.jsonl, line 1 is not JSON"),
    ],
)
def test_bad_files_of_prompts(run: Run, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    run("generate", TINY_FOLDER, "--prompts", name).refused(message)


def test_a_prompt_or_prompts(run: Run) -> None:
    run("generate", TINY_FOLDER).refused("give a prompt, or --prompts FILE")
    run("generate", TINY_FOLDER, "Hi", "--prompts", "x.txt").refused("give a prompt, or --prompts FILE")


@pytest.fixture(scope="module")
def long_chat_model(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`chat_model` whose template takes any number of turns."""
    folder = shutil.copytree(chat_model, tmp_path_factory.mktemp("chat") / "long")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    return folder


@pytest.mark.slow
def test_a_session_from_a_pipe(long_chat_model: Path) -> None:
    """A turn a line; each answer is what the same turns give at once."""
    from elmexport.checkpoint.tokenizer.chat import Message, chat_spans
    from elmexport.runtimes.text import TextOptions, open_text_model

    command = [sys.executable, "-m", "elmexport", "generate", str(long_chat_model), "--chat", "--max-tokens", "6"]
    done = subprocess.run(command, input="Who is there?\n\nSay <|im_end|> please\n", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    model, said, out = open_text_model(long_chat_model), [], ""
    for line in ("Who is there?", "Say <|im_end|> please"):
        said.append(Message("user", line))
        ids = model.tokenizer.encode_spans(chat_spans(model.tokenizer, said))
        assert ids.count(4097) == len(said)  # one that ends each turn: what a user types stays text
        answer = model.complete_ids(ids, TextOptions(6)).text
        said.append(Message("assistant", answer))
        out += answer + "\n"
    assert done.stdout == out


@pytest.mark.slow
def test_many_turns_that_are_first_ones(run: Run, long_chat_model: Path) -> None:
    Path("turns.txt").write_text("Who is there?\nSay <|im_end|> please\n", encoding="utf-8")
    found = json.loads(run("generate", long_chat_model, "--chat", "--prompts", "turns.txt", "--max-tokens", "6", "--json").out)[
        "completions"
    ]
    for one in found:
        alone = json.loads(run("generate", long_chat_model, one["prompt"], "--chat", "--max-tokens", "6", "--json").out)
        assert (one["text"], one["tokens"], one["prompt_tokens"]) == (alone["text"], alone["tokens"], alone["prompt_tokens"])


@pytest.mark.slow
def test_what_no_longer_fits_is_forgotten(long_chat_model: Path) -> None:
    from elmexport.runtimes.chat import Chat
    from elmexport.runtimes.text import TextOptions, open_text_model

    chat, notes = Chat(open_text_model(long_chat_model), TextOptions(8)), []
    for _ in range(6):
        chat.say("word " * 45, lambda piece: None, notes.append)
    assert notes[0] == "the oldest turn is forgotten: the context holds 256 tokens" and len(notes) >= 2
    assert 2 <= len(chat.messages) < 12
    with pytest.raises(ElmExportError, match="this artifact holds 256"):
        chat.say("word " * 400, lambda piece: None)


@pytest.mark.slow
def test_a_session_on_a_terminal(long_chat_model: Path, tmp_path: Path) -> None:
    """Ctrl-C stops an answer and Ctrl-D ends; commands are no turns."""
    child, master = pty.fork()
    if not child:
        command = [sys.executable, "-m", "elmexport", "generate", str(long_chat_model), "--chat", "--max-tokens", "200"]
        os.chdir(tmp_path)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background
        os.execve(sys.executable, command, {**os.environ, "TERM": "dumb"})
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(master, 4096)
        shown = shown.partition(text)[2]

    until(b"> ")
    os.write(master, b"Tell me a story\n")
    until(b"Tell me a story\r\n")
    while not shown.strip():  # the answer has begun
        shown += os.read(master, 4096)
    os.write(master, b"\x03")
    until(b"note: stopped")
    until(b"> ")
    os.write(master, b"/save talk.json\n")
    until(b"wrote talk.json")
    os.write(master, b"/nonsense\n")
    until(b"/nonsense is no command")
    os.write(master, b"/reset\n")
    until(b"forgotten")
    until(b"> ")
    os.write(master, b"\x04")
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    user, assistant = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert user == {"role": "user", "content": "Tell me a story"}
    assert assistant["role"] == "assistant"
