"""What llama.cpp itself makes of a checkpoint, to hold our files against."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader

from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.save import save_checkpoint
from tests.clients.llama_cpp_tools import LlamaCppTools

# What Llama's tokenizer comes with, in short.
TOKENIZER_CONFIG = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# What OLMo's comes with; names are those of the small vocabularies here.
BYTE_LEVEL_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": False,
    "add_eos_token": False,
    "eos_token": "<|endoftext|>",
    "pad_token": "<|padding|>",
}
FLOATS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


@dataclass
class LlamaCppFiles:
    """`checkpoint`, saved as published ones are in a folder of its name, converted and quantized by llama.cpp, each once.

    `pre` names the pre-tokenizer of a byte-level vocabulary.
    """

    tools: LlamaCppTools
    checkpoint: Checkpoint
    folder: Path
    made: dict[str, Path] = field(default_factory=dict)
    pre: str = ""

    @property
    def model(self) -> Path:
        """The checkpoint's folder."""
        return self.folder / self.checkpoint.source.name

    def save(self, dtype: torch.dtype = torch.float32, *, tokenizer_config: bool = True, shards: int = 1) -> None:
        weights = {name: self.checkpoint.tensor(name).to(dtype) for name in self.checkpoint.specs}
        save_checkpoint(self.model, self.checkpoint.config, weights, shards=shards)
        if self.checkpoint.tokenizer_path is not None:
            shutil.copyfile(self.checkpoint.tokenizer_path, self.model / self.checkpoint.tokenizer_path.name)
        if self.pre:
            (self.model / "tokenizer_config.json").write_text(json.dumps(BYTE_LEVEL_CONFIG), encoding="utf-8")
        elif tokenizer_config:
            (self.model / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG), encoding="utf-8")
            config = self.model / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"unk_token_id": 0}), encoding="utf-8")

    def file(self, quant: str, *arguments: object) -> Path:
        """The file for one of our `--quant` names; `arguments` are `llama-quantize`'s."""
        key = " ".join(map(str, [quant, *arguments]))
        if key not in self.made:
            whole = None if quant in FLOATS else self.file("fp32")
            folder = self.folder / f"made-{len(self.made)}"
            folder.mkdir()
            if whole is None:
                self.tools.convert(self.model, folder, FLOATS[quant], pre=self.pre)
            else:
                name = whole.name.replace("-F32.", f"-{quant.upper()}.")
                self.tools.run("llama-quantize", *arguments, whole, folder / name, quant, 2)
            (self.made[key],) = folder.glob("*.gguf")
        return self.made[key]


def differences(ours: Path, theirs: Path) -> list[str]:
    """What a reader finds different in two files, in words; their order and their bytes included."""
    if ours.read_bytes() == theirs.read_bytes():
        return []
    a, b = GGUFReader(ours), GGUFReader(theirs)
    facts = [{name: (f.types, f.contents()) for name, f in reader.fields.items() if not name.startswith("GGUF.")} for reader in (a, b)]
    found = [f"key {name} is ours alone" for name in facts[0] if name not in facts[1]]
    found += [f"key {name} is theirs alone" for name in facts[1] if name not in facts[0]]
    common = [[name for name in one if name in other] for one, other in (facts, reversed(facts))]
    found += [f"value of {name}" for name in common[0] if facts[0][name] != facts[1][name]]
    if common[0] != common[1]:
        found.append("order of keys")
    tensors: list[dict[str, Any]] = [{tensor.name: tensor for tensor in reader.tensors} for reader in (a, b)]
    if list(tensors[0]) != list(tensors[1]):
        found.append("names or order of tensors")
    for name in tensors[0].keys() & tensors[1].keys():
        one, other = tensors[0][name], tensors[1][name]
        if one.tensor_type is not other.tensor_type:
            found.append(f"type of {name}: {one.tensor_type.name}, theirs {other.tensor_type.name}")
        elif one.data.tobytes() != other.data.tobytes():
            found.append(f"bytes of {name}")
    if a.alignment != b.alignment:
        found.append("alignment")
    return found or ["bytes that a reader does not see"]
