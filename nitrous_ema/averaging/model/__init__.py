"""The online model: which tensors are tracked, whether they can be, where they are now. Begin with ``tracking.py``."""
