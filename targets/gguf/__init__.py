"""GGUF target: a self-contained file, or several, for llama.cpp.

Covered: every type that people ask of `llama-quantize` down to Q2_K, importance matrices, chat templates, split files. Not covered: the
types below that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.quantization.ggml import GgmlType
from elmexport.quantization.ggml_coded import GgmlCoded
from elmexport.quantization.recipes import Recipe
from elmexport.quantization.schemes import Scheme
from elmexport.target import ExportJob, Target, Usage, option
from elmexport.weights import Role

if TYPE_CHECKING:
    from elmexport.checkpoint.tokenizer import Tokenizer
    from targets.gguf.imatrix import ImportanceMatrix

# llama.cpp's names for recipes that are the same bytes.
ALIASES: Mapping[str, str] = {"f32": "fp32", "f16": "fp16", "q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
OURS = ("int4", "int8", "fp16", "bf16", "fp32")
LLAMA_CPPS = (
    *("q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
    *("iq4_nl", "iq4_xs"),
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}  # as llama.cpp's tools read sizes


@dataclass(frozen=True)
class GgufTarget(Target):
    """GGUF target: `<model>-<TYPE>.gguf`, which carries configuration and tokenizer, and a `Modelfile` for Ollama."""

    imatrix: Path | None = field(
        default=None,
        metadata=option("Importance matrix in llama.cpp's GGUF form, for the quantizations that llama.cpp names.", metavar="FILE"),
    )
    chat_template: Path | None = field(
        default=None,
        metadata=option("Chat template to put into the file: Jinja text, or a tokenizer_config.json that has one.", metavar="FILE"),
    )
    split_max_size: str | None = field(
        default=None,
        metadata=option("Split into files of at most so many bytes of weights each: 500M, 2G. [default: one file]", metavar="SIZE"),
    )

    name: ClassVar[str] = "gguf"
    quants: ClassVar[tuple[str, ...]] = (*OURS, *LLAMA_CPPS)
    quants_note: ClassVar[str] = "Those of llama.cpp are its own, byte for byte; they need ggml's quantizer: pip install 'elmexport[ggml]'"
    example: ClassVar[str] = "--model 1.1B-Instruct --quant q4_k_m --context 1024"

    def recipe(self, quant: str) -> Recipe:
        return super().recipe(ALIASES.get(quant.lower(), quant.lower()))

    def adapt(self, recipe: Recipe) -> Recipe:
        if any(isinstance(rule.scheme, GgmlType) for rule in recipe.rules):
            from targets.gguf.ggml import require

            require()
        elif self.imatrix is not None:
            raise ElmExportError(
                f"--imatrix has no use with --quant {recipe.name}; choose one of ggml's quantizations, {', '.join(LLAMA_CPPS)}"
            )
        recipe = recipe.given(imatrix=self.imatrix is not None)
        return recipe if self.imatrix is None else replace(recipe, words=f"{recipe.words}; with an importance matrix")

    def refuses(self, scheme: Scheme, role: Role) -> str | None:
        from targets.gguf.packing import TYPES

        if scheme in TYPES:
            return None
        plain = (known.recipe_name for known in TYPES if not isinstance(known, GgmlType | GgmlCoded))
        return f"stores {', '.join(plain)}, and ggml's own types"

    def usage(self, files: Sequence[str]) -> Sequence[Usage]:
        first = min(name for name in files if name.endswith(".gguf"))  # of a split file, which names the others
        usages = [Usage("llama.cpp", f'llama-cli -m {first} -p "Once upon a time"')]
        if "Modelfile" in files:
            usages.append(Usage("Ollama", "ollama create my-model -f Modelfile\nollama run my-model"))
        return usages

    def check(self, config: ModelConfig, context: int) -> None:
        from targets.gguf.families import architecture

        architecture(config).check(config)
        _ = self._limit, self._template
        if self._importance is not None:
            from targets.gguf.lowering import matrices

            self._importance.check((name, entry.tensor_shape) for entry in matrices(config) for name in entry.names)

    def check_tokenizer(self, tokenizer: Tokenizer) -> Sequence[str]:
        from targets.gguf.tokenizer import ends, find_vocabulary

        notes = find_vocabulary(tokenizer).notes
        without_place = ends(tokenizer)[1]
        if without_place:
            names = ", ".join(repr(tokenizer.pieces()[i].text) for i in without_place)
            return (*notes, f"a GGUF file names three tokens that end a text; it has no place for {names}")
        return notes

    def write(self, job: ExportJob, folder: Path) -> None:
        from targets.gguf.ollama import write_modelfile
        from targets.gguf.writer import write_gguf

        template = self._template or (None if job.tokenizer is None else job.tokenizer.chat_template)
        paths = write_gguf(job, folder, self._importance, template, self._limit)
        if len(paths) == 1:  # Ollama takes no split files
            write_modelfile(folder, paths[0], job.graph.context, chat=template is not None)

    def tools(self) -> Mapping[str, str]:
        return {"gguf": version("gguf")}

    @cached_property
    def _importance(self) -> ImportanceMatrix | None:
        from targets.gguf.imatrix import read_imatrix

        return None if self.imatrix is None else read_imatrix(self.imatrix)

    @cached_property
    def _template(self) -> str | None:
        from elmexport.checkpoint.tokenizer.chat import read_template

        return None if self.chat_template is None else read_template(self.chat_template)

    @property
    def _limit(self) -> int | None:
        if self.split_max_size is None:
            return None
        match = re.fullmatch(r"([1-9]\d*)([KMG]?)", self.split_max_size.upper())
        if match is None:
            raise ElmExportError(f'--split-max-size is {self.split_max_size!r}; give bytes, or thousands of them, like "500M" or "2G"')
        return int(match[1]) * _UNITS[match[2]]
