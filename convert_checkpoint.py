"""Weights in another layout -> a folder that every Auto class loads, and back.

    python -m vit_embed.convert_checkpoint ViT-B-32.pt --output_dir clip-b32
    python -m vit_embed.convert_checkpoint clip-b32 --reverse --layout openai --output_file ViT-B-32.pt

The same from Python:

    from vit_embed.convert_checkpoint import ConversionOptions, convert_checkpoint, restore_checkpoint

    convert_checkpoint("ViT-B-32.pt", "clip-b32", ConversionOptions(hidden_act="gelu"))
    restore_checkpoint("clip-b32", "openai", output_file="ViT-B-32.pt")

This is the door; the converter is the package `conversion/` beside it. A checkpoint is untrusted data: no code that it
holds is ever run, and nothing is written unless all of it can be.
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

from vit_embed.conversion.command_line import main  # noqa: E402
from vit_embed.conversion.convert import MAX_SHARD_SIZE, convert_checkpoint, restore_checkpoint  # noqa: E402
from vit_embed.conversion.layouts import LAYOUTS  # noqa: E402
from vit_embed.conversion.layouts.layout import ConversionOptions, Restored  # noqa: E402

__all__ = [
    "LAYOUTS",
    "MAX_SHARD_SIZE",
    "ConversionOptions",
    "Restored",
    "convert_checkpoint",
    "main",
    "restore_checkpoint",
]

if __name__ == "__main__":
    sys.exit(main())
