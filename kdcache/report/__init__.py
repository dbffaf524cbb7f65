"""Runs and stores as one HTML page of figures and tables."""
