"""`accelerate launch` and torchrun: each process embeds a share into one store."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from embedded import reasons, rows
from stores import REPO, assert_same, some_pictures

from vit_embed.retrieval import store as stores
from vit_embed.retrieval.embed_command import main
from vit_embed.retrieval.run import Share
from vit_embed.retrieval.sources import Item, Source
from vit_embed.retrieval.store import Store

ABOUT = {"input": "pictures"}


def two_processes(folder: Path, run: int, *arguments: object) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of two processes with the variables that torchrun sets."""
    command = [sys.executable, str(REPO / "embed_images.py"), *map(str, arguments)]
    common = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    common["MASTER_PORT"] = str(run)
    options = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [(rank.returncode, *output) for rank, output in zip(ranks, outputs)]


def keys(share: Share, names: list[str]) -> list[str]:
    source = Source(lambda: (Item(name, "", name) for name in names), lambda: len(names))
    return [item.key for item in share.items(source)]


def test_shares_are_all_of_a_source_and_nothing_twice():
    names = [f"{number}.jpg" for number in range(3000)] + ["\udcff.jpg"]
    shares = [keys(Share(rank, 3), names) for rank in range(3)]
    assert sorted(sum(shares, [])) == sorted(names)
    assert min(map(len, shares)) > 900
    # A picture that comes between two listings changes no other's place.
    assert keys(Share(1, 3), ["new.jpg", *names]) in (shares[1], ["new.jpg", *shares[1]])


def test_processes_of_one_run_share_a_store_and_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "SECONDS_TO_JOIN", 0.1)
    path = tmp_path / "out.parquet"
    first, second = (Store(path, ABOUT, rank=rank, run="a") for rank in range(2))
    same_rank, other_run, alone = (
        Store(path, ABOUT, rank=1, run="a"),
        Store(path, ABOUT, rank=2, run="b"),
        Store(path, ABOUT),
    )
    refused = "another run writes to .*out.parquet"
    with first.locked():
        with second.locked():
            for other in (same_rank, other_run, alone):
                with pytest.raises(ValueError, match=refused), other.locked():
                    pass
        with pytest.raises(ValueError, match=refused), other_run.locked():
            pass
        with same_rank.locked():  # begun again
            pass
    with alone.locked(), pytest.raises(ValueError, match=refused), first.locked():
        pass
    with other_run.locked():
        pass
    assert sorted(each.name for each in tmp_path.iterdir() if each.is_dir()) == ["out.errors.parquet", "out.parquet"]


def test_the_last_process_of_a_run_knows_it(tmp_path):
    first, second = (Store(tmp_path / "out.parquet", ABOUT, rank=rank, run="a") for rank in range(2))
    with contextlib.ExitStack() as stack:
        stack.enter_context(first.locked())
        with second.locked():
            assert not second.is_last()
        assert first.is_last()


def test_what_a_killed_process_left_aside_goes(tmp_path):
    store = Store(tmp_path / "out.parquet", ABOUT)
    for name in (".out.parquet.partial", ".out.parquet.7.partial", ".out.parquet.more.partial"):
        (tmp_path / name).mkdir()
    with store.locked():
        assert not (tmp_path / ".out.parquet.7.partial").exists()
    assert [path.name for path in tmp_path.glob(".*.partial")] == [".out.parquet.more.partial"]


def test_two_processes_give_the_rows_of_one(tmp_path):
    """Its store is one store: pictures that change or go bad are replaced, by whichever process."""
    photos = some_pictures(tmp_path / "photos", 30)
    arguments = (photos, "--batch_size", 4, "--shard_size", 8, "--output")
    done = two_processes(tmp_path, 1, *arguments, "two.parquet")
    # Of one process 3; of two, that would make the launcher end the other.
    assert [code for code, _, _ in done] == [0, 0], done
    assert any("1 could not be read" in printed for _, printed, _ in done)  # of the store, so both may say it
    # What auto is where processes would each measure it.
    assert main([*map(str, arguments), str(tmp_path / "one.parquet"), "--dtype", "float32"]) == 3
    assert_same(tmp_path / "two.parquet", tmp_path / "one.parquet")
    shards = [path.name for path in (tmp_path / "two.parquet").iterdir()]
    assert {name[:10] for name in shards} == {"part-r000-", "part-r001-"}

    before, pictures = rows(tmp_path / "two.parquet"), sorted(photos.glob("*.png"))
    for number in range(10):  # each gets the next one's content
        os.replace(pictures[number + 1], pictures[number])
    pictures[10].write_bytes(b"now torn, too")
    done = two_processes(tmp_path, 2, *arguments, "two.parquet")
    assert [code for code, _, _ in done] == [0, 0], done
    after = rows(tmp_path / "two.parquet")
    assert after.keys() == before.keys() - {pictures[10].name}
    for number in range(10):
        assert abs(after[pictures[number].name] - before[pictures[number + 1].name]).max() < 1e-3
    assert reasons(tmp_path / "two.parquet").keys() == {pictures[10].name, "torn.png"}


def test_auto_takes_the_dtype_of_the_store(tmp_path, monkeypatch):
    """Measured again, it could be another: the run would be refused as another model's."""
    photos = some_pictures(tmp_path / "photos", 2)
    arguments = [str(photos), "--output", str(tmp_path / "out.parquet")]
    assert main([*arguments, "--dtype", "bfloat16"]) == 3
    some_pictures(tmp_path / "photos" / "more", 2)
    monkeypatch.setattr("vit_embed.retrieval.embedder.fastest_dtype", lambda model: pytest.fail("measured"))
    assert main(arguments) == 3
    assert len(rows(tmp_path / "out.parquet")) == 4


def children(process: int) -> list[int]:
    """The processes that one has started."""
    listed = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for file in listed for child in file.read_text().split()]


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_one_process_killed_and_the_run_begun_again(tmp_path):
    photos = some_pictures(tmp_path / "photos", 120)
    arguments = [str(photos), "--dtype", "float32", "--batch_size", "1", "--shard_size", "4", "--output"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(REPO / "embed_images.py"), *arguments, "two.parquet"]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    store = tmp_path / "two.parquet"
    try:
        deadline = time.monotonic() + 120
        while not (list(store.glob("part-r000-*")) and list(store.glob("part-r001-*"))):
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.02)
        os.kill(children(running.pid)[1], signal.SIGKILL)
        assert running.wait(timeout=120) != 0
    finally:
        running.kill()
        running.wait()
    part = rows(store)
    assert 0 < len(part) < 120
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main([*arguments, str(tmp_path / "one.parquet")]) == 3
    print("largest difference", assert_same(store, tmp_path / "one.parquet"), "there when killed:", len(part))
    assert not list(tmp_path.glob(".*.partial"))
    assert sum(pq.read_metadata(shard).num_rows for shard in store.iterdir()) == 120
