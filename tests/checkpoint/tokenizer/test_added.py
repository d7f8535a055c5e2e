"""What lies beside a tokenizer: added tokens with their ids and kinds, the ids that begin and end texts, and the files that programs read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from elmexport.checkpoint import open_checkpoint, open_tokenizer
from elmexport.checkpoint.tokenizer import ModelIds, PieceKind, SpecialIds, load_tokenizer
from elmexport.checkpoint.tokenizer.clients import write_tokenizer_files
from elmexport.checkpoint.tokenizer.huggingface import JsonTokenizer
from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from tests.checkpoint.tokenizer.vocabularies import added, byte_level, change, write_json

MODEL = TINY_FOLDER / "tokenizer.model"
IDS = ModelIds(1, (2,), 4200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of `tiny`'s tokenizer, to put files beside."""
    (tmp_path / "tokenizer.model").write_bytes(MODEL.read_bytes())
    return tmp_path


def described(special: bool, content: str) -> dict[str, Any]:
    return {"content": content, "special": special, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}


def beside(folder: Path, kind: str) -> Path:
    """`tiny`'s vocabulary with <|im_start|> at 4098 and <tool> at 4099, after a gap, in one of the ways that folders have them."""
    tokens = {"4098": described(True, "<|im_start|>"), "4099": described(False, "<tool>")}
    if kind == "tokenizer.json":
        path = write_json(MODEL, folder / "tokenizer.json")
        change(path, added_tokens=[*change(path)["added_tokens"], added(4098, "<|im_start|>"), added(4099, "<tool>", special=False)])
        return path
    if kind == "added_tokens.json":
        change(folder / "added_tokens.json", **{"<|im_start|>": 4098, "<tool>": 4099})
        change(folder / "special_tokens_map.json", additional_special_tokens=["<|im_start|>"])
    else:
        change(folder / "tokenizer_config.json", added_tokens_decoder=tokens)
    return folder / "tokenizer.model"


KINDS = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_keep_ids_and_kinds(folder: Path, kind: str) -> None:
    tokenizer = load_tokenizer(beside(folder, kind), IDS)
    pieces = tokenizer.pieces()
    assert tokenizer.vocab_size == len(pieces) == 4100
    assert [(piece.text, piece.kind) for piece in pieces[4096:]] == [
        ("", PieceKind.UNUSED),
        ("", PieceKind.UNUSED),
        ("<|im_start|>", PieceKind.CONTROL),
        ("<tool>", PieceKind.USER_DEFINED),
    ]
    plain, parsed = (tokenizer.encode("a<|im_start|>b<tool>c", parse_special=parse) for parse in (False, True))
    assert 4098 not in plain and 4099 in plain and {4098, 4099} <= set(parsed)
    assert tokenizer.decode(parsed) == "a b<tool> c" and tokenizer.decode(plain) == "a<|im_start|>b<tool> c"  # Llama's: a space after each


@pytest.mark.parametrize("kind", KINDS)
def test_programs_read_the_same(folder: Path, kind: str) -> None:
    tokenizer = load_tokenizer(beside(folder, kind), IDS)
    out = folder / "artifact"
    out.mkdir()
    write_tokenizer_files(tokenizer, 256, out)
    library = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert (library.token_to_id("<|im_start|>"), library.token_to_id("<tool>")) == (4098, 4099)
    text = "a<|im_start|>b<tool>c</s>"
    assert library.encode(text).ids == tokenizer.encode(text, parse_special=True)
    again = load_tokenizer(out / "tokenizer.json", IDS)
    assert again.pieces()[4096:] == tokenizer.pieces()[4096:] and again.special == replace(tokenizer.special, pad=2)  # programs want one


def test_tokenizer_json_counts(folder: Path) -> None:
    """Where both lie in a model's folder."""
    beside(folder, "tokenizer.json")
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(TINY_FOLDER / name)
    with pytest.raises(
        ElmExportError, match=r"has 4100 pieces, more than the 4096 rows .* \(beyond them the added token '<\|im_start\|>'\)"
    ):
        open_tokenizer(open_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", {"<x>": 300}, r"the id 300 is of '.*', but the added token '<x>' has it too"),
        ("added_tokens.json", {"<x>": "4096"}, r"the id of '<x>' is '4096'; ids are whole numbers"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"4096": "<x>"}}, r"where an id and a token's description belong"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": described(True, "</s>"), "4096": described(True, "<x>")}},
            r"gives '</s>' the id 2, a file beside it 5",
        ),
    ],
)
def test_contradictions_are_errors(folder: Path, name: str, content: dict[str, Any], message: str) -> None:
    change(folder / name, **content)
    with pytest.raises(ElmExportError, match=message):
        load_tokenizer(folder / "tokenizer.model")


def test_damaged_files_beside(folder: Path) -> None:
    for content in (b"{", b"[1]", b"\xff\xfe{}"):
        (folder / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(ElmExportError, match=r"tokenizer_config.json (is not JSON|holds a JSON list|is not UTF-8)"):
            load_tokenizer(folder / "tokenizer.model")


def test_tokens_called_like_control_tokens_are_control_tokens(folder: Path) -> None:
    """llama.cpp treats them so whatever a file says; then every format does."""
    change(folder / "added_tokens.json", **{"<|im_end|>": 4096, "<|fim_prefix|>": 4097, "<tool>": 4098})
    tokenizer = load_tokenizer(folder / "tokenizer.model", IDS)
    kinds = [piece.kind for piece in tokenizer.pieces()[4096:]]
    assert kinds == [PieceKind.CONTROL, PieceKind.CONTROL, PieceKind.USER_DEFINED]


@pytest.mark.slow
def test_what_ends_a_text(folder: Path) -> None:
    change(folder / "added_tokens.json", **{"<stop>": 4096, "<|im_end|>": 4097, "<other>": 4098})
    change(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    tokenizer = load_tokenizer(folder / "tokenizer.model", ModelIds(1, (2, 4096), 4200))
    assert tokenizer.special.eos == (2, 4096, 4097) and tokenizer.eos_id == 2
    kinds = [piece.kind for piece in tokenizer.pieces()[4096:]]
    assert kinds == [PieceKind.CONTROL, PieceKind.CONTROL, PieceKind.USER_DEFINED]  # what ends a text is no text
    assert load_tokenizer(folder / "tokenizer.model").special.eos == (4097,)
    assert load_tokenizer(MODEL, ModelIds(1, (2, 5), 4096)).special.eos == (2, 5)  # a byte: nothing to say against it


def test_ids_that_the_tokenizer_lacks(folder: Path) -> None:
    with pytest.raises(
        ElmExportError, match=r"has no token 4097, which config.json names .* added_tokens.json or tokenizer_config.json must lie beside"
    ):
        load_tokenizer(MODEL, ModelIds(1, (2, 4097), 4200))


@pytest.mark.parametrize(("says", "adds"), [({}, True), ({"add_bos_token": False}, False), ({"add_bos_token": True}, True)])
def test_bos(folder: Path, says: dict[str, bool], adds: bool) -> None:
    change(folder / "tokenizer_config.json", **says)
    tokenizer = load_tokenizer(folder / "tokenizer.model", IDS)
    assert tokenizer.special.adds_bos is adds and (tokenizer.encode("a")[0] == 1) is adds
    none = load_tokenizer(folder / "tokenizer.model", ModelIds(None, (2,), 4096))
    assert none.special.prefix == ((1,) if says.get("add_bos_token") else ())


@pytest.mark.parametrize("model_bos", [0, None])
def test_bos_of_a_file_whose_post_processor_lacks_it(tmp_path: Path, model_bos: int | None) -> None:
    """And which cuts texts off and fills them up: programs get BOS where the model has one, and the whole text."""
    path = byte_level(tmp_path / "tokenizer.json", specials=["<s>", "</s>"])
    library = tokenizers.Tokenizer.from_file(str(path))
    library.enable_truncation(4)
    library.enable_padding(length=9)
    library.save(str(path))
    tokenizer = load_tokenizer(path, ModelIds(model_bos, (1,), 600))
    out = tmp_path / "artifact"
    out.mkdir()
    write_tokenizer_files(tokenizer, 256, out)
    text = "a text that is longer than four tokens"
    found = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).encode(text).ids
    assert found == tokenizer.encode(text) and len(found) > 9 and (found[0] == 0) is (model_bos == 0)


def test_a_complete_file_is_copied(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "tokenizer.json", specials=["</s>"])
    out = tmp_path / "artifact"
    out.mkdir()
    write_tokenizer_files(load_tokenizer(path), 256, out)
    assert (out / "tokenizer.json").read_bytes() == path.read_bytes()
    facts = json.loads((out / "tokenizer_config.json").read_text())
    assert facts["tokenizer_class"] == "PreTrainedTokenizerFast" and not facts["add_bos_token"] and "bos_token" not in facts


def test_control_tokens_named_beside_a_plain_vocabulary(tmp_path: Path) -> None:
    """A file that lists none (made of a GGUF's vocabulary, say), and a tokenizer_config.json that does."""
    path = byte_level(tmp_path / "tokenizer.json", specials=["<|im_start|>", "<|im_end|>"])
    change(path, added_tokens=[])
    change(tmp_path / "tokenizer_config.json", bos_token="<|im_start|>", eos_token="<|im_end|>", add_bos_token=False)
    tokenizer = load_tokenizer(path, ModelIds(0, (1,), 600))
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.special == SpecialIds(bos=0, adds_bos=False, eos=(1,))
    assert [token.content for token in tokenizer.added] == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [1]


def test_fingerprint(folder: Path) -> None:
    """It covers what decides about ids: the file, BOS, ends of text, added tokens."""
    first = load_tokenizer(folder / "tokenizer.model").fingerprint()
    seen = {first, load_tokenizer(folder / "tokenizer.model", ModelIds(1, (2, 5), 4096)).fingerprint()}
    change(folder / "tokenizer_config.json", add_bos_token=False)
    seen.add(load_tokenizer(folder / "tokenizer.model").fingerprint())
    change(folder / "added_tokens.json", **{"<x>": 4096})
    seen.add(load_tokenizer(folder / "tokenizer.model").fingerprint())
    assert len(seen) == 4 and load_tokenizer(MODEL).fingerprint() == first
