"""Pictures -> embeddings in parquet files that every data tool opens.

    python -m vit_embed.embed_images photos/ --model clip-b32 --output photos.parquet

Run it again after it was stopped, or after files were added or changed: only what is missing is embedded. The last line
says how many pictures could not be read, photos.errors.parquet which and why; then the exit code is 3.
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

from vit_embed.retrieval.embed_command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
