"""lm-eval's model interface over a runtime, so that its tasks run on artifacts.

Requests are tokenized as lm-eval's Hugging Face backend does it with `add_bos_token=True`, which the published figures were made
with: control tokens spelled out in a task's text are control tokens. Not covered: sampling, chat templates, images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM

from elmexport.checkpoint.tokenizer import Tokenizer
from elmexport.errors import ElmExportError
from elmexport.evaluation.scoring import Request, score
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.generation import generate
from elmexport.runtimes.sampler import Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_GEN_TOKS = 256  # where a task sets none, as in lm-eval
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names for it, the first one counts
_SAMPLED = ("do_sample", "temperature", "top_k", "top_p", "num_beams")  # settings that have nothing to say about a greedy answer


class RuntimeLM(TemplateLM):  # type: ignore[misc]
    """Answers lm-eval's requests with `runtime`.

    Every answer is also given to the cache hook (`set_cache_hook`) as soon as it is known. `known` gives the answer to a context and continuation
    whose log-likelihood need not be computed again, None where there is none. `shortened` counts the requests that were longer than the
    runtime's context and lost their beginning.
    """

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, known: Callable[[tuple[str, str]], Any] = lambda texts: None) -> None:
        super().__init__()
        self._known = known
        self.runtime, self.tokenizer = runtime, tokenizer
        self._prefix_text = tokenizer.pieces()[self.prefix_token_id].text  # spelled out in a text, it is not put before it again
        self.shortened = 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.runtime.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        bos = add_special_tokens is not False and not (add_special_tokens is None and string.startswith(self._prefix_text))
        return self.tokenizer.encode(string, bos=bos, parse_special=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        # A window of a longer text has no strings of its own.
        known = [None if texts is None else self._known(texts) for texts, _, _ in requests]
        answers = {index: answer for index, answer in enumerate(known) if answer is not None}
        token_requests = [Request(context, continuation) for _, context, continuation in requests]
        self.shortened += sum(len(item.context) + len(item.continuation) > self.max_length + 1 for item in token_requests)
        for index, result in score(self.runtime, token_requests, lambda index: known[index] is not None):
            answers[index] = (result.loglikelihood, result.greedy)
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the context.

        As in lm-eval's Hugging Face backend, the text's own BOS is itself predicted, once, from a BOS before it.
        """
        answers = []
        for (string,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(string), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            scored = score(self.runtime, [Request(*utils.make_disjoint_window(window)) for window in windows])
            total = sum(result.loglikelihood for _, result in sorted(scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
            answers.append(total)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The most likely continuation of each prompt, up to the first stop string, EOS, or `max_gen_toks` tokens (256 where not set).

        A prompt that leaves no room for these loses its beginning.

        Raises:
            ElmExportError: the task asks for sampling or beams, or for more tokens than the context holds.
        """
        answers = []
        for context, settings in (request.args for request in requests):
            answer = self._generate(context, dict(settings))
            self.cache_hook.add_partial("generate_until", (context, settings), answer)
            answers.append(answer)
        return answers

    def _generate(self, prompt: str, settings: dict[str, Any]) -> str:
        until = settings.pop("until", None) or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        lengths = [settings.pop(name, None) for name in _LENGTHS]
        room = int(next((length for length in lengths if length), MAX_GEN_TOKS))
        if settings.get("do_sample") or (settings.get("num_beams") or 1) > 1:
            raise ElmExportError(f"the task asks for sampled or beam-searched text ({settings}); only greedy decoding is evaluated")
        unknown = sorted(set(settings) - set(_SAMPLED))
        if unknown:
            raise ElmExportError(f"the task sets {', '.join(unknown)} for generation, which is not supported; choose another task")
        if room >= self.max_length:
            raise ElmExportError(
                f"the task generates up to {room} tokens, this artifact holds {self.max_length} with the prompt: export it with a larger --context"
            )
        ids = self.tok_encode(prompt)
        self.shortened += len(ids) > self.max_length - room
        tokens: list[int] = []
        for token in generate(
            self.runtime, ids[-(self.max_length - room) :], max_tokens=room, sampling=Sampling(), eos_ids=self.tokenizer.special.eos
        ):
            tokens.append(token)
            if stops and any(stop in self.tokenizer.decode(tokens) for stop in stops):
                break
        text = self.tokenizer.decode(tokens)
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
