"""Hostile files: tests of all readers with untrusted bytes; start at ``targets.py``."""
