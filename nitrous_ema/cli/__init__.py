"""The command ``nitrous-ema``: inspect, verify, prune, import, plot, demo and synthesize. Read ``program.py`` first."""

from nitrous_ema.cli.program import main

__all__ = ["main"]
