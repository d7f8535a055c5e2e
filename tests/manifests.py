"""Manifests for tests that need no export."""

from __future__ import annotations

from typing import Any

import msgspec

from elmexport.manifest import Manifest, Model, Quantization, RuleFacts, SelfCheck


def example_manifest(**changes: Any) -> Manifest:
    """Of OpenELM-450M as GGUF, `changes` made to it; `files` are filled in by `write_manifest`."""
    model = Model("OpenELM-450M", "hub:apple/OpenELM-450M", "0a1b2c", "1" * 64, 457179136, {})
    rules = (RuleFacts("int8-block32", roles=("embedding",)), RuleFacts("int4-block32"))
    quant = Quantization("int4", "4-bit blocks of 32", "fp32", "fp32", "fp16", "fp16", 0.5, rules, "mse", None)
    manifest = Manifest(
        format=1,
        model=model,
        target="gguf",
        settings={},
        quant=quant,
        fallbacks=(),
        bits_per_weight=4.7512,
        context=2048,
        alpha=1.0,
        calibration=None,
        tools={},
        self_check=SelfCheck(done=True, text="bundled prose", tokens=128, kl_mean=0.01234, kl_max=0.3, top1_agreement=0.9375),
        files={},
    )
    return msgspec.structs.replace(manifest, **changes)
