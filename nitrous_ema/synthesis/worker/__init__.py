"""The inside of the synthesis process, and the code that starts it from Python. Start with ``runner.py``."""
