"""The class of the package's own background threads; other modules recognize the threads by this class."""

from __future__ import annotations

import threading
from collections.abc import Callable

from nitrous_ema._base.threads import thread_errors


class BackgroundThread(threading.Thread):
    """A daemon thread of a lane or a sink.

    The interpreter joins other threads before it runs exit handlers, and only an exit handler ends this one: exit would
    hang. Being a daemon, the thread must be drained first: by close(), or by the finalizer of the EMA, which runs when
    the EMA is dropped or the interpreter exits (``averaging/shutdown.py``).

    Args:
        work: Runs once, on this thread.
        name: What the thread does; prefixed with the package's name.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(target=work, name=f"nitrous-ema-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread.

        Raises:
            NitrousError: The system does not start more threads.
        """
        with thread_errors():
            super().start()
