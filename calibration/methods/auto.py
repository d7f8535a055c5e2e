"""Choice of a method by time: GPTQ along as much of the calibration text as a budget allows, else scales of least error."""

from __future__ import annotations

from dataclasses import replace

from calibration.method import Job, Method, Prepared


class Auto(Method):
    """GPTQ where it fits the time budget, else `mse`."""

    name = "auto"
    words = "gptq along as much text as fits --time-budget, else mse"
    needs_text = True
    takes_statistics = False

    def prepare(self, job: Job) -> Prepared:
        from calibration import budget
        from calibration.methods import find_method

        minutes, rate = job.minutes, budget.gemm_rate()
        asked = job.inputs.asked_tokens
        for tokens in budget.TOKENS if asked is None else (asked,):
            seconds = budget.gptq_seconds(job.checkpoint, job.plan, tokens, rate)
            if seconds <= 60 * minutes:
                found = find_method("gptq").prepare(replace(job, inputs=job.inputs.with_tokens(tokens)))
                note = f"--method auto: gptq along {tokens:,} tokens, estimated at {_minutes(seconds)} of {minutes:g} allowed"
                return replace(found, notes=(note, *found.notes))
        found = find_method("mse").prepare(replace(job, inputs=job.inputs.without_text()))
        note = f"--method auto: mse, for gptq along {tokens:,} tokens is estimated at {_minutes(seconds)}, and {minutes:g} are allowed: --time-budget"
        return replace(found, notes=(note, *found.notes))


def _minutes(seconds: float) -> str:
    return f"{max(seconds / 60, 0.1):.1f} minutes"
