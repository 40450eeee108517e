"""Searches embeddings by words, by a picture, or by several of both.

python -m vit_embed.search photos.parquet --query "a red bicycle" --top 20 --sheet hits.png
python -m vit_embed.search photos.parquet --query_image bike.jpg --minus "a wheel"
python -m vit_embed.search photos.parquet --duplicates 0.97
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

from vit_embed.retrieval.search_command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
