"""The command line of `python -m vit_embed.app`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile

EXIT_ERROR = 1


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="app", description="A page in the browser: search, classify, maps, depth.")
    parser.add_argument(
        "vectors",
        metavar="NAME.parquet",
        nargs="?",
        help="what `vit_embed.embed_images --output` wrote; for the search",
    )
    parser.add_argument("--model", help="folder or Hub id; default: the model that NAME.parquet was made with")
    parser.add_argument(
        "--source", help="the pictures, where they have been moved since; else they are found by themselves"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine alone; 0.0.0.0: all)"
    )
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    options = parser.parse_args(arguments)
    if options.vectors is None and options.model is None:
        parser.error("give NAME.parquet, or --model, or both")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Serves the page until Ctrl-C; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options = parse_arguments(arguments)
    # A folder of its own for uploads and results: Gradio serves all that lies there, other programs' too.
    with tempfile.TemporaryDirectory(prefix="vit_embed_page_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            from vit_embed.retrieval.page import build_page, launch
            from vit_embed.retrieval.views import load_views

            page = build_page(load_views(options.model, options.vectors, options.source))
            launch(page, options.host, options.port)
            print(f"the page is http://{options.host}:{options.port}/, Ctrl-C stops it", flush=True)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # the folder goes then, too
            page.block_thread()
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_ERROR
        except KeyboardInterrupt:
            pass
    return 0
