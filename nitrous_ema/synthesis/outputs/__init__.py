"""The files that hold synthesized averages: layout, writing, shards, reuse and reading. Start with ``writer.py``."""
