"""Small vocabularies of every kind, made by the libraries that own the formats."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from elmexport.checkpoint.tokenizer import Tokenizer

PROSE = files("calibration") / "texts" / "weighting.txt"
HEX = "<0x0123456789ABCDEF>"  # the characters of a byte spelled out
# As the models' files have them.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sentencepiece_model(path: Path, lines: Sequence[str] | None = None, **options: Any) -> Path:
    """A model of about `vocab_size` pieces; SentencePiece's own defaults where `options` say nothing."""
    made = io.BytesIO()
    sentences = lines or [line for line in PROSE.read_text(encoding="utf-8").splitlines() if line.strip()][:400]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences, HEX]), model_writer=made, num_threads=1, minloglevel=2, hard_vocab_limit=False, **options
    )
    path.write_bytes(made.getvalue())
    return path


def write_json(model: Path, path: Path) -> Path:
    """The `tokenizer.json` of a SentencePiece BPE model, built with the `tokenizers` library as Llama's is: a merge for every way to
    split a piece into two, in the order of the scores."""
    processor = sentencepiece.SentencePieceProcessor(str(model))
    ids = range(processor.vocab_size())
    vocab = {processor.id_to_piece(i): i for i in ids}
    normal = [i for i in ids if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i))]
    merges = []
    for i in sorted(normal, key=lambda i: -processor.get_score(i)):
        piece = processor.id_to_piece(i)
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted((s for s in splits if s[0] in vocab and s[1] in vocab), key=lambda s: (vocab[s[0]], vocab[s[1]]))
    built = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    built.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<unk>", "<s>", "</s>")])
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    built.decoder = decoders.Sequence(steps)
    built.save(str(path))
    return path


def byte_level(
    path: Path,
    pattern: str = GPT2,
    *,
    digits: bool = False,
    ignore_merges: bool = False,
    nfc: bool = False,
    specials: Sequence[str] = (),
    size: int = 600,
) -> Path:
    """A byte-level BPE's `tokenizer.json`, as GPT-NeoX's, Llama 3's and Qwen's are."""
    built = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if pattern == GPT2:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if digits:
        steps = [pre_tokenizers.Digits(individual_digits=True), *steps]
    built.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    built.decoder = decoders.ByteLevel()
    if nfc:
        built.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    built.train_from_iterator(PROSE.read_text(encoding="utf-8").splitlines()[:400], trainer)
    built.save(str(path))
    return path


def change(path: Path, **parts: Any) -> dict[str, Any]:
    """Replace parts of a JSON file; what it holds then."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    data |= parts
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return data


def added(token_id: int, content: str, **flags: bool) -> dict[str, Any]:
    """An entry of a tokenizer.json's `added_tokens`."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **plain, **flags}


def in_gguf(tokenizer: Tokenizer, path: Path, rows: int | None = None) -> Path:
    """A GGUF file with the vocabulary of `tokenizer` and nothing else."""
    from gguf import GGUFWriter

    from targets.gguf.tokenizer import write_tokenizer

    writer = GGUFWriter(path, "llama")
    write_tokenizer(writer, tokenizer, rows or tokenizer.vocab_size + 3, tokenizer.chat_template)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return path
