"""Kinds of input, and the commands that a spoilt one is given to: the program's own, from their arguments on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Command = Sequence[str]


@dataclass(frozen=True)
class Kind:
    """A kind of input: the folder of the corpus that holds it, the files in it that are spoilt, and commands, of which one is drawn.

    `rehash`: the manifest is made to agree with the spoilt file, so that what reads it is reached.
    """

    folder: str
    files: tuple[str, ...]  # patterns
    commands: Callable[[Path, Path, Path], Sequence[Command]]  # by the corpus, the copied folder, and where to write
    rehash: bool = False


def _export(*options: str, target: str = "gguf") -> Callable[[Path, Path, Path], Sequence[Command]]:
    return lambda corpus, folder, out: [
        (target, *(part.format(corpus=corpus, folder=folder) for part in options), "--out", str(out), "--no-verify")
    ]


_MODEL = ("--model", "{folder}", "--quant", "f16", "--calibrate", "none")
_INT4 = ("--model", "{corpus}/model", "--quant", "int4")


def _of_artifact(*more: Command, bare: str = "") -> Callable[[Path, Path, Path], Sequence[Command]]:
    def commands(corpus: Path, folder: Path, out: Path) -> Sequence[Command]:
        paths = [str(folder), *map(str, folder.glob(bare) if bare else ())]
        answers = [("generate", path, "hello there", "--max-tokens", "2", *_tokenizer(corpus, path, folder)) for path in paths]
        fixed = [[part.format(folder=folder, bare=paths[-1]) for part in command] for command in more]
        return [("inspect", str(folder), "--tensors"), ("inspect", str(folder), "--json"), *answers, *fixed]

    return commands


def _tokenizer(corpus: Path, path: str, folder: Path) -> Command:
    return () if path == str(folder) or path.endswith(".gguf") else ("--tokenizer", str(corpus / "model" / "tokenizer.model"))


def _of_tokenizer(corpus: Path, folder: Path, out: Path) -> Sequence[Command]:
    exports = [
        (target, "--model", str(folder), "--quant", quant, "--calibrate", "none", "--out", str(out), "--no-verify")
        for target, quant in (("gguf", "f16"), ("onnx", "fp32"))
    ]
    return [*exports, ("generate", str(folder), "hello there", "--max-tokens", "2")]


def _of_chat(corpus: Path, folder: Path, out: Path) -> Sequence[Command]:
    return [*_of_tokenizer(corpus, folder, out)[:2], ("generate", str(folder), "hello there", "--max-tokens", "2", "--chat")]


def _of_report(corpus: Path, folder: Path, out: Path) -> Sequence[Command]:
    file = str(folder / "a.json")
    return [
        ("report", file),
        ("report", file, "--json"),
        *(("report", file, file, "--out", f"{out}{suffix}") for suffix in (".html", ".md")),
    ]


def _of_rows(corpus: Path, folder: Path, out: Path) -> Sequence[Command]:
    options = ("--against", "none", "--text-tokens", "0", "--limit", "2")
    return [("eval", str(corpus / "onnx"), "--data", str(folder), "--tasks", "arc_easy,piqa", *options)]


KINDS: Mapping[str, Kind] = {
    "config": Kind("model", ("config.json",), _export(*_MODEL)),
    "generation-config": Kind("model", ("generation_config.json",), _export(*_MODEL)),
    "safetensors": Kind("model", ("model.safetensors",), _export(*_MODEL)),
    "index": Kind("shards", ("model.safetensors.index.json",), _export(*_MODEL)),
    "corenet-pt": Kind("pt", ("model.pt",), _export(*_MODEL)),
    "pytorch-bin": Kind("bin", ("pytorch_model.bin",), _export(*_MODEL)),
    "tokenizer-json": Kind("json", ("tokenizer.json",), _of_tokenizer),
    "tokenizer-model": Kind("model", ("tokenizer.model",), _of_tokenizer),
    "tokenizer-config": Kind(
        "beside", ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"), _of_chat
    ),
    "recipe": Kind("recipe", ("mine.toml",), _export("--model", "{corpus}/model", "--quant", "{folder}/mine.toml", "--calibrate", "none")),
    "statistics": Kind("statistics", ("a.safetensors",), _export(*_INT4, "--calibrate", "{folder}/a.safetensors", "--method", "mse")),
    "weights": Kind("weights", ("a.safetensors",), _export(*_INT4, "--weights-from", "{folder}/a.safetensors")),
    "imatrix": Kind("imatrix", ("a.gguf",), _export("--model", "{corpus}/model", "--quant", "q4_k_m", "--imatrix", "{folder}/a.gguf")),
    "manifest": Kind("manifest", ("manifest.json",), _of_artifact(("lint", "{folder}"))),
    "report": Kind("report", ("a.json",), _of_report),
    "rows": Kind("rows", ("*.jsonl",), _of_rows),
    "gguf": Kind("gguf", ("*.gguf",), _of_artifact(bare="*.gguf"), rehash=True),
    "onnx": Kind("onnx", ("onnx/*", "*config.json", "tokenizer.*"), _of_artifact(bare="onnx/*.onnx"), rehash=True),
    "coreml": Kind("coreml", ("*.mlpackage/**/*", "config.json"), _of_artifact(("lint", "{bare}"), bare="*.mlpackage"), rehash=True),
    "mlx": Kind("mlx", ("config.json", "model.safetensors*", "tokenizer*"), _of_artifact(), rehash=True),
}
