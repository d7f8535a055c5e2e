"""Descriptions of inputs, states and outputs, as the package itself gives them. No coremltools."""

from __future__ import annotations

from elmexport.contracts.coreml import (
    HIDDEN,
    HIDDEN_OUT,
    INPUT_IDS,
    KEY_CACHE,
    LAST_TOKEN,
    LOGITS,
    NEW_KEYS,
    NEW_VALUES,
    POSITION,
    TOKEN,
    VALUE,
    VALUE_CACHE,
    is_logits,
)

_CACHE = "[1, KV heads of the package's layers, context, head_dim]"
_NEW = "[1, KV heads of the package's layers, tokens, head_dim]"
DESCRIPTIONS = {
    INPUT_IDS: "Token ids, BOS first. A prompt shorter than the function's tokens is padded with any id: what padding writes lies behind the last token, and is overwritten before it is seen",
    POSITION: "Place in the cache of the first token, 0 for a new text; position plus the function's tokens must not exceed the context",
    LAST_TOKEN: "Which of the tokens given is the last one that is no padding, counted from 0: the output is what follows it",
    LOGITS: "Scores of the next token after the last one given. In several outputs, logits_0 and on, where the vocabulary has more than 16384 tokens: joined in that order they are the scores of all tokens",
    TOKEN: "The most likely next token after the last one given",
    VALUE: "That token's score (logit)",
    HIDDEN: "Residual stream behind the package before this one, [1, 1, tokens, model_dim]: its hidden_out",
    HIDDEN_OUT: "Residual stream behind the package's layers, [1, 1, tokens, model_dim]: hidden of the package after this one",
    KEY_CACHE: f"Keys of the package's layers, rotated: {_CACHE}",
    VALUE_CACHE: f"Values of the package's layers: {_CACHE}",
    NEW_KEYS: f"Keys of the tokens given, rotated: {_NEW}. The caller writes them to key_cache, axis 2, from position on",
    NEW_VALUES: f"Values of the tokens given: {_NEW}. The caller writes them to value_cache, axis 2, from position on",
}


def description(feature: str) -> str:
    """Description of an input, state or output by its name."""
    return DESCRIPTIONS[LOGITS if is_logits(feature) else feature]
