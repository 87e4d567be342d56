"""Folders of nitrous-ema 0.0.1 and ema-pytorch: reading and conversion to snapshots. Begin with ``folder.py``."""
