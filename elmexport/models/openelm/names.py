"""Tensor names of CoreNet, Apple's training code, mapped to those of the published checkpoints."""

from __future__ import annotations


def from_corenet(name: str) -> str:
    """The Hugging Face name of a CoreNet tensor: `layers.0.ffn.proj_1.weight` is `transformer.layers.0.ffn.proj_1.weight` there.

    Source: the module names of CoreNet's `GeneralGPTModel`; its `classifier` is the Hugging Face model's `lm_head`.
    """
    return "lm_head.weight" if name == "classifier.weight" else f"transformer.{name}"
