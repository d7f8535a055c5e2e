"""The names that optimum, onnxruntime-genai and transformers.js ask for."""

from __future__ import annotations

from elmexport.contracts.onnx import is_past, past, present, present_of


def test_names_of_the_cache() -> None:
    assert (past(3, "key"), past("%d", "value")) == ("past_key_values.3.key", "past_key_values.%d.value")
    assert present_of(past(3, "key")) == present(3, "key") == "present.3.key"
    assert is_past(past(0, "value")) and not is_past(present(0, "value"))
