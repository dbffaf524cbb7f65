"""Sharing: push, pull, lists of stores, cards and comparison."""
