"""The inside of the synthesis process, and the code that starts it from Python. Begin with ``runner.py``.

The process enters at ``nitrous_ema.async_.synthesize_worker``; ``output_record.py`` defines what it prints.
"""
