"""The command line of `python -m vit_embed.embed_images`."""

from __future__ import annotations

import argparse
import glob
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import vit_embed
from vit_embed.retrieval.embedder import DTYPES, PictureEmbedder, TextEmbedder, fingerprint, load_embedder
from vit_embed.retrieval.run import Share, embed_into
from vit_embed.retrieval.sources import LAYOUTS, find_source, text_source
from vit_embed.retrieval.store import VECTOR_DTYPES, Counts, Store, read_about

logger = logging.getLogger(__name__)

REPO = Path(vit_embed.__file__).resolve().parent
EXIT_ERROR, EXIT_UNREADABLE = 1, 3
# What the processes of one `accelerate launch` or torchrun have in common, and those of two do not.
RUN_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "WORLD_SIZE")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="embed_images",
        description="Pictures or texts -> embeddings in parquet files. Run again, it does what is missing.",
        epilog=f"SOURCE is {'; '.join(LAYOUTS)}.",
    )
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="the pictures, see below")
    parser.add_argument("--texts", metavar="FILE", help="embed the lines of a file in place of pictures")
    parser.add_argument("--output", required=True, metavar="NAME.parquet", help="folder of parquet shards to write")
    parser.add_argument(
        "--model",
        default=str(REPO),
        help="folder or Hub id, of this package or of CLIP; default: the icon checkpoint here",
    )
    where = parser.add_argument_group("source")
    where.add_argument("--split", default="train", help="split of a data set (default train)")
    where.add_argument("--column", help="column of the pictures, in a data set or parquet files")
    what = parser.add_argument_group("what is written")
    what.add_argument("--patches", action="store_true", help="the features of every patch, too")
    what.add_argument("--sha256", action="store_true", help="the hash of every file, too")
    what.add_argument(
        "--vector_dtype", choices=VECTOR_DTYPES, default="float16", help="of the vectors in the files (default float16)"
    )
    what.add_argument("--retry_errors", action="store_true", help="try again what could not be read before")
    what.add_argument(
        "--truncate", action="store_true", help="cut texts that are too long, in place of leaving them out"
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the model; auto takes what multiplies fastest here",
    )
    speed.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: all machines of a Ray cluster (vit_embed[ray])",
    )
    speed.add_argument("--device", help="default: a GPU, where there is one")
    speed.add_argument("--batch_size", type=_positive, default=64, help="pictures at a time (default 64)")
    speed.add_argument("--shard_size", type=_positive, default=4096, help="pictures a file (default 4096)")
    speed.add_argument("--workers", type=_positive, help="threads that read (default: cores)")
    speed.add_argument(
        "--full_size", action="store_true", help="decode large pictures whole, as the stock processor does; slower"
    )
    options = parser.parse_args(arguments)
    if (options.source is None) == (options.texts is None):
        parser.error("give either SOURCE or --texts FILE")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; the exit code: 0, EXIT_ERROR, or EXIT_UNREADABLE where pictures were left out."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_arguments(arguments)
    try:
        return run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"stopped; run the same command to go on with {options.output}", file=sys.stderr)
        return EXIT_ERROR


def run(options: argparse.Namespace) -> int:
    if options.texts is not None:
        source, extra = text_source(options.texts), {"texts": True, "truncate": options.truncate}
    else:
        source = find_source(options.source, split=options.split, column=options.column)
        extra = {"patches": options.patches, "hashed": options.sha256, "reduced": not options.full_size}
    if options.engine == "ray":
        from vit_embed.retrieval.ray_engine import run_by_ray

        return run_by_ray(options, source, extra)
    # `accelerate launch` and torchrun give each process its share.
    rank, of = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = options.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if _has_gpu() else None)
    dtype = dtype_there(options)
    if dtype == "auto" and of > 1 and not (device or "").startswith("cuda"):
        dtype = "float32"  # each process would measure for itself
    embedder = load_embedder(options.model, dtype, device, **extra)
    about = {**named(options), **facts(embedder)}
    run_id = " ".join(os.environ.get(name, "") for name in RUN_VARIABLES)
    store = Store(options.output, about, options.vector_dtype, rank if of > 1 else None, run_id)
    before, start = store.counts(), time.perf_counter()
    added = embed_into(
        store,
        source,
        embedder,
        batch_size=options.batch_size,
        shard_size=options.shard_size,
        workers=options.workers or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        retry_errors=options.retry_errors,
        share=Share(rank, of),
    )
    code = report(store, before, added, time.perf_counter() - start)
    return code if of == 1 else 0  # a launcher ends the other processes where one ends with another code


def report(store: Store, before: Counts, added: Counts, seconds: float) -> int:
    """Prints the last line; the exit code."""
    done = sum(added)
    kept = f"{before.embedded:,} were there; " if before.embedded else ""
    rate = f" at {done / seconds:.0f} a second" if done else ""
    failed = store.counts().unreadable  # of earlier runs, too: they are not tried again
    unreadable = f", {failed:,} could not be read, see {store.errors}" if failed else ""
    print(f"{kept}{added.embedded:,} embedded{rate} into {store.path}{unreadable}")
    return EXIT_UNREADABLE if failed else 0


def named(options: argparse.Namespace) -> dict[str, Any]:
    """Of what is written about a store: where model and pictures lie."""
    source = absolute(options.texts or options.source)
    return {"model": absolute(options.model), "source": source, "split": options.split, "column": options.column}


def facts(embedder: PictureEmbedder | TextEmbedder) -> dict[str, Any]:
    """Of what is written about a store: what its embeddings depend on."""
    dtype = str(embedder.model.dtype).removeprefix("torch.")
    return {"weights": fingerprint(embedder.model), "dtype": dtype, **embedder.about()}


def dtype_there(options: argparse.Namespace) -> str:
    """`--dtype`; for auto that of the store, where there is one: measured again, it could be another."""
    shard = next(iter(sorted(Path(options.output).glob("part-*.parquet"))), None)
    return read_about(shard).get("dtype", "auto") if options.dtype == "auto" and shard is not None else options.dtype


def absolute(source: str) -> str:
    """A path that is right from other folders, too."""
    is_here = "://" not in source and (os.path.exists(source) or glob.has_magic(source))
    return os.path.abspath(source) if is_here else source


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
