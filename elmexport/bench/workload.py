"""Workload of a benchmark: prompts of some lengths, and tokens generated at some depths of the cache."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from elmexport.errors import ElmExportError

PROMPTS, DEPTHS, GENERATE = (128, 512), (0, 1024), 64
PARTS = ("prompts", "depths", "generate")


@dataclass(frozen=True)
class Workload:
    """Prompt lengths and cache depths to time.

    `prompts`: lengths of prompts read into an empty cache. `depths`: tokens in the cache when `generate` tokens are decoded one by one.
    """

    prompts: tuple[int, ...] = PROMPTS
    depths: tuple[int, ...] = DEPTHS
    generate: int = GENERATE

    def check(self) -> None:
        """Refuse counts that make no sense.

        Raises:
            ElmExportError: a count that makes no sense, or nothing to measure.
        """
        if not self.prompts and not self.depths:
            raise ElmExportError("neither a prompt nor a depth is given, so there is nothing to measure; give --prompt 128 or --depth 0")
        for what, counts, least in (("--prompt", self.prompts, 1), ("--depth", self.depths, 0), ("--generate", (self.generate,), 1)):
            for count in counts:
                if count < least:
                    raise ElmExportError(f"{what} is {count}; it must be {least} or more")
            if len(set(counts)) < len(counts):
                raise ElmExportError(f"{what} names {max(counts, key=counts.count)} twice; give each number once")

    def check_context(self, name: str, context: int) -> None:
        """Refuse what does not fit a cache of `context` tokens.

        Raises:
            ElmExportError: a prompt, or a depth and the tokens generated there, beyond the context.
        """
        for prompt in self.prompts:
            if prompt > context:
                raise ElmExportError(
                    f"a prompt of {prompt} tokens does not fit {name}, whose context is {context}; give a smaller --prompt, or export it with --context {prompt}"
                )
        for depth in self.depths:
            if depth + self.generate > context:
                raise ElmExportError(
                    f"{self.generate} tokens at depth {depth} need a context of {depth + self.generate}, and that of {name} is {context}; "
                    f"give a smaller --depth or --generate, or export it with --context {depth + self.generate}"
                )

    def fitted(self, context: int, parts: Collection[str] = PARTS) -> Workload:
        """Cut `parts` of the workload to what fits a cache of `context` tokens: to the longest possible where nothing of a part does."""
        generate, prompts, depths = self.generate, self.prompts, self.depths
        if "generate" in parts:
            generate = min(generate, context)
        if "prompts" in parts:
            prompts = tuple(prompt for prompt in prompts if prompt <= context) or ((context,) if prompts else ())
        if "depths" in parts:
            depths = tuple(depth for depth in depths if depth + generate <= context) or ((0,) if depths else ())
        return Workload(prompts, depths, generate)
