"""Calibration: statistics of activations, and the methods that find the codes of a model's weights."""
