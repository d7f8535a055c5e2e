"""The contract of a Core ML package, read from its program: `elmexport.contracts.coreml` says what the names mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from elmexport.contracts.coreml import (
    CACHE_OUTPUTS,
    DECODE,
    INPUT_IDS,
    KEY_CACHE,
    LAST_TOKEN,
    NEW_KEYS,
    NEW_VALUES,
    POSITION,
    PREFILL,
    TOKEN,
    VALUE,
    VALUE_CACHE,
    Interface,
    is_logits,
    logits_names,
)
from elmexport.errors import ElmExportError
from elmexport.mil.program import MilFunction, Program, TensorType, ValueReference

_RANKS = {INPUT_IDS: 2, POSITION: 1, LAST_TOKEN: 1, KEY_CACHE: 4, VALUE_CACHE: 4, NEW_KEYS: 4, NEW_VALUES: 4, TOKEN: 2, VALUE: 2}


@dataclass(frozen=True)
class Contract:
    """Sizes and names of a package, beside its interface.

    `scores` are by function the values `[1, 1, n]` that, joined along the last axis, are the logits: outputs, or (`argmax`) what the most
    likely token is taken from. `caches` maps the name of each cache to that of the output which is written into it where (`cache_io`) the
    caches are inputs, not states. In a chain of packages, names of caches end in the package's number: `key_cache.0`.
    """

    interface: Interface
    context: int
    vocab_size: int
    scores: Mapping[str, tuple[str, ...]]
    caches: Mapping[str, str]

    def with_scores(self, program: Program) -> Program:
        """Make a program that has the scores among its outputs."""
        functions = {
            name: replace(function, outputs=tuple(dict.fromkeys((*function.outputs, *self.scores[name]))))
            for name, function in program.functions.items()
        }
        return replace(program, functions=functions)


def read_contract(program: Program) -> Contract:
    """Read the contract of a package, or of several that `coreml_chain.join` made one program.

    Raises:
        ElmExportError: a package of another kind.
    """
    problem = _problem(program.functions)
    if problem is not None:
        raise ElmExportError(
            f"{program.path} is not a language model as this version exports them ({problem}); run it with elmexport.mil directly"
        )
    prefill = program.functions[PREFILL]
    types = prefill.types()
    caches = {f"{cache}{suffix}": f"{new}{suffix}" for suffix in _suffixes(prefill) for cache, new in CACHE_OUTPUTS.items()}
    (_, tokens), (*_, context, _) = (types[name].shape for name in (INPUT_IDS, next(iter(caches))))
    scores = {name: _scores(function) for name, function in program.functions.items()}
    vocab = sum(types[name].shape[-1] or 0 for name in scores[PREFILL])
    assert tokens is not None and context is not None
    interface = Interface(tokens, cache_io=not prefill.states, argmax=TOKEN in prefill.outputs)
    return Contract(interface, context, vocab, scores, caches)


def _suffixes(function: MilFunction) -> list[str]:
    """Endings of the names of caches, one for each package."""
    count = sum(name.startswith(f"{KEY_CACHE}.") for name in (*function.inputs, *function.states))
    return [f".{i}" for i in range(count)] or [""]


def _rank(name: str) -> int | None:
    return _RANKS.get(name.partition(".")[0])


def _scores(function: MilFunction) -> tuple[str, ...]:
    if TOKEN not in function.outputs:
        return tuple(name for name in function.outputs if _rank(name) is None)
    sources = (operation.arguments["x"][0] for operation in function.operations if operation.type == "reduce_argmax")
    return tuple(source.name for source in sources if isinstance(source, ValueReference))


def _problem(functions: Mapping[str, MilFunction]) -> str | None:
    """How the functions differ from the contract; None if they do not."""
    if set(functions) != {PREFILL, DECODE}:
        return f"its functions are {', '.join(functions)}, not {PREFILL} and {DECODE}"
    for name, function in functions.items():
        caches, news = (
            [f"{base}{suffix}" for suffix in _suffixes(function) for base in bases] for bases in (CACHE_OUTPUTS, CACHE_OUTPUTS.values())
        )
        cache_io = caches[0] in function.inputs
        result = (TOKEN, VALUE) if TOKEN in function.outputs else _logits(function)
        for what, found, wanted in (
            ("inputs", function.inputs, (INPUT_IDS, POSITION, *([LAST_TOKEN] if name == PREFILL else []), *(caches if cache_io else ()))),
            ("states", function.states, () if cache_io else caches),
            ("outputs", function.outputs, (*result, *(news if cache_io else ()))),
        ):
            if set(found) != set(wanted):
                return f"{what} of {name} are {', '.join(found) or 'none'}, not {', '.join(wanted) or 'none'}"
        kinds = {key: kind for key, kind in function.types().items() if key in {*function.inputs, *function.states, *function.outputs}}
        if any(None in kind.shape or len(kind.shape) != (_rank(key) or 3) for key, kind in kinds.items()):
            return f"shapes of {name} are {_shapes(kinds)}"
        if any(prod(size or 0 for size in kinds[key].shape[:-1]) != 1 for key in result):
            return f"{', '.join(result)} of {name} are of several tokens: {_shapes({key: kinds[key] for key in result})}"
    if functions[DECODE].inputs[INPUT_IDS].shape != (1, 1):
        return f"{DECODE} does not take one token"
    return None


def _logits(function: MilFunction) -> tuple[str, ...]:
    """`logits`, or as many parts as there are."""
    return logits_names(max(1, sum(is_logits(name) for name in function.outputs)))


def _shapes(kinds: Mapping[str, TensorType]) -> str:
    return ", ".join(f"{key} {list(kind.shape)}" for key, kind in kinds.items())
