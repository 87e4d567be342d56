"""The search for the best EMA length: ``sweep`` and what it is made of."""
