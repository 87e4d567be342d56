"""A synthesis process, as the process that started it sees it.

what                         guarded by
lines of stdout              _came; read by anybody                 test_outputs_come_while_the_worker_goes_on
end of stdout                the same                               test_outputs_end_with_the_error_of_the_worker
what stderr said             one thread writes; read after it has   test_failure_of_a_launched_job_is_an_exception
                             ended, but for ``warnings``
failure of the callback      the same                               test_error_of_the_progress_callback_is_raised

J1  Both pipes are drained all the time, whatever the callback does or whoever reads: a worker with much to say does
    not stop for a reader.                                          test_worker_with_much_to_say_is_not_held_up
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from typing import IO

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import clamp_timeout
from nitrous_ema.errors import WorkerError
from nitrous_ema.synthesis.worker.output_record import Output
from nitrous_ema.synthesis.worker.reporting import PROGRESS, WARNING

_KEPT_STDERR_CHARACTERS = 16_000
_KILL_AFTER_SECONDS = 10.0
_CANCELLED = (-signal.SIGTERM, -signal.SIGKILL, exit_status.INTERRUPTED)

ProgressCallback = Callable[[int, int], object]
"""Called with the bytes read so far and those to read, on a thread of the job."""


class Job:
    """A synthesis process. It goes on if nobody waits for it, while this process lives.

    Once this process is gone the worker ends when it next has something to tell; averages that are written stay.

    Args:
        process: The worker, with pipes.
        progress: Called on a thread of the job. If it raises, it is called no more, and result() raises its error.
    """

    def __init__(self, process: subprocess.Popen[str], progress: ProgressCallback | None = None) -> None:
        self._process = process
        self._progress = progress
        self._came = threading.Condition()
        self._lines: list[str] = []
        self._has_all = False
        self._stderr = ""
        self._callback_error: BaseException | None = None
        self._is_cancelled = False
        self._drains = [
            threading.Thread(target=self._drain_stdout, name="synthesize-stdout", daemon=True),
            threading.Thread(target=self._drain_stderr, name="synthesize-stderr", daemon=True),
        ]
        for drain in self._drains:
            drain.start()

    def done(self) -> bool:
        """Whether the process has ended, well or not."""
        return self._process.poll() is not None

    def outputs(self, timeout: float | None = None) -> Iterator[Output]:
        """The averages as they come, each once it is durable; all of them, from the first on, at each call.

        Args:
            timeout: Seconds to wait for each, for ever by default. The process goes on after a timeout.

        Raises:
            TimeoutError: None has come for so long.
            ValueError: As result(), after the last one; so is the other.
            WorkerError: The worker failed or was cancelled.
        """
        timeout = clamp_timeout(timeout)
        for index in count():
            line = self._line(index, timeout)
            if line is None:
                break
            yield Output.parse(line)
        self.result(timeout)

    def _line(self, index: int, timeout: float | None) -> str | None:
        """A line of stdout, waited for; None if there is no such line."""
        with self._came:
            if not self._came.wait_for(lambda: index < len(self._lines) or self._has_all, timeout):
                raise TimeoutError(f"the synthesis has written nothing more after {timeout} seconds; it goes on.")
            return self._lines[index] if index < len(self._lines) else None

    def result(self, timeout: float | None = None) -> list[Output]:
        """Wait for the process and return what it wrote: by step, and in the order of the lengths asked for.

        Args:
            timeout: Seconds to wait, for ever by default. The process goes on after a timeout.

        Raises:
            TimeoutError: It has not ended yet.
            ValueError: It found an argument to be wrong; the message is its own.
            WorkerError: It failed or was cancelled; has ``exit_code`` and the last of its ``stderr``.
        """
        timeout = clamp_timeout(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            status = self._process.wait(timeout)
            for drain in self._drains:
                drain.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the synthesis has not ended after {timeout} seconds; it goes on.") from None
        if any(drain.is_alive() for drain in self._drains):
            raise TimeoutError(f"the synthesis has ended, but not its output after {timeout} seconds; wait again.")
        if status == exit_status.USAGE:
            raise ValueError(_last_message(self._stderr))
        if status != 0:
            raise WorkerError(self._why_ended(status), exit_code=status, stderr=self._stderr)
        if self._callback_error is not None:
            raise self._callback_error
        return [Output.parse(line) for line in self._lines]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the worker warned of; complete when result() has returned."""
        return tuple(line.removeprefix(WARNING) for line in self._stderr.splitlines() if line.startswith(WARNING))

    def cancel(self, timeout: float = _KILL_AFTER_SECONDS) -> None:
        """End the process and wait until it has ended; outputs that are already written stay.

        Args:
            timeout: Seconds it gets for cleaning up before it is killed.
        """
        self._is_cancelled = True
        self._process.terminate()
        try:
            self._process.wait(clamp_timeout(timeout))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _why_ended(self, status: int) -> str:
        if self._is_cancelled and status in _CANCELLED:
            return "the synthesis was cancelled; outputs that were written stay."
        if status < 0:
            more = " The system does that where memory runs out." if status == -signal.SIGKILL else ""
            return f"the synthesis process was ended by {_signal_name(-status)}.{more} Outputs that were written stay."
        return f"the synthesis process ended with status {status}: {_last_message(self._stderr)}"

    def _drain_stdout(self) -> None:
        try:
            with _pipe(self._process.stdout) as pipe:
                for line in pipe:
                    with self._came:
                        self._lines.append(line)
                        self._came.notify_all()
        finally:
            with self._came:
                self._has_all = True
                self._came.notify_all()

    def _drain_stderr(self) -> None:
        with _pipe(self._process.stderr) as pipe:
            for line in pipe:
                if line.startswith(PROGRESS):
                    self._tell_progress(line)
                else:
                    self._stderr = (self._stderr + line)[-_KEPT_STDERR_CHARACTERS:]
        self._process.wait()  # else Python warns of a job that nobody waited for

    def _tell_progress(self, line: str) -> None:
        if self._progress is None or self._callback_error is not None:
            return
        told = json.loads(line)["progress"]
        try:
            self._progress(told["done"], told["total"])
        except BaseException as error:
            self._callback_error = error


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise RuntimeError("the worker was started without a pipe; this is a bug of nitrous_ema, please report it.")
    return pipe


def _last_message(stderr: str) -> str:
    """What the worker said last; the whole traceback where it ended in one."""
    _, traceback, rest = stderr.rpartition("Traceback (most recent call last):")
    if traceback:
        return traceback + rest.rstrip()
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else "it said nothing"
