"""Augmentations: explicit parameters drawn from counters, and the pixels that they give."""
