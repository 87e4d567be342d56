"""The version of this library. This is the only place that states it; pyproject.toml reads it from here."""

__version__ = "1.0.0"
