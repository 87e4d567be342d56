"""Benches: ours side by side with the libraries that people use today. ``make bench`` runs them all."""
