"""Trained networks as files that others run, in float32 or int8."""
