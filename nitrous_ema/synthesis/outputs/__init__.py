"""The files that hold synthesized averages: layout, writing, shards, reuse and reading. Begin with ``writer.py``."""
