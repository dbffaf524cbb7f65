"""Checks: what will likely go wrong with a distillation, with reason and remedy."""
