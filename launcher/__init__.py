"""Runs torchtitan's Llama-3 training on Slurm clusters: see README.md."""

__version__ = "0.1.0"
