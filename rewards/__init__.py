"""Verifiers: factories that return `verify(prompt, response) -> Verdict`. One module a verifier."""
