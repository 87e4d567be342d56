"""The online model: which tensors are tracked, whether they can be, and where they are now. Begin with ``tracking``."""
