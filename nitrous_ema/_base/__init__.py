"""Helpers that every package may use: arguments, options and exit statuses, dtypes, processes, temporary files."""
