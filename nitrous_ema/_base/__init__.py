"""Helpers that every package may use: arguments, options and exit statuses, dtypes, processes, temporary files.

Read ``arguments.py`` first: its checks and its texts of numbers and sizes are used by most packages.
"""
