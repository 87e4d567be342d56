"""Search for the best EMA length: evaluate averages of many lengths, store and draw results. Begin with ``sweep.py``.

The function is ``nitrous_ema.sweep``; ``nitrous_ema.search.sweep`` is its module.
"""

from nitrous_ema.search.results import read_table

__all__ = ["read_table"]
