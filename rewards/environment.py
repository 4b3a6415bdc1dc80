"""The verifier of recipes whose [environment] gives the score itself."""

from __future__ import annotations

from llmrl.records import Prompt, Verdict, Verifier


def environment() -> Verifier:
    """Judges what the environment has not scored, which is an episode that a limit ended: 0, status no_answer."""

    def verify(prompt: Prompt, response: str) -> Verdict:
        return Verdict(0.0, "no_answer", detail="the episode ended before the environment gave a score")

    return verify


environment.no_selfcheck = "it judges what an environment has not scored: there is no right answer to it"  # type: ignore[attr-defined]
