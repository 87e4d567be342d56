"""What runs where, and after what, during an update. Begin with ``interfaces.py``, then ``dispatch.py``.

Lanes and sinks that run at once are in ``inline.py``; background ones are in ``nitrous_ema.async_``.
"""
