"""The rules: each a function of a case that yields findings, silent about what it cannot know."""
