"""`--engine ray`: the rows of one process, whatever is killed.

A cluster of two nodes with a core each stands on this machine (`ray.cluster_utils`).
"""

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from embedded import rows
from stores import REPO, assert_same, some_pictures

from vit_embed.retrieval.callables import EmbedPictures
from vit_embed.retrieval.embed_command import main
from vit_embed.retrieval.embedder import load_embedder
from vit_embed.retrieval.sources import Item, Source, find_source
from vit_embed.retrieval.store import Known, Store, digest

pytest.importorskip("ray.data", reason='needs Ray Data: pip install "vit_embed[ray]"')

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from vit_embed.retrieval import ray_engine  # noqa: E402

MODEL = str(REPO)
OPTIONS = ("--dtype", "float32", "--batch_size", "1", "--shard_size", "4")
STORE_BYTES = 100 * 2**20


def known_items(*known: str) -> Known:
    digests = np.sort(np.array([digest(key, "") for key in known], "S16"))
    return Known(digests, digests, digests)


def test_what_ray_maps_gives_the_rows_of_the_local_engine(tmp_path):
    """Without a cluster: its callable alone, from what is listed to what is written."""
    photos = some_pictures(tmp_path / "photos", 5)
    embedder = load_embedder(MODEL, "float32")
    about = {**embedder.about(), "vector_dtype": "float16"}
    embed_items = ray_engine.EmbedItems(about, {"model": MODEL, "dtype": "float32", "batch_size": 2})
    rows = pickle.dumps(list(find_source(str(photos)).items()))
    (packed,) = embed_items({"items": [rows]})["table"]
    tables = [pa.ipc.open_stream(packed).read_all()]
    store = Store(tmp_path / "ray.parquet", embedder.about())
    with store.locked():
        ray_engine._write(store, tables)
    assert main([str(photos), "--output", str(tmp_path / "local.parquet"), "--dtype", "float32"]) == 3
    assert_same(tmp_path / "ray.parquet", tmp_path / "local.parquet")
    assert store.counts() == (5, 1)


def test_listing_is_a_stream_that_leaves_out_what_is_known(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda known: known)
    listed = []

    def items():
        for number in range(10):
            listed.append(number)
            yield Item(str(number), "", b"x" * (2**20 * 20 if number == 5 else 1))

    source = ray_engine.ItemSource(lambda: Source(items, lambda: None), known_items("2", "9"), 3)
    (task,) = source.get_read_tasks(7)
    blocks = task()
    sizes, first = [], True
    for block in blocks:
        sizes.append([item.key for item in pickle.loads(block["items"][0].as_py())])
        if first:
            assert max(listed) == 3
            first = False
    assert sizes == [["0", "1", "3"], ["4", "5", "6"], ["7", "8"]]
    monkeypatch.setattr(ray_engine, "BYTES_A_ROW", 2**20)
    sizes = [[item.key for item in pickle.loads(block["items"][0].as_py())] for block in task()]
    assert sizes == [["0", "1", "3"], ["4", "5"], ["6", "7", "8"]]


@pytest.mark.parametrize(
    "nodes, workers, share, copies",
    [
        ([{"CPU": 4}, {"CPU": 2}], None, {"num_cpus": 1}, 6),
        ([{"CPU": 4}, {"CPU": 2}], 3, {"num_cpus": 3}, 1),
        ([{"CPU": 64, "GPU": 8}, {"CPU": 48, "GPU": 4}, {"CPU": 16}], None, {"num_gpus": 1, "num_cpus": 8}, 12),
        ([{"CPU": 2, "GPU": 4}], None, {"num_gpus": 1, "num_cpus": 1}, 2),
    ],
)
def test_a_copy_of_the_model_for_each_gpu_or_core(nodes, workers, share, copies, monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    assert ray_engine._share_of_a_copy(workers) == share
    assert ray_engine._copies(share) == copies


def test_a_cluster_without_room_is_refused(monkeypatch):
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"Alive": False, "Resources": {"CPU": 8}}, {"Alive": True, "Resources": {"CPU": 2}}]
    )
    with pytest.raises(ValueError, match="expected a machine of the Ray cluster to have .*4.* set --workers"):
        ray_engine._copies({"num_cpus": 4})


def test_what_was_raised_on_a_worker_is_raised_here():
    cause = ValueError("expected --model to be a folder")
    with pytest.raises(ValueError, match="^expected --model"), ray_engine._plain_errors():
        raise ray.exceptions.RayTaskError("f", "traceback", cause)
    with pytest.raises(ImportError, match="No module named 'vit_embed': install"), ray_engine._plain_errors():
        raise ray.exceptions.RayTaskError("f", "traceback", ModuleNotFoundError("No module named 'vit_embed'"))
    with pytest.raises(OSError, match="run the same command again"), ray_engine._plain_errors():
        raise ray.exceptions.ObjectLostError("0" * 56, None, "")


class TwoNodes:
    """A cluster of this process, and who works in it."""

    def __init__(self) -> None:
        head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.second = self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        self.cluster.wait_for_nodes()
        ray.init(address=self.cluster.address, log_to_driver=False)

    def copies(self) -> dict[int, int]:
        """{process: node's process} of the copies of the model, of this cluster alone."""
        listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
        table = [
            (int(pid), int(parent), words)
            for pid, parent, words in (line.split(None, 2) for line in listed.splitlines())
        ]
        nodes = {pid for pid, parent, _ in table if parent == os.getpid()}
        return {pid: parent for pid, parent, words in table if parent in nodes and "EmbedItems" in words}

    def kill_a_copy(self) -> None:
        os.kill(max(self.copies()), signal.SIGKILL)

    def remove_a_node(self) -> None:
        self.cluster.remove_node(self.second)

    def nothing(self) -> None:
        pass

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture
def two_nodes():
    with contextlib.closing(TwoNodes()) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder with photos and the store that one process makes of them."""
    folder = tmp_path_factory.mktemp("local")
    assert main([str(some_pictures(folder / "photos", 60)), "--output", str(folder / "local.parquet"), *OPTIONS]) == 3
    return folder


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes with ps")
@pytest.mark.parametrize("what", ["nothing", "kill_a_copy", "remove_a_node"])
def test_two_nodes_give_the_rows_of_one_process(what, two_nodes, local, tmp_path):
    store, seen = tmp_path / "ray.parquet", []

    def middle():
        while not list(store.glob("part-*")):
            time.sleep(0.02)
        seen.append(two_nodes.copies())
        getattr(two_nodes, what)()
        seen.append(len(rows(store)))

    watcher = threading.Thread(target=middle, daemon=True)
    watcher.start()
    assert main([str(local / "photos"), "--output", str(store), "--engine", "ray", *OPTIONS]) == 3
    watcher.join(timeout=60)
    copies, done_when_it_happened = seen
    assert len(set(copies.values())) == 2, "both nodes had a copy of the model"
    assert done_when_it_happened < 60, "it happened in the middle"
    print(what, "after", done_when_it_happened, "rows; largest difference", assert_same(store, local / "local.parquet"))


@pytest.mark.heavy
def test_one_machine_goes_on_with_what_is_missing(local, tmp_path, capsys, monkeypatch):
    """A store that the local engine began; changed and new pictures; then nothing to do; another model's store."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    photos = some_pictures(Path("photos"), 10)
    assert main(["photos", "--output", "out.parquet", *OPTIONS]) == 3
    for picture in sorted((local / "photos").glob("*.png"))[10:20]:
        os.link(picture, photos / picture.name)
    first, second = sorted(photos.glob("*.png"))[:2]
    shutil.copy(second, first)  # changed
    capsys.readouterr()
    ray.init(num_cpus=1, object_store_memory=STORE_BYTES, include_dashboard=False, log_to_driver=False)
    try:
        arguments = ["photos", "--output", "out.parquet", "--engine", "ray", *OPTIONS]
        assert main(arguments) == 0  # what could not be read is known
        assert "10 were there; 11 embedded" in capsys.readouterr().out
        assert main(arguments) == 0
        assert "; 0 embedded" in capsys.readouterr().out
        assert main([*arguments, "--full_size"]) == 1
        assert "holds embeddings of" in capsys.readouterr().err
        assert main([*arguments, "--model", "nowhere"]) == 1
        assert "expected --model to be a folder" in capsys.readouterr().err
    finally:
        ray.shutdown()
    assert main(["photos", "--output", "fresh.parquet", *OPTIONS]) == 3
    assert_same(Path("out.parquet"), Path("fresh.parquet"))


@pytest.mark.heavy
def test_texts_and_extra_columns(tmp_path):
    (tmp_path / "captions.txt").write_text("a cat\na dog\n" + "word " * 500 + "\n")
    photos = some_pictures(tmp_path / "photos", 4)
    ray.init(num_cpus=1, object_store_memory=STORE_BYTES, include_dashboard=False, log_to_driver=False)
    try:
        for name, arguments in {
            "texts": ["--texts", str(tmp_path / "captions.txt")],
            "patches": [str(photos), "--patches", "--sha256", "--vector_dtype", "float32"],
        }.items():
            stores = [tmp_path / f"{name}-{engine}.parquet" for engine in ("local", "ray")]
            for engine, store in zip(("local", "ray"), stores):
                assert main([*arguments, *OPTIONS, "--output", str(store), "--engine", engine]) == 3
            by_engine = [pa.concat_tables(map(pa.parquet.read_table, sorted(s.glob("part-*")))) for s in stores]
            wanted, found = (table.sort_by("path") for table in by_engine)
            assert found.schema.equals(wanted.schema) and len(found) > 1
            for column in set(wanted.column_names) - {"embedding", "patches"}:
                assert found[column].to_pylist() == wanted[column].to_pylist()
            assert_same(*reversed(stores))
        # And the callable of docs/many-machines.md, in a data set of the user's own.
        files = [*map(str, sorted(photos.glob("*.png"))[:4]), "nowhere.png"]
        rows = ray.data.from_items([{"image": file, "number": number} for number, file in enumerate(files)])
        options = {"fn_constructor_args": (MODEL,), "fn_constructor_kwargs": {"dtype": "float32"}}
        done = rows.map_batches(EmbedPictures, **options, batch_size=2, concurrency=1).take_all()
    finally:
        ray.shutdown()
    wanted = rows(tmp_path / "patches-local.parquet")
    assert len(done) == 5 and {row["number"] for row in done} == set(range(5))
    for row in done:
        if row["image"] == "nowhere.png":
            assert row["embedding"] is None and row["reason"] == "No such file or directory"
        else:
            assert abs(row["embedding"] - wanted[Path(row["image"]).name]).max() < 1e-5 and row["reason"] is None
