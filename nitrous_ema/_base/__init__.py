"""Helpers that every package may use: argument checks, command-line options, exit statuses, dtypes, temporary files."""
