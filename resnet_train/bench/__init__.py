"""Timings beside a conventional PyTorch loop."""
