"""Accuracy, calibration, cost, and agreement with a teacher."""
