from __future__ import annotations

from pathlib import Path

import pytest

from nitrous_ema import LegacyFolder, SnapshotStore
from nitrous_ema._base.paths import local_path
from nitrous_ema.cli import program
from nitrous_ema.synthesis.worker.launch import launch
from nitrous_ema.synthesis.worker.output_names import OutputNames


def test_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("checkpoint_folder", "~/ema") == tmp_path / "ema"
    assert local_path("checkpoint_folder", Path("~")) == tmp_path
    assert local_path("checkpoint_folder", "a~b") == Path("a~b")
    assert SnapshotStore("~/ema").root == tmp_path / "ema"
    assert OutputNames("~/{step}/{sigma_rel}.pt").out == str(tmp_path / "{step}/{sigma_rel}.pt")


@pytest.mark.parametrize(
    "url", ["s3://bucket/ema", "gs://x", "hf://buckets/me/x", Path("s3://bucket"), "file:///tmp/x"]
)
def test_url_is_refused_by_name(url, tmp_path, capsys):
    """Otherwise a folder of that name would be created below the working directory."""
    made = [
        lambda: local_path("checkpoint_folder", url),
        lambda: SnapshotStore(url),
        lambda: LegacyFolder(url, gammas=[7.0]),
        lambda: OutputNames(str(url)),
        lambda: launch(url, out=tmp_path, gammas=[7.0]),
        lambda: launch(tmp_path, out=url, gammas=[7.0]),
    ]
    for make in made:
        with pytest.raises(ValueError, match=r"is '(s3|gs|hf|file):/.*', a URL; expected a path of this machine"):
            make()
    assert program.main(["inspect", str(url)]) == 2
    assert "a URL; expected a path of this machine" in capsys.readouterr().err


@pytest.mark.parametrize(("path", "error"), [("", ValueError), ("a\0b", ValueError), (5, TypeError), (b"x", TypeError)])
def test_value_that_is_no_path_is_refused(path, error):
    with pytest.raises(error, match=r"^checkpoint_folder is "):
        local_path("checkpoint_folder", path)


def test_unknown_user_is_named():
    with pytest.raises(ValueError, match=r"--out is '~nobody-of-this-name/x': .*Write the path in full"):
        local_path("--out", "~nobody-of-this-name/x")


@pytest.mark.parametrize("name", ["ema", "./C:x", "a:b/c", "C:/ema", "run=3:4"])
def test_names_with_a_colon_are_paths(name):
    assert local_path("out", name) == Path(name)
