"""The handle of a synthesis process in the process that started it.

A worker whose pipes are full stops until they are read, and the caller may not read for a long time. So two threads of
the job drain stdout and stderr from the start. They store the output records, the last messages and the error of the
progress callback; the methods of ``Job`` wait for these.

shared field                 guarded by                             test
lines of stdout              _changed                               test_outputs_come_while_the_worker_runs
end of stdout                _changed                               test_outputs_end_with_the_error_of_the_worker
text of stderr               written by one thread; read after it   test_failure_of_a_launched_job_is_an_exception
                             has ended, except by ``warnings``
error of the callback        written by one thread; read after it   test_error_of_the_progress_callback_is_raised
                             has ended

JOB-1  Both pipes are drained all the time, even if the callback raises and no caller reads: the worker never waits for
    a reader.                                                       test_worker_with_long_messages_is_not_held_up
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
from nitrous_ema._base.arguments import clamp_timeout, pluralize
from nitrous_ema._base.threads import thread_errors
from nitrous_ema.errors import NitrousError, WorkerError, bug
from nitrous_ema.synthesis.worker.output_record import Output
from nitrous_ema.synthesis.worker.reporting import PROGRESS, WARNING

_STDERR_CHARACTERS = 16_000  # the end of stderr has the error; a worker that runs for days must not fill the memory
_KILL_AFTER_SECONDS = 10.0
_CANCELLED = (-signal.SIGTERM, -signal.SIGKILL, exit_status.INTERRUPTED)

ProgressCallback = Callable[[int, int], object]
"""Called with the bytes read so far and the bytes to read, on a thread of the job."""


class Job:
    """Handle of a synthesis process. The worker runs on its own while this process runs; no method has to be called.

    After this process has ended, the worker ends at its next write to a pipe. Averages that were written remain.

    Args:
        process: The worker, with pipes.
        progress: Called on a thread of the job. After the first error it is not called again, and result() raises
            that error.
    """

    def __init__(self, process: subprocess.Popen[str], progress: ProgressCallback | None = None) -> None:
        self._process = process
        self._progress = progress
        self._changed = threading.Condition()
        self._lines: list[str] = []  # guarded by _changed; only grows
        self._has_all = False  # guarded by _changed
        self._stderr = ""  # written by the stderr thread
        self._callback_error: BaseException | None = None  # written by the stderr thread
        self._is_cancelled = False
        # Daemon threads, so that a program which does not wait for the job can end.
        self._drains = [
            threading.Thread(target=self._drain_stdout, name="synthesize-stdout", daemon=True),
            threading.Thread(target=self._drain_stderr, name="synthesize-stderr", daemon=True),
        ]
        for drain in self._drains:
            try:
                with thread_errors():
                    drain.start()
            except NitrousError:
                process.kill()  # its pipes would not be read
                process.wait()
                raise

    def __repr__(self) -> str:
        status = self._process.poll()
        state = "running" if status is None else "done" if status == 0 else f"ended with exit status {status}"
        with self._changed:
            return f"<Job of process {self._process.pid}: {state}, {pluralize(len(self._lines), 'output')} so far>"

    def done(self) -> bool:
        """Return whether the process has ended, successfully or not."""
        return self._process.poll() is not None

    def outputs(self, timeout: float | None = None) -> Iterator[Output]:
        """Iterate over the outputs, each as soon as it is durable. Every call begins with the first output.

        Args:
            timeout: Seconds to wait for each output; None waits without a limit. The process continues after a timeout.

        Raises:
            TimeoutError: No further output was reported within the timeout.
            ValueError: As result(), after the last output.
            WorkerError: The worker failed or was cancelled; raised after the last output.
        """
        timeout = clamp_timeout(timeout)
        for index in count():
            line = self._line(index, timeout)
            if line is None:
                break
            yield Output.parse(line)
        self.result(timeout)

    def _line(self, index: int, timeout: float | None) -> str | None:
        """Wait for a line of stdout and return it; None if stdout ends before it."""
        with self._changed:
            if not self._changed.wait_for(lambda: index < len(self._lines) or self._has_all, timeout):
                raise TimeoutError(
                    f"the synthesis process has reported no further output within {timeout} seconds; it is still "
                    "running. Wait again, or cancel() it."
                )
            return self._lines[index] if index < len(self._lines) else None

    def result(self, timeout: float | None = None) -> list[Output]:
        """Wait for the process and return its outputs: by step, then in the order of the requested lengths.

        Args:
            timeout: Seconds to wait; None waits without a limit. The process continues after a timeout.

        Raises:
            TimeoutError: The process has not ended yet.
            ValueError: The process rejected an argument; the message is the one that it printed.
            WorkerError: The process failed or was cancelled; has ``exit_code`` and the end of its ``stderr``.
        """
        timeout = clamp_timeout(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            status = self._process.wait(timeout)
            # The last lines may still be in the pipes. A process that inherited the pipes can keep them open after the
            # worker has ended, so the timeout covers this wait too.
            for drain in self._drains:
                drain.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"the synthesis process has not ended after {timeout} seconds; it is still running. Wait again, or "
                "cancel() it."
            ) from None
        if any(drain.is_alive() for drain in self._drains):
            raise TimeoutError(
                f"the synthesis process has ended, but its output was not read completely within {timeout} seconds. "
                "Call result() again."
            )
        # The caller passed wrong arguments, so the error is that of a function that checks its arguments itself.
        if status == exit_status.USAGE:
            raise ValueError(_last_message(self._stderr))
        if status != 0:
            raise WorkerError(self._why_ended(status), exit_code=status, stderr=self._stderr)
        if self._callback_error is not None:
            raise self._callback_error
        return [Output.parse(line) for line in self._lines]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of the worker so far; complete when result() has returned."""
        return tuple(line.removeprefix(WARNING) for line in self._stderr.splitlines() if line.startswith(WARNING))

    def cancel(self, timeout: float = _KILL_AFTER_SECONDS) -> None:
        """Terminate the process and wait until it has ended. Outputs that were already written remain.

        Args:
            timeout: Seconds for the process to remove its temporary files before it is killed.
        """
        self._is_cancelled = True  # before the signal: another thread may be waiting in result()
        self._process.terminate()
        try:
            self._process.wait(clamp_timeout(timeout))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _why_ended(self, status: int) -> str:
        if self._is_cancelled and status in _CANCELLED:
            return "the synthesis process was cancelled. Outputs that were already written remain."
        if status < 0:
            reason = " The system kills processes when memory runs out." if status == -signal.SIGKILL else ""
            return (
                f"the synthesis process was terminated by {_signal_name(-status)}.{reason} "
                "Outputs that were already written remain."
            )
        return f"the synthesis process failed with exit status {status}: {_last_message(self._stderr)}"

    def _drain_stdout(self) -> None:
        try:
            with _pipe(self._process.stdout) as pipe:
                for line in pipe:
                    with self._changed:
                        self._lines.append(line)
                        self._changed.notify_all()
        finally:
            # Also after an error of this thread: callers that wait for a line must wake up.
            with self._changed:
                self._has_all = True
                self._changed.notify_all()

    def _drain_stderr(self) -> None:
        with _pipe(self._process.stderr) as pipe:
            for line in pipe:
                if line.startswith(PROGRESS):
                    self._report_progress(line)
                else:
                    self._stderr = (self._stderr + line)[-_STDERR_CHARACTERS:]
        self._process.wait()  # else Popen issues a ResourceWarning if the caller drops the job without result()

    def _report_progress(self, line: str) -> None:
        if self._progress is None or self._callback_error is not None:
            return
        progress = json.loads(line)["progress"]
        try:
            self._progress(progress["done"], progress["total"])
        except BaseException as error:  # stored, not raised: this thread must go on draining stderr (JOB-1)
            self._callback_error = error


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise bug("the worker was started without a pipe")
    return pipe


def _last_message(stderr: str) -> str:
    """Return the last line of stderr, or the whole traceback if stderr ends in one."""
    _, traceback, rest = stderr.rpartition("Traceback (most recent call last):")
    if traceback:
        return traceback + rest.rstrip()
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else "no message on stderr"
