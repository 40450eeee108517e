"""What the page shows: a model and a store -> the answers of its tabs. No gradio here.

Every function takes what a visitor typed or uploaded, and raises ValueError with words for the visitor where there is
no answer.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vit_embed import VitEmbedForDepthEstimation
from vit_embed.options_vit_embed import GRIDLESS_STEMS
from vit_embed.retrieval.colours import in_colour, overlay, with_scale
from vit_embed.retrieval.embedder import (
    Failure,
    PictureEmbedder,
    TextEmbedder,
    fingerprint,
    load_image_processor,
    load_model,
    load_tokenizer,
)
from vit_embed.retrieval.pictures import UNREADABLE, read_reduced
from vit_embed.retrieval.search import Vectors, combine, load_vectors, open_pictures, search
from vit_embed.retrieval.sources import Item, open_content

logger = logging.getLogger(__name__)

# Longest side of what is shown of a picture of the store, and shortest of one under a map.
TILE, SHOWN = 480, 480
# How much finer than the model's own grid a map may be: the picture is enlarged so many times.
DETAILS = (1, 2, 3, 4, 8)
# Attention weights of every layer are held at once.
MAX_ATTENTION_BYTES = 2**30
# What is wrong with a picture, in words, by the error that reading it gave.
IN_WORDS = {
    "DecompressionBombError": "it has more pixels than can be read here",
    "UnidentifiedImageError": "it is no picture, or of a kind that is not known here",
    "MemoryError": "it needs more memory than there is",
}
MAX_LISTED = 40  # texts of one question
# Longer side of an upload by the shorter one. Processors enlarge the shorter side before they crop: a line of
# 1 x 20,000 pixels would take gigabytes.
MAX_ASPECT = 32

Tile = tuple[Image.Image, str]


class Found(NamedTuple):
    """tiles: pictures and captions, nearest first. note: what is to be said of them. stands_out: as of Answer."""

    tiles: list[Tile]
    note: str
    stands_out: bool


class Views:
    """The answers of one model, over one store or none.

    Args:
        model: as of `load_model`. processor: its image processor. tokenizer: needed where it takes texts.
        vectors: of a store that this model made.

    Raises:
        ValueError: the store is of another model or of texts, or there is nothing that the model can show.
    """

    def __init__(self, model: torch.nn.Module, processor: Any, tokenizer: Any = None, vectors: Vectors | None = None):
        if vectors is not None:
            _check_store(model, vectors)
        self.model, self.processor, self.vectors = model, processor, vectors
        self.pictures = PictureEmbedder(model, processor)
        self.texts = TextEmbedder(model, tokenizer) if tokenizer is not None else None
        self.has_search = vectors is not None
        self.has_classes = self.texts is not None and hasattr(model, "logit_scale")
        has_grid = model.config.stem_type not in GRIDLESS_STEMS
        self.has_attention = has_grid and model.config.use_cls_token
        self.has_similarity = has_grid and self.has_classes
        self.has_depth = isinstance(model, VitEmbedForDepthEstimation)
        if not (self.has_search or self.has_classes or self.has_attention or self.has_depth):
            raise ValueError(f"{type(model).__name__} alone has nothing to show; give a store to search in")

    @property
    def num_layers(self) -> int:
        return self.model.config.num_hidden_layers

    def details(self) -> list[int]:
        """Those of DETAILS whose attention fits MAX_ATTENTION_BYTES."""
        config = self.model.config
        fits = []
        for detail in DETAILS:
            tokens = math.prod(detail * side for side in config.grid_size)
            size = self.num_layers * config.num_attention_heads * tokens**2 * 4
            if detail == 1 or size <= MAX_ATTENTION_BYTES:
                fits.append(detail)
        return fits

    # ------------------------------------------------------------------------------------------------------- search

    def find(
        self, words: str = "", picture: str | None = None, minus: str = "", pattern: str = "", count: int = 12
    ) -> Found:
        """The pictures of the store nearest to words plus a picture (a file) minus words.

        pattern: of the paths, as of `fnmatch`; empty takes all.
        """
        added = [self.text_vectors([text])[0] for text in (words.strip(),) if text]
        if picture:
            added.append(self.picture_vector(picture))
        subtracted = [self.text_vectors([text])[0] for text in (minus.strip(),) if text]
        if not added and not subtracted:
            raise ValueError("Type some words or add a picture: there is nothing to search for yet.")
        vectors = self._selected(pattern.strip())
        answer = search(vectors, combine(added, subtracted), min(int(count), len(vectors.paths)))
        tiles, missing = self._tiles([(hit.path, f"{hit.cosine:.2f}  {hit.path}") for hit in answer.hits])
        note = f"{len(tiles)} of {len(vectors.paths):,} pictures, nearest first; the number is the cosine."
        if missing:
            note += f" {missing} of them cannot be read any more."
        if not answer.stands_out:
            note = "Nothing stands out: the best is no nearer than chance would have it. " + note
        return Found(tiles, note, answer.stands_out)

    def _selected(self, pattern: str) -> Vectors:
        if not pattern:
            return self.vectors
        try:
            return self.vectors.select(pattern)
        except ValueError:
            first = self.vectors.paths[0]
            raise ValueError(f"No path fits “{pattern}”, so there is no result. A path looks like “{first}”.") from None

    def _tiles(self, captions: list[tuple[str, str]]) -> tuple[list[Tile], int]:
        """Paths and captions -> tiles, and how many of them stand for a picture that cannot be read."""
        try:
            items = open_pictures(self.vectors, [path for path, _ in captions if _is_below(path, self.vectors)])
        except (ValueError, OSError) as error:
            logger.warning("the pictures of %s are not there: %s", self.vectors.path, error)
            items = {}
        pictures = [_tile(items.get(path)) for path, _ in captions]
        blank = Image.new("RGB", (TILE, TILE), "#d4d4d8")
        return [(picture or blank, caption) for picture, (_, caption) in zip(pictures, captions)], pictures.count(None)

    def picture_vector(self, picture: str) -> torch.Tensor:
        """An uploaded file -> (D,) of unit length."""
        self._read(picture)  # says what is wrong with it
        rows = self.pictures([Item("picture", "", picture)])
        if rows.failures:
            raise ValueError(_refusal(picture, rows.failures[0].reason))
        return torch.from_numpy(rows.embeddings[0])

    def text_vectors(self, texts: list[str]) -> torch.Tensor:
        """(texts, D) float32 of unit length."""
        if self.texts is None:
            raise ValueError("This model takes no words; add a picture.")
        for text in texts:
            read = self.texts.read(Item(text, "", text))
            if isinstance(read, Failure):
                reason = read.reason.partition(";")[0]
                raise ValueError(f"“{_shortened(text)}” is too long: {reason}. Use fewer words.")
        return self.texts.vectors(texts).cpu()

    # ------------------------------------------------------------------------------------------------------ classes

    def classify(self, picture: str | None, names: str, template: str = "{}") -> dict[str, float]:
        """Class names, one a line -> the probability of each; each on its own where the model's loss is the sigmoid."""
        classes = _lines(names)
        is_sigmoid = self.model.config.contrastive_loss == "sigmoid"
        if len(classes) < (1 if is_sigmoid else 2):
            raise ValueError(
                "Type a class name."
                if is_sigmoid
                else "Type at least two class names, one a line: one alone is certain."
            )
        template = template.strip() or "{}"
        if "{}" not in template:
            raise ValueError(
                f"The sentence must have {{}} where the class name goes, such as “a photo of a {{}}”; "
                f"it is “{_shortened(template)}”."
            )
        embeds = self.picture_vector(_given(picture))
        cosines = self.text_vectors([template.replace("{}", name) for name in classes]) @ embeds
        logits = cosines * self.model.logit_scale.float().exp().cpu()
        if is_sigmoid:
            return dict(zip(classes, (logits + self.model.logit_bias.float().cpu()).sigmoid().tolist()))
        return dict(zip(classes, logits.softmax(0).tolist()))

    # --------------------------------------------------------------------------------------------------------- maps

    @torch.inference_mode()
    def attention(self, picture: str | None, layer: int | None = None, detail: int = 1) -> list[Tile]:
        """How much the class token looks at each patch in a layer (from 1; None is the last): the mean of the heads,
        then each head."""
        image = self._read(_given(picture), detail)
        layer = self.num_layers if layer is None else int(layer)
        weights = self.model.trunk.get_class_attentions(self._pixels(image, detail))[0, layer - 1].float().cpu().numpy()
        base = self._seen(image)
        maps = [("mean of the heads", weights.mean(0))]
        maps += [(f"head {number}", head) for number, head in enumerate(weights, 1)]
        tiles = []
        for name, values in maps:
            high = float(values.max())
            drawn = with_scale(overlay(base, values, 0.0, high), 0.0, high, "inferno", "{:.1%}".format)
            tiles.append((drawn, f"layer {layer}, {name}"))
        return tiles

    @torch.inference_mode()
    def similarity(self, picture: str | None, texts: str, detail: int = 1) -> list[Tile]:
        """The cosine of each text, one a line, to each patch; one scale for all."""
        lines = _lines(texts)
        if not lines:
            raise ValueError("Type what to look for, one thing a line.")
        vectors = self.text_vectors(lines)
        image = self._read(_given(picture), detail)
        patches = self.model.get_patch_features(self._pixels(image, detail))[0].float().cpu()  # (gh, gw, D)
        maps = (patches @ vectors.T).permute(2, 0, 1).numpy()
        low, high = float(maps.min()), float(maps.max())
        base = self._seen(image)
        return [
            (
                with_scale(overlay(base, values, low, high, "viridis"), low, high, "viridis"),
                f"{text}, up to {values.max():.2f}",
            )
            for text, values in zip(lines, maps)
        ]

    # -------------------------------------------------------------------------------------------------------- depth

    @torch.inference_mode()
    def depth(self, picture: str | None) -> tuple[Image.Image, Image.Image, str]:
        """The picture as the model sees it, its depth in colour with a scale, and a line about the numbers."""
        image = self._read(_given(picture))
        depth = self.model(self._pixels(image)).predicted_depth[0].float().cpu().numpy()
        low, middle, high = (float(np.percentile(depth, share)) for share in (0, 50, 100))
        unit = " m" if self.model.config.max_depth is not None else ""
        base = self._seen(image)
        drawn = with_scale(
            in_colour(depth, low, high, base.size), low, high, "viridis", lambda value: f"{value:.2f}{unit}"
        )
        note = f"From {low:.2f}{unit} to {high:.2f}{unit}, the median {middle:.2f}{unit}."
        if not unit:
            note += " The numbers have no unit: they say what is nearer, not how near."
        return base, drawn, note

    # ----------------------------------------------------------------------------------------------------- pictures

    def _read(self, picture: str, detail: int = 1) -> Image.Image:
        """An uploaded file in RGB, no larger than is of use."""
        try:
            with open_content(picture) as file:
                image, size = read_reduced(file, max(2 * SHOWN, self.pictures.side * int(detail)))
        except (*UNREADABLE, MemoryError) as error:
            raise ValueError(_refusal(picture, f"{type(error).__name__}: {error}")) from None
        if max(size) > MAX_ASPECT * min(size):
            raise ValueError("This picture cannot be read: it is too long and thin. Try another one.")
        return image

    def _pixels(self, image: Image.Image, detail: int = 1) -> torch.Tensor:
        """(1, 3, H, W) as the model takes it, each side `detail` times its own."""
        pixels = self.processor(image, return_tensors="pt", **self._sizes(int(detail))).pixel_values
        return pixels.to(self.model.device, self.model.dtype)

    def _seen(self, image: Image.Image) -> Image.Image:
        """What the processor leaves of a picture, enlarged to SHOWN: maps lie over that."""
        factor = math.ceil(SHOWN / min(self.model.config.image_shape))
        pixels = self.processor(image, return_tensors="np", do_rescale=False, do_normalize=False, **self._sizes(factor))
        return Image.fromarray(np.asarray(pixels.pixel_values[0]).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))

    def _sizes(self, factor: int) -> dict[str, dict[str, int]]:
        """The processor's sizes times `factor`."""
        sizes = {name: getattr(self.processor, name, None) for name in ("size", "crop_size")}
        return {
            name: {side: factor * number for side, number in dict(size).items() if number}
            for name, size in sizes.items()
            if size
        }


def load_views(model: str | None, store: str | os.PathLike | None, source: str | None = None) -> Views:
    """The views of a folder or Hub id, or of the model that a store was made with.

    source: where the store's pictures lie now; None is where they lay when they were embedded.

    Raises:
        ValueError: as of load_vectors, load_model and Views.
    """
    vectors = load_vectors(store) if store is not None else None
    if vectors is not None and source is not None:
        vectors = vectors._replace(about={**vectors.about, "source": source})
    name = model or (vectors.about["model"] if vectors is not None else None)
    if name is None:
        raise ValueError("expected a store (photos.parquet), or --model, or both; got neither")
    loaded = load_model(name, vectors.about["dtype"] if vectors is not None else "auto")
    if not hasattr(loaded, "trunk"):
        raise ValueError(f"expected a model that takes pictures, {name} is a {type(loaded).__name__}")
    tokenizer = load_tokenizer(name) if hasattr(loaded, "get_text_features") else None
    return Views(loaded, load_image_processor(name), tokenizer, vectors)


def _check_store(model: torch.nn.Module, vectors: Vectors) -> None:
    if vectors.about["input"] != "pictures":
        raise ValueError(f"expected a store of pictures, {vectors.path} is of {vectors.about['input']}")
    if fingerprint(model) != vectors.about["weights"]:
        raise ValueError(
            f"{vectors.path} was made with other weights than this model's ({vectors.about['model']}); name that model "
            "with --model, or embed the pictures anew"
        )


def _is_below(path: str, vectors: Vectors) -> bool:
    """Whether a path of a store of a folder stays in that folder; a store may come from anywhere."""
    parts = PurePosixPath(path)
    return not Path(vectors.about["source"]).is_dir() or not (parts.is_absolute() or ".." in parts.parts)


def _tile(item: Item | None) -> Image.Image | None:
    """A small copy of a picture of the store, or None where it cannot be read."""
    if item is None:
        return None
    try:
        with open_content(item.content) as file:
            picture = read_reduced(file, TILE)[0]
    except (*UNREADABLE, MemoryError):
        return None
    picture.thumbnail((TILE, TILE))
    return picture


def _given(picture: str | None) -> str:
    if not picture:
        raise ValueError("Add a picture first.")
    return picture


def _lines(text: str) -> list[str]:
    """The texts of a box, one a line, each once."""
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(lines) > MAX_LISTED:
        raise ValueError(f"At most {MAX_LISTED} lines, please; there are {len(lines)}.")
    return lines


def _refusal(picture: str, reason: str) -> str:
    """Why an upload cannot be taken, without the server's paths."""
    if os.path.exists(picture) and os.path.getsize(picture) == 0:
        why = "the file is empty"
    else:
        why = IN_WORDS.get(reason.partition(":")[0], "it is damaged, or cut short")
    return f"This picture cannot be read: {why}. Try another one."


def _shortened(text: str, letters: int = 60) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
