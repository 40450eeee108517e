"""A batch of items -> a batch of rows: reading, the processor, the model. What every engine maps over its batches."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, UnidentifiedImageError
from transformers import AutoImageProcessor, AutoTokenizer

import vit_embed
from vit_embed.retrieval.pictures import read_reduced
from vit_embed.retrieval.sources import Item, open_content

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL = "model"
# bfloat16 has to be this much faster than float32 to be worth its rounding.
WORTH = 1.2


class Failure(NamedTuple):
    """An item that could not be read, and why."""

    item: Item
    reason: str


class Read(NamedTuple):
    """An item as the model takes it.

    pixels: (3, H, W) uint8 as the processor cropped them, or float32 where it does not rescale and normalise; None once
        they are embedded.
    width, height: of the picture, upright, before anything is done to it. sha256: of its file, where asked for.
    """

    item: Item
    pixels: np.ndarray | None
    width: int
    height: int
    sha256: str | None = None


class Rows(NamedTuple):
    """Embedded items of a batch, in their order, and those that could not be.

    embeddings: (rows, D) of unit length, float32. patches: (rows, gh, gw, D), where asked for.
    """

    read: list[Any]
    failures: list[Failure]
    embeddings: np.ndarray
    patches: np.ndarray | None = None


class Clock:
    """Seconds of each part of the work, summed over threads, which may run side by side."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def times(self, part: str) -> Iterator[None]:
        start = time.thread_time() if part != MODEL else time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += (time.thread_time() if part != MODEL else time.perf_counter()) - start

    def shares(self) -> str:
        total = sum(self.seconds.values())
        return ", ".join(f"{seconds / total:.0%} {part}" for part, seconds in self.seconds.items()) if total else ""


def load_model(name: str, dtype: str = "auto", device: str | None = None) -> torch.nn.Module:
    """A model of ours or a stock CLIP, in eval mode, in the dtype that this machine multiplies fastest.

    Args:
        name: folder or Hub id. dtype: one of DTYPES, or "auto". device: None takes CUDA where it is.

    Raises:
        ValueError: the checkpoint is none that has a vector, or is not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected --model to be a folder or Hub id of a model of this package or of CLIP, got {name} ({error}); "
            "other checkpoints become one by `python -m vit_embed.convert_checkpoint`"
        ) from error
    kinds = {"clip": "VitEmbedForContrastive", "clip_vision_model": "VitEmbedModelWithProjection"}
    if config.model_type in ("vit_embed", "vit_embed_text"):
        class_name = (config.architectures or ["VitEmbedForContrastive"])[0]
    elif config.model_type in kinds:
        class_name = kinds[config.model_type]
    else:
        raise ValueError(
            f"expected a model of this package or of CLIP, {name} is of type {config.model_type}; "
            "`python -m vit_embed.convert_checkpoint` converts SigLIP, ViT, DINOv2, timm and open_clip"
        )
    model = getattr(vit_embed, class_name).from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {error}") from error
    return model.to(fastest_dtype(model) if dtype == "auto" else DTYPES[dtype])


@torch.inference_mode()
def fastest_dtype(model: torch.nn.Module) -> torch.dtype:
    """bfloat16 where the model, which is float32, is WORTH times as fast in it: measured, and logged."""
    if model.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if not hasattr(model, "trunk"):  # texts are short
        return model.dtype
    copy = deepcopy(model).bfloat16()
    inputs = torch.zeros(4, model.config.num_channels, *model.config.image_shape)
    calls = [partial(each.trunk, inputs.to(each.dtype), pooled_only=True) for each in (model, copy)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(5):  # side by side, so that other work on the machine slows both
        for call, times in zip(calls, seconds):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    whole, half = (sorted(times)[2] for times in seconds)
    chosen = torch.bfloat16 if whole >= WORTH * half else torch.float32
    logger.info("--dtype auto: %s; bfloat16 is %.1f times as fast as float32 here", chosen, whole / half)
    return chosen


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of the weights, which tells two models of the same name apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class PictureEmbedder:
    """`embedder(items) -> Rows`: reads, resizes, embeds. Its halves `read` and `embed` can run side by side.

    Args:
        model: see load_model. processor: its image processor, from its folder.
        patches: whether the features of every patch come along. hashed: whether the files' SHA-256 do.
        reduced: whether large pictures are decoded at a fraction of their size, never below twice the processor's.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        *,
        patches: bool = False,
        hashed: bool = False,
        reduced: bool = True,
    ):
        self.model, self.processor = model, processor
        self.patches, self.hashed, self.reduced = patches, hashed, reduced
        self.device, self.dtype = model.device, model.dtype
        self.clock = Clock()
        joint = hasattr(model, "get_image_features")
        self.width = model.config.projection_dim if joint else model.config.hidden_size
        self.side = _least_side(processor)
        self.is_plain = processor.do_rescale and processor.do_normalize
        if self.is_plain:
            mean, std = (torch.tensor(each, device=self.device) for each in (processor.image_mean, processor.image_std))
            # (pixel * factor - mean) / std, with one product and one sum.
            self.scale = (processor.rescale_factor / std).view(3, 1, 1)
            self.shift = (-mean / std).view(3, 1, 1)

    def __call__(self, items: Sequence[Item]) -> Rows:
        return self.embed([self.read(item) for item in items])

    def read(self, item: Item) -> Read | Failure:
        """An item as the model takes it; whatever is wrong with it comes back as the reason."""
        try:
            item.key.encode()
        except UnicodeEncodeError:
            return Failure(item, "the name is not UTF-8; rename the file")
        try:
            with self.clock.times("decode"):
                picture, size, sha256 = self._decoded(item.content)
            with self.clock.times("process"):
                return Read(item, self._processed(picture, size), *size, sha256)
        except Exception as error:  # damaged metadata and remote stores raise errors of many kinds
            return Failure(item, _reason(error))

    def _decoded(self, content: Any) -> tuple[Image.Image, tuple[int, int], str | None]:
        """A picture in RGB, its (width, height) before it was reduced, and the hash of its file."""
        side = self.side if self.reduced else None
        if isinstance(content, Image.Image):
            return *read_reduced(content, side), None
        with open_content(content) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest() if self.hashed else None
            file.seek(0)
            return *read_reduced(file, side), sha256

    def _processed(self, picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """What the processor makes of a picture that was `size`, (width, height), in its file.

        Its shortest edge fixes the other one, rounded down: of a reduced picture that can be a pixel more or less,
        which moves the crop. So the size that the whole picture would get is asked for.
        """
        options = {"return_tensors": "np"}
        if self.is_plain:
            options.update(do_rescale=False, do_normalize=False)
        edge = dict(self.processor.size).get("shortest_edge")
        if edge and edge * edge * max(size) > Image.MAX_IMAGE_PIXELS * min(size):
            raise ValueError(f"{size[0]} x {size[1]} pixels would become gigabytes with the shorter side made {edge}")
        if edge and picture.size != size:
            width, height = (edge * side // min(size) for side in size)
            options["size"] = {"height": height, "width": width}
        pixels = self.processor(picture, **options).pixel_values[0]
        return np.asarray(pixels, dtype=np.uint8 if self.is_plain else None)

    @torch.inference_mode()
    def embed(self, read: Sequence[Read | Failure]) -> Rows:
        """The rows of what was read; pictures of one shape go through the model together."""
        good = [each for each in read if isinstance(each, Read)]
        failures = [each for each in read if isinstance(each, Failure)]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for place, each in enumerate(good):
            by_shape.setdefault(each.pixels.shape, []).append(place)
        embeddings: list[Any] = [None] * len(good)
        patches: list[Any] = [None] * len(good)
        for places in by_shape.values():
            pixels = torch.from_numpy(np.stack([good[place].pixels for place in places]))
            with self.clock.times(MODEL):
                pixels = self._normalised(pixels)
                vectors = self._vectors(pixels).float().cpu().numpy()
                grids = self.model.get_patch_features(pixels).float().cpu().numpy() if self.patches else vectors
            for place, vector, grid in zip(places, vectors, grids):
                embeddings[place], patches[place] = vector, grid
        stacked = np.stack(embeddings) if good else np.zeros((0, self.width), np.float32)
        # A shard of rows waits to be written, or travels: its pixels and files would be gigabytes.
        good = [each._replace(pixels=None, item=each.item._replace(content=b"")) for each in good]
        return Rows(good, failures, stacked, patches if self.patches else None)

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8 -> the model's dtype, as the processor normalises."""
        pixels = pixels.to(self.device)
        if pixels.dtype == torch.uint8:
            pixels = torch.addcmul(self.shift, pixels.float(), self.scale)
        return pixels.to(self.dtype)

    def _vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, D) of unit length: in the joint space where the model has one, else the pooled features."""
        if hasattr(self.model, "get_image_features"):
            vectors = self.model.get_image_features(pixels)
        else:
            vectors = self.model.trunk(pixels, pooled_only=True).pooler_output
        return F.normalize(vectors.float(), dim=-1)

    def about(self) -> dict[str, Any]:
        """What a file of these embeddings says of them; two runs into one file must agree in it."""
        processing = json.loads(self.processor.to_json_string())
        return {
            "input": "pictures",
            "patches": self.patches,
            "hashed": self.hashed,
            "reduced": self.reduced,
            "processing": processing,
        }


def _reason(error: BaseException) -> str:
    """Why a picture cannot be read, in one line, without the names of our own files."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture, or of a kind that Pillow does not know"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _least_side(processor: Any) -> int:
    """Twice the longer side that the processor resizes to: what is decoded need not be larger."""
    size = dict(processor.size)
    return 2 * max(size.get("shortest_edge") or 0, size.get("height") or 0, size.get("width") or 0)


class TextEmbedder:
    """`embedder(items) -> Rows` for texts. A text beyond the model's context is a failure, unless `truncate`."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, *, truncate: bool = False):
        self.model, self.tokenizer = model, tokenizer
        self.clock = Clock()
        config = getattr(model.config, "text_config", None) or model.config
        self.limit = config.max_position_embeddings
        self.truncate = {"truncation": True, "max_length": self.limit} if truncate else {}

    def __call__(self, items: Sequence[Item]) -> Rows:
        return self.embed([self.read(item) for item in items])

    def read(self, item: Item) -> Any:
        try:
            item.content.encode()
        except UnicodeEncodeError:
            return Failure(item, "the text is not UTF-8; write the file in it")
        length = len(self.tokenizer(item.content, **self.truncate).input_ids)
        if length > self.limit:
            return Failure(item, f"{length} tokens, the model takes {self.limit}; --truncate cuts")
        return item

    @torch.inference_mode()
    def embed(self, read: Sequence[Any]) -> Rows:
        good = [each for each in read if isinstance(each, Item)]
        failures = [each for each in read if isinstance(each, Failure)]
        if not good:
            return Rows([], failures, np.zeros((0, self.model.config.projection_dim), np.float32))
        with self.clock.times(MODEL):
            vectors = self.vectors([item.content for item in good]).cpu().numpy()
        return Rows(good, failures, vectors)

    @torch.inference_mode()
    def vectors(self, texts: list[str]) -> torch.Tensor:
        """Texts -> (texts, D) float32 of unit length, on the model's device."""
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt", **self.truncate).to(self.model.device)
        mask = inputs.get("attention_mask")
        return F.normalize(self.model.get_text_features(inputs.input_ids, attention_mask=mask).float(), dim=-1)

    def about(self) -> dict[str, Any]:
        return {"input": "texts", "truncate": bool(self.truncate)}


def load_embedder(
    name: str, dtype: str = "auto", device: str | None = None, *, texts: bool = False, **options: Any
) -> PictureEmbedder | TextEmbedder:
    """The embedder of a checkpoint; `options` are those of its class."""
    model = load_model(name, dtype, device)
    tower, kind = ("get_text_features", "text") if texts else ("trunk", "picture")
    if not hasattr(model, tower):
        raise ValueError(f"expected a model with a {kind} tower, {name} is a {type(model).__name__}")
    if texts:
        return TextEmbedder(model, load_tokenizer(name), **options)
    if options.get("patches") and not hasattr(model, "get_patch_features"):
        raise ValueError(f"--patches needs a model with a joint space, {name} is a {type(model).__name__}")
    return PictureEmbedder(model, load_image_processor(name), **options)


def load_image_processor(name: str) -> Any:
    """The image processor of a folder or Hub id.

    Raises:
        ValueError: it has none.
    """
    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected {name} to have a preprocessor_config.json, which says how pictures are resized: {error}"
        ) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or Hub id.

    Raises:
        ValueError: it has none; transformers makes one without a vocabulary of a folder that has no tokenizer files.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"expected {name} to have a tokenizer, as its model takes texts: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(
            f"expected {name} to have a tokenizer; copy its files, as tokenizer.json, from where the model came from"
        )
    return tokenizer
