"""Pruned networks: which channels or weights go and when, and networks of fewer channels built again."""
