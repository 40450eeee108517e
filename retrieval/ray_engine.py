"""A source, a model and a store -> a run on every machine of a Ray cluster.

Reading, retries, backpressure and placement are Ray Data's. Ours is one callable, `EmbedItems`, that it maps over
batches: the embedder of the local engine, a copy on each GPU, or on each CPU core where there is no GPU. The process
that starts the run keeps the store: it alone writes shards, from the stream of rows that comes back (a kilobyte a
picture), so a shard is whole or absent as ever, and the other machines need no common disk.

A row of Ray's is several batches of ours (`_pickled`, `_packed`): Ray joins and splits blocks of rows by their bytes,
and would give half a million paths to one copy of the model.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pickle
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from vit_embed.retrieval.callables import EmbedPictures
from vit_embed.retrieval.embed_command import absolute, dtype_there, facts, named, report
from vit_embed.retrieval.run import SAID
from vit_embed.retrieval.sources import Item, Source, find_source, text_source
from vit_embed.retrieval.store import ERRORS, VECTOR_DTYPES, Counts, Known, Store, error_table, rows_table

try:
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask
except ImportError as error:
    raise ImportError(
        f'--engine ray needs Ray Data: pip install "vit_embed[ray]" on every machine ({error})'
    ) from error

# Batches of the model that travel together, fewer where their files come along and are larger than this.
BATCHES_A_ROW, BYTES_A_ROW = 8, 32 * 2**20


class EmbedItems:
    """What Ray maps over its rows: the items of one -> a table of what became of them, with a reason or an embedding.

    Args:
        about: of the store. pictures: arguments of EmbedPictures.
    """

    def __init__(self, about: dict[str, Any], pictures: dict[str, Any]):
        self.about, self.element = about, VECTOR_DTYPES[about["vector_dtype"]]
        self.pictures = EmbedPictures(**pictures)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"table": [_packed(self.embed(pickle.loads(items))) for items in batch["items"]]}

    def embed(self, items: list[Item]) -> pa.Table:
        rows = self.pictures.embed_items(items)
        failures = [failure for each in rows for failure in each.failures]
        good = rows_table(rows, self.about, self.element)
        return pa.concat_tables([good, error_table(failures)], promote_options="default")


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


class ItemSource(Datasource):
    """The items of a source that a store has not, as Ray reads them: listed by one task, as a stream.

    Args:
        opened: gives the source. known: reference of the store's Known. most: items of a row of Ray's.
    """

    def __init__(self, opened: Callable[[], Source], known: Any, most: int):
        self.opened, self.known, self.most = opened, known, most

    def estimate_inmemory_data_size(self) -> int | None:
        return None  # only listing tells

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(functools.partial(_pickled, self.opened, self.known, self.most), unknown)]


def _pickled(opened: Callable[[], Source], known: Any, most: int) -> Iterator[pa.Table]:
    """Blocks of one row; pickled, as paths may be no UTF-8."""
    known = ray.get(known)
    items: list[Item] = []
    size = 0
    for item in opened().items():
        if not known.has(item):
            items.append(item)
            size += len(item.content) if isinstance(item.content, bytes) else 0
        if len(items) == most or size > BYTES_A_ROW:
            yield pa.table({"items": [pickle.dumps(items)]})
            items, size = [], 0
    if items:
        yield pa.table({"items": [pickle.dumps(items)]})


def run_by_ray(options: argparse.Namespace, source: Source, extra: dict[str, Any]) -> int:
    """The command on the cluster that RAY_ADDRESS names or `ray start` has made here, else on this machine alone.

    Args:
        source: of the options. extra: options of the embedder.

    Raises:
        ValueError, OSError: as of the local engine; or the cluster could not go on. What was written stays.
    """
    # Opened once more where it is listed: a source cannot be sent.
    if options.texts is not None:
        opened: Callable[[], Source] = functools.partial(text_source, absolute(options.texts))
    else:
        opened = functools.partial(find_source, absolute(options.source), split=options.split, column=options.column)
    with _cluster(), _plain_errors():
        copy = _share_of_a_copy(options.workers)
        pictures = {
            "model": absolute(options.model),
            "dtype": dtype_there(options),
            "device": options.device,
            "batch_size": options.batch_size,
            "workers": copy["num_cpus"],
            **extra,
        }
        # What the model is and which dtype is fastest is seen where it will run.
        found = ray.get(ray.remote(_facts).options(**copy).remote(pictures))
        store = Store(options.output, {**named(options), **found}, options.vector_dtype)
        before, start = store.counts(), time.perf_counter()
        pictures["dtype"] = found["dtype"]
        added = _embed_into(store, source, opened, pictures, copy, options)
    return report(store, before, added, time.perf_counter() - start)


def _facts(pictures: dict[str, Any]) -> dict[str, Any]:
    return facts(EmbedPictures(**pictures).embedder)


def _embed_into(
    store: Store,
    source: Source,
    opened: Callable[[], Source],
    pictures: dict[str, Any],
    copy: dict[str, int],
    options: argparse.Namespace,
) -> Counts:
    """Embeds what of the source is not in the store; what was added."""
    embedded = unreadable = waiting = 0
    tables: list[pa.Table] = []
    with store.locked():
        known = store.known(options.retry_errors)
        if known.has_replaced():
            store.drop_replaced()
        if all(known.has(item) for item in source.items()):
            return Counts()
        rows = _rows(opened, known, store, pictures, copy, min(BATCHES_A_ROW * options.batch_size, options.shard_size))
        with tqdm(unit="image", smoothing=0.05, dynamic_ncols=True) as bar:
            for table in rows:
                failures = table.filter(pc.is_valid(table["reason"])).select(ERRORS.names).to_pylist()
                for failure in failures[: max(SAID - unreadable, 0)]:
                    tqdm.write(f"left out: {failure['path']!r}: {failure['reason']}")
                embedded, unreadable = embedded + len(table) - len(failures), unreadable + len(failures)
                bar.update(len(table))
                tables, waiting = [*tables, table], waiting + len(table)
                if waiting >= options.shard_size:
                    _write(store, tables)
                    tables, waiting = [], 0
        if tables:
            _write(store, tables)
        # Items that had changed; or that were listed twice, where the task that lists was begun again.
        if store.known().has_replaced():
            store.drop_replaced()
    return Counts(embedded, unreadable)


def _rows(
    opened: Callable[[], Source],
    known: Known,
    store: Store,
    pictures: dict[str, Any],
    copy: dict[str, int],
    most: int,
) -> Iterator[pa.Table]:
    """What Ray Data makes of the source, in the order in which it is done."""
    here = ray.get_runtime_context().get_node_id()
    with _context():
        done = ray.data.read_datasource(
            ItemSource(opened, ray.put(known), most),
            override_num_blocks=1,
            # Listing waits most of the time. What it has listed stays on this machine, without which there is no run.
            num_cpus=0,
            label_selector={"ray.io/node-id": here},
        ).map_batches(
            EmbedItems,
            fn_constructor_args=(store.about, pictures),
            batch_size=1,
            # One copy is enough to go on, where machines are lost.
            compute=ActorPoolStrategy(min_size=1, initial_size=_copies(copy), max_size=_copies(copy)),
            **copy,
        )
    for row in done.iter_rows():
        yield pa.ipc.open_stream(row["table"]).read_all()


@contextlib.contextmanager
def _context() -> Iterator[None]:
    """How the data sets that are made here are run."""
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.target_max_block_size
    # Our bar counts pictures; and of one byte each row of Ray's is a block.
    context.enable_progress_bars, context.target_max_block_size = False, 1
    try:
        yield
    finally:
        context.enable_progress_bars, context.target_max_block_size = before


def _write(store: Store, tables: list[pa.Table]) -> None:
    table = pa.concat_tables(tables)
    read = pc.is_null(table["reason"])
    errors = table.filter(pc.invert(read)).select(ERRORS.names).cast(ERRORS)
    store.write_tables(table.filter(read).drop_columns(["reason"]), errors)


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _share_of_a_copy(workers: int | None) -> dict[str, int]:
    """What each copy of the model takes of a machine: a GPU and as many cores as each GPU has, or one core.

    Args:
        workers: cores, where a user says so.
    """
    with_gpu = [node for node in _nodes() if node.get("GPU")]
    if not with_gpu:
        return {"num_cpus": workers or 1}
    cores = min(int(node.get("CPU", 1) // node["GPU"]) for node in with_gpu)
    return {"num_gpus": 1, "num_cpus": workers or max(cores, 1)}


def _copies(copy: dict[str, int]) -> int:
    """How many copies the cluster has room for.

    Raises:
        ValueError: for none.
    """
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    room = sum(min(int(node.get(names[name], 0) // amount) for name, amount in copy.items()) for node in _nodes())
    if not room:
        raise ValueError(f"expected a machine of the Ray cluster to have {copy} for the model, none has; set --workers")
    return room


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """A connection to Ray, unless there is one."""
    if ray.is_initialized():
        yield
        return
    ray.init(log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """What was raised on a worker is raised here as it is, without Ray's wrapping."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while isinstance(cause, ray.exceptions.RayError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if missing := re.search(r"No module named '[\w.]+'", f"{error} {cause}"):
            raise ImportError(f"{missing[0]}: install what this machine has on every one of the Ray cluster") from error
        if isinstance(cause, ValueError | OSError | ImportError):
            raise cause from error
        raise OSError(f"Ray could not go on: {error}; run the same command again, it does what is missing") from error
