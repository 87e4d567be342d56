"""Averages of a model while it trains: the engine (read ``engine.py`` first) and the EMA classes around it."""
