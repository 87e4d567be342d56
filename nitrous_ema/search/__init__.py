"""Search for the best EMA length: evaluate averages of many lengths, store and draw results. Read ``sweep.py`` first.

The function is ``nitrous_ema.sweep``; ``nitrous_ema.search.sweep`` is its module.
"""

from nitrous_ema.search.results import read_table

__all__ = ["read_table"]
