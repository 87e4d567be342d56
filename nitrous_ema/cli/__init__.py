"""The command ``nitrous-ema``: inspect, verify, prune, import, plot, demo and synthesize. Begin with ``program.py``."""

from nitrous_ema.cli.program import main

__all__ = ["main"]
