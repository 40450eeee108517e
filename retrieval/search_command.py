"""The command line of `python -m vit_embed.search`."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
from pathlib import Path

import torch

from vit_embed.retrieval.embedder import (
    Failure,
    PictureEmbedder,
    TextEmbedder,
    fingerprint,
    load_image_processor,
    load_model,
    load_tokenizer,
)
from vit_embed.retrieval.search import (
    EXACT_LIMIT,
    Answer,
    Vectors,
    build_index,
    combine,
    duplicates,
    index_of,
    load_vectors,
    open_pictures,
    search,
)
from vit_embed.retrieval.sheet import draw_sheet
from vit_embed.retrieval.sources import Item

logger = logging.getLogger(__name__)

EXIT_ERROR, EXIT_NOTHING = 1, 4


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="search", description="Searches what embed_images wrote.")
    parser.add_argument("vectors", metavar="NAME.parquet", help="what `vit_embed.embed_images --output` wrote")
    parser.add_argument(
        "--model", help="where the model lies now; default: where it lay when the pictures were embedded"
    )
    parser.add_argument("--source", help="for --sheet: where the pictures lie now; default: where they were embedded")
    query = parser.add_argument_group("the query: all of these are added up")
    query.add_argument("--query", nargs="+", default=[], metavar="TEXT", help="words")
    query.add_argument("--query_image", nargs="+", default=[], metavar="FILE", help="pictures")
    query.add_argument("--minus", nargs="+", default=[], metavar="TEXT", help="words to be subtracted")
    query.add_argument("--minus_image", nargs="+", default=[], metavar="FILE", help="pictures to be subtracted")
    other = parser.add_argument_group("in place of a query")
    other.add_argument(
        "--duplicates",
        type=float,
        metavar="COSINE",
        help="groups of pictures at least this near to each other, say 0.97",
    )
    other.add_argument(
        "--build_index", action="store_true", help=f"an index for more than {EXACT_LIMIT:,} pictures; needs faiss"
    )
    answer = parser.add_argument_group("the answer")
    answer.add_argument("--top", type=int, default=10, help="how many (default 10)")
    answer.add_argument("--least", type=float, default=-1.0, metavar="COSINE", help="leave out what is further away")
    answer.add_argument("--filter", metavar="PATTERN", help="of the paths, such as 'cats/*'")
    answer.add_argument("--format", choices=("text", "json", "csv"), default="text")
    answer.add_argument("--sheet", type=Path, metavar="FILE.png", help="a picture of the answers")
    options = parser.parse_args(arguments)
    has_query = bool(options.query or options.query_image or options.minus or options.minus_image)
    if has_query + (options.duplicates is not None) + options.build_index != 1:
        parser.error("give a query (--query, --query_image, ...), or --duplicates, or --build_index")
    if options.sheet and options.sheet.suffix.lower() != ".png":
        parser.error(f"--sheet must end in .png, got {options.sheet}")
    if options.top < 1:
        parser.error(f"--top must be at least 1, got {options.top}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; the exit code: 0, EXIT_ERROR, or EXIT_NOTHING where nothing is near."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_arguments(arguments)
    try:
        vectors = load_vectors(options.vectors)
        if options.build_index:
            print(f"the index is {build_index(vectors)}")
            return 0
        if options.source:
            vectors.about["source"] = options.source
        if options.sheet and vectors.about["input"] == "texts":
            raise ValueError(f"{vectors.path} holds texts, which have no sheet; leave --sheet out")
        if options.filter:
            vectors = vectors.select(options.filter)
        if options.duplicates is not None:
            groups = duplicates(vectors, options.duplicates)
            write_groups(groups, options.format)
            return 0 if groups else EXIT_NOTHING
        return answer(vectors, options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_ERROR


def answer(vectors: Vectors, options: argparse.Namespace) -> int:
    if len(vectors.paths) > EXACT_LIMIT and index_of(vectors) is None:
        logger.info("%d vectors are read one by one; --build_index makes an index", len(vectors.paths))
    model = load_model(options.model or vectors.about["model"], vectors.about["dtype"])
    if fingerprint(model) != vectors.about["weights"]:
        raise ValueError(
            f"{vectors.path} was embedded by other weights than {model.name_or_path} has; --model names the right ones"
        )
    is_reduced = vectors.about.get("reduced", True)
    query = combine(
        [*embed_texts(model, options.query), *embed_pictures(model, is_reduced, options.query_image)],
        [*embed_texts(model, options.minus), *embed_pictures(model, is_reduced, options.minus_image)],
    )
    found = search(vectors, query, options.top)
    found = found._replace(hits=[hit for hit in found.hits if hit.cosine >= options.least])
    write_hits(found, options.format)
    if not found.hits:
        print(f"nothing is at {options.least} or nearer", file=sys.stderr)
        return EXIT_NOTHING
    if not found.stands_out:
        print("nothing stands out: the best is no nearer than chance would have it", file=sys.stderr)
    if options.sheet:
        draw_hits(vectors, found, options)
    return 0


def embed_texts(model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
    if not texts:
        return torch.zeros(0, 1)
    if not hasattr(model, "get_text_features"):
        raise ValueError(f"words need a model with a text tower, {model.name_or_path} is a {type(model).__name__}")
    embedder = TextEmbedder(model, load_tokenizer(model.name_or_path))
    rows = embedder([Item(text, "", text) for text in texts])
    return _whole(rows.embeddings, rows.failures)


def embed_pictures(model: torch.nn.Module, is_reduced: bool, files: list[str]) -> torch.Tensor:
    if not files:
        return torch.zeros(0, 1)
    embedder = PictureEmbedder(model, load_image_processor(model.name_or_path), reduced=is_reduced)
    rows = embedder([Item(file, "", file) for file in files])
    return _whole(rows.embeddings, rows.failures)


def _whole(embeddings, failures: list[Failure]) -> torch.Tensor:
    """The vectors of a query, each of which counts.

    Raises:
        ValueError: one of them could not be read.
    """
    if failures:
        raise ValueError(f"{failures[0].item.key!r} cannot be searched for: {failures[0].reason}")
    return torch.from_numpy(embeddings)


def write_hits(found: Answer, form: str) -> None:
    if form == "json":
        print(json.dumps([hit._asdict() for hit in found.hits], indent=1))
    elif form == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow(("path", "cosine"))
        writer.writerows((hit.path, f"{hit.cosine:.4f}") for hit in found.hits)
    else:
        for hit in found.hits:
            print(f"{hit.cosine:.2f}  {hit.path}")


def write_groups(groups: list[list[str]], form: str) -> None:
    if form == "json":
        print(json.dumps(groups, indent=1))
    elif form == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow(("group", "path"))
        writer.writerows((number, path) for number, group in enumerate(groups) for path in group)
    else:
        print("\n\n".join("\n".join(group) for group in groups) or "no two are that near")


def draw_hits(vectors: Vectors, found: Answer, options: argparse.Namespace) -> None:
    items = open_pictures(vectors, [hit.path for hit in found.hits])
    captions = [(items.get(hit.path), f"{hit.cosine:.2f} {hit.path}") for hit in found.hits]
    minus = [f"without {text}" for text in (*options.minus, *options.minus_image)]
    title = ", ".join([*options.query, *options.query_image, *minus])
    draw_sheet(captions, title, options.sheet)
    print(f"the sheet is {options.sheet}", file=sys.stderr)
