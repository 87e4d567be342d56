"""Where the work of an update runs, and in which order. Begin with ``interfaces.py``, then ``dispatch.py``.

Lanes and sinks that work on the calling thread are in ``inline.py``; background ones are in ``nitrous_ema.async_``.
"""
