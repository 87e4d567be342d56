"""Threads that wait for events put themselves in the relaxed capture mode, where the driver has one."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from nitrous_ema.async_ import graph_capture, lanes
from nitrous_ema.averaging.execution.background_thread import BackgroundThread
from tests.support.fakes import TIMEOUT_SECONDS


class Driver:
    """A driver that logs the modes that are set, and the waits."""

    def __init__(self):
        self.log = []

    def load(self, library):
        self.log.append(library)
        return self

    def cuThreadExchangeStreamCaptureMode(self, mode):
        self.log.append(mode._obj.value)


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", driver.load)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(lanes, "_set_device_index", lambda index: None)
    return driver


def mark_of(driver, device_type):
    """A mark whose event only logs its calls."""

    class Event:
        def synchronize(self):
            driver.log.append("wait")

        def query(self):
            driver.log.append("query")
            return True

    mark = object.__new__(lanes._DeviceMark)
    mark._event, mark._device = Event(), torch.device(device_type, 1)
    return mark


def on(thread_class, work):
    thread = thread_class(work, "test") if thread_class is BackgroundThread else thread_class(target=work)
    thread.start()
    thread.join(TIMEOUT_SECONDS)


def test_thread_is_relaxed_once_before_it_waits(driver):
    mark = mark_of(driver, "cuda")
    on(BackgroundThread, lambda: (mark.wait_on_host(), mark.wait_on_host()))
    assert driver.log == ["libcuda.so.1", graph_capture._RELAXED, "wait", "wait"]


def test_thread_is_relaxed_before_it_queries(driver):
    """A file may fail before its first page: then the first call is a query."""
    mark = mark_of(driver, "cuda")
    on(BackgroundThread, mark.is_reached)
    assert driver.log == ["libcuda.so.1", graph_capture._RELAXED, "query"]


def test_threads_of_the_trainer_are_left_alone(driver):
    mark = mark_of(driver, "cuda")
    on(threading.Thread, mark.wait_on_host)
    assert driver.log == ["wait"]


def test_devices_without_such_captures_are_left_alone(driver):
    mark = mark_of(driver, "xpu")
    on(BackgroundThread, mark.wait_on_host)
    assert driver.log == ["wait"]


@pytest.mark.parametrize("missing", [OSError, AttributeError])
def test_driver_without_the_call_is_left_alone(driver, monkeypatch, missing):
    def load(library):
        raise missing(library)

    monkeypatch.setattr(ctypes, "CDLL", load)
    mark = mark_of(driver, "cuda")
    on(BackgroundThread, mark.wait_on_host)
    assert driver.log == ["wait"]
