"""Files and folders appear whole or not at all, whoever else writes there and whatever goes wrong.

What a conversion leaves behind when it fails or is interrupted is in test_convert.py.
"""

import errno
import multiprocessing
import os
import resource
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vit_embed.conversion import writer
from vit_embed.conversion.reading import read_checkpoint
from vit_embed.conversion.writer import new_file, new_folder, write_state_dict
from vit_embed.convert_checkpoint import convert_checkpoint, restore_checkpoint

WEIGHTS = {"a": torch.arange(6.0), "b": torch.ones(2, 3).half()}
BOTH = pytest.mark.parametrize("new", [new_folder, new_file])


def fill(new, partial: Path, content: str) -> None:
    if new is new_folder:
        for number in range(3):
            (partial / f"{number}.txt").write_text(content)
    else:
        partial.write_text(content)


def content_of(path: Path) -> set[str]:
    return {each.read_text() for each in (path.iterdir() if path.is_dir() else (path,))}


def target_of(new, folder: Path) -> Path:
    return folder / ("out" if new is new_folder else "out.pt")


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


# Two at once


def race(new, target: Path, number: int, start, results) -> None:
    start.wait()
    try:
        with new(target) as partial:
            fill(new, partial, str(number))
        results.put((number, None))
    except FileExistsError as error:
        results.put((number, str(error)))


@BOTH
def test_of_two_processes_one_writes_all_and_the_other_is_refused(tmp_path, new):
    context = multiprocessing.get_context("fork")
    for number in range(10):
        target = target_of(new, tmp_path / str(number))
        start, results = context.Barrier(2), context.Queue()
        processes = [context.Process(target=race, args=(new, target, each, start, results)) for each in range(2)]
        for process in processes:
            process.start()
        outcomes = [results.get(timeout=60) for _ in range(2)]
        (winner, refusal), (loser, message) = sorted(outcomes, key=lambda outcome: outcome[1] or "")
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert refusal is None and message is not None and {winner, loser} == {0, 1}
        assert "must be a new" in message and str(target) in message
        assert content_of(target) == {str(winner)} and os.listdir(target.parent) == [target.name]


def write_for_ever(new, target: Path, written) -> None:
    with new(target) as partial:
        fill(new, partial, "half")
        written.set()
        time.sleep(300)


@BOTH
def test_a_killed_process_leaves_no_target(tmp_path, new):
    target = target_of(new, tmp_path)
    context = multiprocessing.get_context("fork")
    written = context.Event()
    process = context.Process(target=write_for_ever, args=(new, target, written))
    process.start()
    assert written.wait(60)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    [left] = os.listdir(tmp_path)
    assert left.startswith(f".{target.name}.") and left.endswith(".partial")
    with new(target) as partial:  # the next one is not in its way
        fill(new, partial, "whole")
    assert content_of(target) == {"whole"}


# Targets that are not free, or become so


@BOTH
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "link in a ring"])
def test_a_target_that_appears_meanwhile_stays_as_it_is(tmp_path, new, kind):
    target = target_of(new, tmp_path)
    with pytest.raises(FileExistsError, match="must be a new"), new(target) as partial:
        fill(new, partial, "mine")
        if kind == "file":
            target.write_text("theirs")
        elif kind == "folder":
            target.mkdir()
            (target / "theirs.txt").write_text("theirs")
        else:
            target.symlink_to("nowhere" if kind == "dangling link" else target.name)
    assert os.listdir(tmp_path) == [target.name]
    if kind in ("file", "folder"):
        assert content_of(target) == {"theirs"}
    else:
        assert target.is_symlink()


def test_an_output_that_is_a_dangling_link_is_written_where_it_points(source, tmp_path):
    (tmp_path / "link").symlink_to("elsewhere")
    convert_checkpoint(source.file, tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link"] and (tmp_path / "link" / "config.json").is_file()


@BOTH
def test_a_file_system_without_hard_links_or_synced_folders(tmp_path, monkeypatch, new):
    synced = os.fsync

    def no_link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        synced(descriptor)

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(os, "fsync", only_files)
    target = target_of(new, tmp_path)
    with new(target) as partial:
        fill(new, partial, "whole")
    assert content_of(target) == {"whole"} and os.listdir(tmp_path) == [target.name]
    with pytest.raises(FileExistsError), new(target) as partial:
        fill(new, partial, "again")
    assert content_of(target) == {"whole"} and os.listdir(tmp_path) == [target.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes everywhere")
@BOTH
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path, new):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path)), new(target_of(new, tmp_path)) as partial:
        fill(new, partial, "never")
    tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == []


@BOTH
def test_a_parent_that_is_a_file_is_named(tmp_path, new):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(OSError, match="file"), new(target_of(new, tmp_path / "file")) as partial:
        fill(new, partial, "never")
    assert content_of(tmp_path / "file") == {"keep"}


@BOTH
@pytest.mark.parametrize("letter", ["a", "é"])
def test_a_name_as_long_as_names_may_be(tmp_path, new, letter):
    target = tmp_path / (letter * (250 // len(letter.encode())) + ".pt")
    with new(target) as partial:
        fill(new, partial, "whole")
    assert content_of(target) == {"whole"}


# Modes


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_are_what_the_umask_says(source, tmp_path, umask, mask, file_mode, folder_mode):
    os.umask(mask)
    convert_checkpoint(source.file, tmp_path / "out")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {file_mode}, modes  # safetensors keeps its files to their owner
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder_mode
    for ending in (".pt", ".safetensors"):
        restore_checkpoint(tmp_path / "out", "openai", output_file=tmp_path / f"back{ending}")
        assert stat.S_IMODE((tmp_path / f"back{ending}").stat().st_mode) == file_mode


def test_an_empty_folder_keeps_its_mode(tmp_path, umask):
    (tmp_path / "out").mkdir(mode=0o700)
    with new_folder(tmp_path / "out") as partial:
        assert stat.S_IMODE(partial.stat().st_mode) == 0o700
        fill(new_folder, partial, "mine")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


# Formats


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth", ".bin"])
def test_what_is_written_is_what_is_read(tmp_path, ending):
    write_state_dict(tmp_path / "a", ending, WEIGHTS)
    got = read_checkpoint(tmp_path / "a")
    assert got.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_full_disk_leaves_no_file(source, tmp_path, ending):
    convert_checkpoint(source.file, tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))  # the weights are 2 MB
    try:
        with pytest.raises(OSError, match="the weights could not be written"):
            restore_checkpoint(tmp_path / "out", "openai", output_file=tmp_path / "a" / f"back{ending}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_that_turns_out_full_at_the_end_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(writer, "sync", full)
    for new in (new_file, new_folder):
        with pytest.raises(OSError, match="No space left"), new(target_of(new, tmp_path / "parent")) as partial:
            fill(new, partial, "lost")
        assert os.listdir(tmp_path) == []
