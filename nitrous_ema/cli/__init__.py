"""The command ``nitrous-ema``."""

from nitrous_ema.cli.program import main

__all__ = ["main"]
