"""Arithmetic of averages on flat buffers, with foreach calls or a Triton kernel. Begin with ``flat_buffers.py``."""
