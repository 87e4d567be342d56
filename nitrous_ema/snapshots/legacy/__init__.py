"""Folders of nitrous-ema 0.0.1 and ema-pytorch: reading them (start at ``folder.py``), and conversion to snapshots."""
