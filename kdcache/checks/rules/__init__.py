"""The rules: each a function of a case that yields findings, none where it lacks the facts to decide."""
