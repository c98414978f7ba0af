"""Timings of the ops beside their PyTorch baselines: `python -m bench attention`."""
