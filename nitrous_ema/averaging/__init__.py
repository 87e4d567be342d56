"""Averages of a model while it trains: the engine, the EMA classes and their arguments (``config.py``).

Read ``engine.py`` first.
"""
