"""Hostile files: what the readers say to bytes that nobody vouches for."""
