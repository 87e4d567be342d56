"""Synthesis into folders with hostile contents: it writes nothing outside ``--out`` and follows no link."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import safetensors.numpy
import torch

from nitrous_ema._base.exit_status import DONE, FAILED, USAGE
from nitrous_ema.async_ import synthesize_worker as worker
from nitrous_ema.cli import program as cli
from nitrous_ema.synthesis.outputs.writer import output_name
from tests.support.snapshot_folders import layout_of, record, write_run

STEP = 300
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    root = tmp_path_factory.mktemp("source") / "snapshots"
    write_run(root, layout_of([record("w", (50,))]), [100, 200, STEP])
    return root


@pytest.fixture(params=["worker", "cli"])
def main(request, monkeypatch):
    for name in THREADS:
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # the command sets them; monkeypatch restores them
    return worker.main if request.param == "worker" else lambda arguments: cli.main(["synthesize", *arguments])


def arguments(snapshots, out, suffix=".safetensors", sigma_rel="0.1"):
    plain = str(out).replace("{", "{{").replace("}", "}}")  # --out has fields in braces
    return [str(snapshots), "--sigma-rel", sigma_rel, "--out", plain, "--format", suffix[1:], "--nice", "never"]


def everything(*roots, without=None):
    """Return kind, content and modification time of everything below some folders; links are not followed."""
    found = {}
    for root in roots:
        for folder, folders, files in os.walk(root):
            for name in [*folders, *files]:
                path = os.path.join(folder, name)
                status = os.lstat(path)
                if without is None or not path.startswith(str(without) + os.sep):
                    content = Path(path).read_bytes() if stat.S_ISREG(status.st_mode) else None
                    found[path] = status.st_mode, content, None if path == str(without) else status.st_mtime_ns
    return found


def put_in_the_way(kind, path, outside):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "hard link":
        os.link(outside / "file", path)
    elif kind == "folder":
        path.mkdir()
    else:
        targets = {"file": outside / "file", "nowhere": outside / "new", "itself": path, "a folder": outside}
        path.symlink_to(targets.get(kind.removeprefix("link to "), "/dev/full"))


LINKS = (
    "link to file",
    "link to nowhere",
    "link to itself",
    "link to a folder",
    "link to a device",
    "hard link",
    "pipe",
)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", LINKS)
def test_entry_with_the_name_of_an_output_is_replaced_and_not_followed(snapshots, tmp_path, main, capsys, kind, suffix):
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    path = out / output_name(STEP, 0.1, suffix)
    put_in_the_way(kind, path, outside)
    before = everything(tmp_path, snapshots, without=out)
    assert main(arguments(snapshots, out, suffix)) == DONE
    assert everything(tmp_path, snapshots, without=out) == before
    assert os.listdir(out) == [path.name]
    assert stat.S_ISREG(os.lstat(path).st_mode)
    loaded = torch.load(path, weights_only=True) if suffix == ".pt" else safetensors.numpy.load_file(path)
    assert loaded["w"].shape == (50,)


def test_folder_with_the_name_of_an_output_stays_and_is_reported(snapshots, tmp_path, main, capsys):
    path = tmp_path / "out" / output_name(STEP, 0.1)
    path.mkdir(parents=True)
    (path / "file").write_bytes(b"precious")
    before = everything(tmp_path, snapshots, without=tmp_path / "out")
    assert main(arguments(snapshots, tmp_path / "out")) == FAILED
    assert path.name in capsys.readouterr().err
    assert everything(tmp_path, snapshots, without=tmp_path / "out") == before
    assert os.listdir(tmp_path / "out") == [path.name]
    assert os.listdir(path) == ["file"]


@pytest.mark.parametrize(
    "name", ["a\nb", "a\x1b[2J", "\udcff\udcfe", "-x", " ", "...", "x" * 200, "a\\b", "ü·模", "%s{}"]
)
def test_odd_folder_name_is_used_unchanged(snapshots, tmp_path, main, capsys, name):
    try:
        os.mkdir(tmp_path / name)
    except OSError:
        pytest.skip("this file system does not allow the name")
    out = tmp_path / name / name
    before = everything(tmp_path, snapshots, without=tmp_path / name)
    assert main(arguments(snapshots, out)) == DONE
    assert worker.Output.parse(capsys.readouterr().out).path == out / output_name(STEP, 0.1)
    assert os.listdir(out) == [output_name(STEP, 0.1)]
    assert everything(tmp_path, snapshots, without=tmp_path / name) == before


@pytest.mark.parametrize(
    "kind", ["link to file", "link to nowhere", "link to itself", "pipe", "below a file", "too long"]
)
def test_out_that_cannot_be_a_folder_is_reported_and_nothing_is_written(snapshots, tmp_path, main, capsys, kind):
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    if kind == "below a file":
        out = outside / "file" / "out"
    elif kind == "too long":
        out = tmp_path / ("x" * 300)
    else:
        put_in_the_way(kind, out, outside)
    before = everything(tmp_path, snapshots)
    assert main(arguments(snapshots, out)) == FAILED
    assert capsys.readouterr().out == ""
    assert everything(tmp_path, snapshots) == before


@pytest.mark.parametrize(
    "sigma_rel", ["../../x", "/etc/x", "0.1/../x", "nan", "1e999999999", "9" * 5000, "0.1\n", "\x00"]
)
def test_length_must_be_a_number_before_it_becomes_part_of_a_name(snapshots, tmp_path, main, capsys, sigma_rel):
    status = main(arguments(snapshots, tmp_path / "out", sigma_rel=sigma_rel))
    if sigma_rel.strip() == "0.1":
        assert os.listdir(tmp_path / "out") == [output_name(STEP, 0.1)]
    else:
        assert status == USAGE
        assert os.listdir(tmp_path) == []
