"""Wording of a checkpoint that does not fit its configuration: a few names, how many more, and the likely cause."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elmexport.errors import listed
from elmexport.models.base import ModelConfig
from elmexport.weights import Role, WeightSpec

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Endings of the tensors into which quantizers split a weight.
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|biases|g_idx|absmax|quant_map|quant_state\b.*|weight_packed|weight_scale|weight_zero_point|SCB|zeros)$"
)


@dataclass(frozen=True)
class Mismatch:
    """Comparison of the tensors looked for with those that the files hold."""

    config: ModelConfig
    specs: Mapping[str, WeightSpec]
    shapes: Mapping[str, tuple[int, ...]]  # of the tensors found, by the family's names
    unknown: Sequence[str]  # names of others, as stored
    stored_names: Mapping[str, str]  # stored name by the family's, where they differ

    @property
    def missing(self) -> list[str]:
        return [name for name in self.specs if name not in self.shapes]

    @property
    def misshapen(self) -> list[str]:
        return [name for name, spec in self.specs.items() if self.shapes.get(name, spec.shape) != spec.shape]

    @property
    def quantized(self) -> bool:
        """Whether the files hold the parts of quantized weights."""
        return any(_QUANTIZED.search(name) for name in self.unknown)

    def sentence(self) -> str | None:
        """All that is wrong, as the end of a sentence; None where nothing is."""
        wrong = [
            f"{self.stored_names.get(name, name)} is {list(self.shapes[name])}, config.json calls for {list(self.specs[name].shape)}"
            for name in self.misshapen
        ]
        problems = [
            f"{label}: {listed(found, longest=longest)}"
            for label, found, longest in (
                ("missing tensors", self.missing, 80),
                ("extra tensors", self.unknown, 80),
                ("wrong shapes", wrong, 140),
            )
            if found
        ]
        return f"{'; '.join(problems)}. {self._cause()}" if problems else None

    def _cause(self) -> str:
        missing, unknown, misshapen = self.missing, self.unknown, self.misshapen
        if self.quantized:
            return "These are quantized weights, which cannot be exported; use the model that they were made from"
        if len(missing) == len(self.specs):
            return f"None is a tensor of {self.config.model_type} models: this is a model of another kind, or its names have been changed"
        layers, held = len(self.config.dims.layers), self._layers_held()
        if held != layers and not misshapen and all(_LAYER.search(name) for name in [*missing, *unknown]):
            return f"The weights have {held} layers, config.json says {layers}: use the config.json that belongs to these weights"
        if missing == [self.config.head_name] and not unknown and not misshapen:
            key = self.config.tied_key
            return f"If the output layer is to share the embedding, set {key} to true in config.json; else the file is incomplete"
        if not missing and not unknown and all(self.specs[name].role in (Role.EMBEDDING, Role.LM_HEAD) for name in misshapen):
            rows = self.shapes[misshapen[0]][0]
            if self.shapes[misshapen[0]][1:] == self.specs[misshapen[0]].shape[1:]:
                return (
                    f"If tokens were added to the vocabulary, set vocab_size to {rows} in config.json, and give the tokenizer that has them"
                )
        if not missing and not misshapen and all(name.endswith(".bias") for name in unknown):
            return f"{self.config.model_type} models have no biases: this is a model of another kind"
        if missing and not unknown and not misshapen:
            return "The weights are incomplete (a file may be missing): download or save them again"
        return "Use the config.json that belongs to these weights"

    def _layers_held(self) -> int:
        found = [int(match[1]) for name in [*self.shapes, *self.unknown] if (match := _LAYER.search(name))]
        return max(found, default=-1) + 1
