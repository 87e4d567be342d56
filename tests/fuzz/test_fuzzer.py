"""The fuzzer finds no wrong answer of any reader, and finds one when a check of a reader is removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.engine import fuzz
from tests.fuzz.targets import TARGETS, TRACED

HEADER, LAYOUT, JSON = "snapshots.header", "snapshots.layout", "snapshots.bounded_json"
TORCH, READING, AVERAGE = "snapshots.torch_archive", "snapshots.reading", "synthesis.outputs.reader"

# Checks that a test removes one at a time: the fuzzer must find a wrong answer of this reader then.
PLANTED = {
    "checksum of the header": ("snapshot", HEADER, 'if blob[_CRC_BEGIN:crc_end] != b"%08x" % crc32:', "if False:"),
    "fields of another type": (
        "snapshot",
        HEADER,
        "except (ValueError, TypeError) as error:",
        "except ValueError as error:",
    ),
    "size of the file": ("snapshot", HEADER, "if file_bytes != end + layout.data_bytes:", "if False:"),
    "one byte string for a layout": ("snapshot", HEADER, "if layout.header_json != header_json:", "if False:"),
    "checksums of the chunks": (
        "snapshot",
        READING,
        "if is_whole and running.crc != source.crc32[chunk]:",
        "if False:",
    ),
    "missing facts": ("snapshot", HEADER, "except KeyError as error:", "except ZeroDivisionError as error:"),
    "no bytes after the tensors": ("average.safetensors", AVERAGE, "if position != file_bytes:", "if False:"),
    "whole numbers as sizes": (
        "average.safetensors",
        AVERAGE,
        "if type(numbers) is not list or not all(type(each) is int and 0 <= each < 2**63 for each in numbers):",
        "if False:",
    ),
    "no gaps between the tensors": ("average.safetensors", AVERAGE, "if each.begin != position:", "if False:"),
    "depth": ("average.safetensors", JSON, "except RecursionError:", "except ZeroDivisionError:"),
    "names once": ("average.safetensors", JSON, "if len(found) < len(pairs):", "if False:"),
    "checksums of an average": ("average.pt", AVERAGE, "        verify_archive(path)\n", ""),
    "checksums of an old snapshot": ("legacy", TORCH, "if found not in expected:", "if False:"),
    "any error of torch": (
        "legacy",
        TORCH,
        "except Exception as error:  # of any class: the pickle in the file decides what torch does",
        "except RuntimeError as error:",
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_no_reader_gives_a_wrong_answer_for_a_hostile_file(tmp_path, name):
    report = fuzz(TARGETS[name](tmp_path), seed=0, executions=150)
    assert not report.findings, {found.message for found in report.findings.values()}
    assert report.taken >= 2
    assert len(report.corpus) >= 5


@pytest.mark.parametrize("missing", PLANTED)
def test_removed_check_is_noticed(tmp_path, missing):
    name, module, found, replacement = PLANTED[missing]
    target = TARGETS[name](tmp_path, {module: [(found, replacement)]})
    assert fuzz(target, seed=0, executions=3000, stop_at_first=True).findings


def test_traced_modules_exist():
    """The coverage of a module that was moved would be empty, without any error."""
    assert [path for path in TRACED if not Path(path).is_file()] == []


@pytest.mark.parametrize("name", TARGETS)
def test_same_seed_tries_the_same_files(tmp_path, name):
    reports = []
    for run in "ab":
        (tmp_path / run).mkdir()
        reports.append(fuzz(TARGETS[name](tmp_path / run), seed=3, executions=50))
    assert reports[0] == reports[1]
