"""A page in the browser: search by words or a picture, classify, see where a model looks, depth.

    python -m vit_embed.app photos.parquet
    python -m vit_embed.app --model clip-b32          # no search

It listens on this machine alone unless --host says more; docs/page.md makes a Space of it.
"""

import importlib.util
import sys
from pathlib import Path

if not __package__:
    # Run as a script from a clone, whose folder may have any name: this folder becomes the package that the imports
    # below ask for, before another installed copy can.
    _spec = importlib.util.spec_from_file_location("vit_embed", Path(__file__).resolve().with_name("__init__.py"))
    sys.modules["vit_embed"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["vit_embed"])

from vit_embed.retrieval.page_command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
