"""Quantization recipes: which tensor gets which scheme, as data (TOML). Policy only; no torch, no file format.

name = "int4"
words = "what it means, one line, printed and recorded"
activations = "fp32"         # the precision the artifact computes in
norms = "fp32"               # norms and the routers of mixtures of experts are never quantized
scales = "fp16"              # how the format stores the scales, whose values are fp16 numbers
fallback = "fp16"            # for a tensor whose shape its scheme cannot take: reported, never silent
max_self_check_kl = 0.5      # nats per token against the reference; beyond it the export fails

[[rule]]                     # the first rule that matches a tensor decides
roles = ["embedding", "lm_head"]  # an embedding that is the head too counts as both
scheme = "int8-block32"

[[rule]]
layers = "0-3"               # optional, inclusive; or a share of the depth, see `elmexport.quantization.layers`
scheme = "int8-block32"

[[rule]]
min_gqa = 4                  # optional: only where the first layer has at least so many query heads for each KV head
experts = 8                  # optional: only where the layers are mixtures of just so many experts
imatrix = false              # optional: only with (true) or without (false) an importance matrix
scheme = "ggml-q5_k"

[[rule]]
scheme = "int4-block32"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources.abc import Traversable
from pathlib import Path
from types import UnionType
from typing import Any

from elmexport.documents import decode_toml
from elmexport.errors import ElmExportError
from elmexport.graph.dims import ModelDims
from elmexport.models.base import ModelConfig
from elmexport.quantization.layers import Layers, parse_layers
from elmexport.quantization.schemes import FLOAT_BITS, Float, Scheme, find_scheme
from elmexport.weights import Role, WeightSpec

_KEYS: Mapping[str, type | UnionType] = {
    "name": str,
    "words": str,
    "activations": str,
    "norms": str,
    "scales": str,
    "fallback": str,
    "max_self_check_kl": int | float,
    "rule": list,
}
_RULE_KEYS: Mapping[str, type | UnionType] = {
    "roles": list,
    "layers": str,
    "min_gqa": int,
    "experts": int,
    "imatrix": bool,
    "scheme": str,
}


@dataclass(frozen=True)
class Rule:
    """Rule of a recipe: `scheme` for tensors of `roles` (None: every role but norms and routers) in `layers` (None: anywhere).

    The rule counts only in models with at least `min_gqa` query heads for each KV head and with just `experts` experts, and, where `imatrix`
    is not None, only for exports with (True) or without (False) an importance matrix.
    """

    scheme: Scheme
    roles: frozenset[Role] | None = None
    layers: Layers | None = None
    min_gqa: int | None = None
    imatrix: bool | None = None
    experts: int | None = None

    def matches(self, spec: WeightSpec, dims: ModelDims) -> bool:
        """Whether the rule is for `spec`; one that is for exports with an importance matrix only counts after `Recipe.given`."""
        roles = {spec.role, Role.LM_HEAD} if spec.role is Role.EMBEDDING and dims.tied else {spec.role}
        if self.imatrix or (self.roles is not None and self.roles.isdisjoint(roles)):
            return False
        if self.experts is not None and dims.layers[0].experts != self.experts:
            return False
        if self.min_gqa is not None and dims.layers[0].queries_per_kv_head < self.min_gqa:
            return False
        return self.layers is None or (spec.layer is not None and self.layers.contains(spec.layer, len(dims.layers)))


@dataclass(frozen=True)
class Recipe:
    """A quantization policy for a whole model."""

    name: str
    words: str
    activations: Float
    norms: Float
    scales: Float
    fallback: Float
    max_self_check_kl: float
    rules: tuple[Rule, ...]
    biases: bool = False  # the format stores beside each scale a bias of its type, which stands in the place of zero points; targets say so

    def bits(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Stored bits of a tensor of `shape`, as the recipe's format stores scales."""
        return scheme.bits(shape, self.scale_bits) - (scheme.zero_bits(shape) if self.biases else 0)

    @property
    def scale_bits(self) -> int:
        """Bits of a scale and what stands beside it in every group."""
        return FLOAT_BITS[self.scales.dtype] * (2 if self.biases else 1)

    def given(self, *, imatrix: bool) -> Recipe:
        """The recipe for exports with, or without, an importance matrix: rules for the other case left out."""
        return replace(self, rules=tuple(replace(rule, imatrix=None) for rule in self.rules if rule.imatrix in (None, imatrix)))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as manifests record it: the TOML form as JSON values."""
        rules = []
        for rule in self.rules:
            data: dict[str, Any] = {"scheme": rule.scheme.recipe_name}
            if rule.roles is not None:
                data["roles"] = sorted(rule.roles)
            if rule.layers is not None:
                data["layers"] = str(rule.layers)
            if rule.min_gqa is not None:
                data["min_gqa"] = rule.min_gqa
            if rule.experts is not None:
                data["experts"] = rule.experts
            rules.append(data)
        return {
            "name": self.name,
            "words": self.words,
            "activations": self.activations.dtype,
            "norms": self.norms.dtype,
            "scales": self.scales.dtype,
            "fallback": self.fallback.dtype,
            "max_self_check_kl": self.max_self_check_kl,
            "rule": rules,
        }


@dataclass(frozen=True)
class Plan:
    """A recipe resolved for a model: the scheme of every tensor, and the fallbacks that were needed (tensor, reason).

    Fallbacks of all experts of a layer are one, under their common name (`WeightSpec.group`).
    """

    recipe: Recipe
    schemes: Mapping[str, Scheme]
    fallbacks: tuple[tuple[str, str], ...]
    bits_per_weight: float


def resolve(recipe: Recipe, model: ModelConfig) -> Plan:
    """Resolve a recipe for a model: the scheme of every tensor.

    Raises:
        ElmExportError: no rule matches a tensor.
    """
    schemes: dict[str, Scheme] = {}
    fallbacks: dict[tuple[str, str], None] = {}
    bits = weights = 0
    for spec in model.weights():
        scheme: Scheme = recipe.norms
        if spec.role.is_quantized:
            rule = next((rule for rule in recipe.rules if rule.matches(spec, model.dims)), None)
            if rule is None:
                raise ElmExportError(
                    f"recipe {recipe.name}: no rule matches {spec.name} ({spec.role}); end the recipe with a rule that has no roles"
                )
            scheme = rule.scheme
            reason = scheme.refuses(spec.shape)
            if reason is not None:
                while scheme.refuses(spec.shape) is not None:
                    scheme = scheme.instead or recipe.fallback
                fallbacks[spec.group, f"{reason}: kept as {scheme}"] = None
        schemes[spec.name] = scheme
        bits += recipe.bits(scheme, spec.shape)
        weights += spec.size
    return Plan(recipe, schemes, tuple(fallbacks), bits / weights)


def load_recipe(path: Path | Traversable) -> Recipe:
    """Read a recipe file.

    Raises:
        ElmExportError: not TOML, an unknown key, role or scheme, or a missing key.
    """
    where = path.name
    text = path.read_text(encoding="utf-8")
    try:
        data = decode_toml(text)
    except ValueError as error:
        raise ElmExportError(f"{where}: not valid TOML ({error})") from None
    _check_keys(data, _KEYS, where, required=set(_KEYS))
    return Recipe(
        name=data["name"],
        words=data["words"],
        activations=_float(data["activations"], "activations", where),
        norms=_float(data["norms"], "norms", where),
        scales=_float(data["scales"], "scales", where),
        fallback=_float(data["fallback"], "fallback", where),
        max_self_check_kl=float(data["max_self_check_kl"]),
        rules=tuple(_rule(rule, where) for rule in data["rule"]),
    )


def _rule(data: Mapping[str, Any], where: str) -> Rule:
    _check_keys(data, _RULE_KEYS, f"{where}, rule", required={"scheme"})
    roles = None
    if "roles" in data:
        known = {str(role): role for role in Role if role.is_quantized}
        unknown = [role for role in data["roles"] if not (isinstance(role, str) and role in known)]
        if unknown:
            raise ElmExportError(f"{where}: unknown role {unknown[0]!r}; known: {', '.join(known)} (norms and routers are never quantized)")
        roles = frozenset(known[role] for role in data["roles"])
    layers = parse_layers(data["layers"], where) if "layers" in data else None
    return Rule(find_scheme(data["scheme"]), roles, layers, data.get("min_gqa"), data.get("imatrix"), data.get("experts"))


def _float(name: str, key: str, where: str) -> Float:
    scheme = find_scheme(name)
    if not isinstance(scheme, Float):
        raise ElmExportError(f"{where}: {key} is {name!r}; it must be fp32, fp16 or bf16")
    return scheme


def _check_keys(data: Mapping[str, Any], known: Mapping[str, type | UnionType], where: str, required: set[str]) -> None:
    if not isinstance(data, Mapping):
        raise ElmExportError(f"{where}: {data!r} is not a table; write [[rule]] and its keys below")
    unknown, missing = sorted(set(data) - set(known)), sorted(required - set(data))
    if unknown:
        raise ElmExportError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if missing:
        raise ElmExportError(f"{where}: {missing[0]!r} is missing")
    for key, value in data.items():
        if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is not bool):
            kind = getattr(known[key], "__name__", "number")
            raise ElmExportError(f"{where}: {key} is {value!r}; it must be a {({'str': 'string'}).get(kind, kind)}")
