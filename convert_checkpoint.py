"""Weights in another layout -> a folder that every Auto class loads, and back.

    python -m vit_embed.convert_checkpoint ViT-B-32.pt --output_dir clip-b32
    python -m vit_embed.convert_checkpoint clip-b32 --reverse --layout openai --output_file ViT-B-32.pt

A layout is a table of rules with a pure function or two, in `layouts/`; finding and reading a source, its tokenizer and
writing the result know nothing of layouts. A checkpoint is data from a stranger: no code that it holds is ever run, and
nothing is written unless all of it can be.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional as F

if not __package__:
    # Run as a script from a clone, whose folder may have any name: this folder becomes the package that the imports
    # below ask for, before another installed copy can.
    _spec = importlib.util.spec_from_file_location("vit_embed", Path(__file__).resolve().with_name("__init__.py"))
    sys.modules["vit_embed"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["vit_embed"])

from vit_embed.checkpoint_reader import collect, listing, read_checkpoint, release  # noqa: E402
from vit_embed.checkpoint_source import OPENAI_MODELS, Source, find_source  # noqa: E402
from vit_embed.checkpoint_writer import (  # noqa: E402
    check_output_dir,
    check_output_file,
    check_space,
    new_file,
    new_folder,
    sync,
    write_state_dict,
)
from vit_embed.clip_tokenizer import BPE_FILE, padding_id, read_tokenizer, write_tokenizer  # noqa: E402
from vit_embed.configuration_vit_embed import VitEmbedConfig, VitEmbedTextConfig
from vit_embed.contrastive_vit_embed import MAX_LOGIT_SCALE  # noqa: E402
from vit_embed.conversion_card import model_card  # noqa: E402
from vit_embed.layouts import LAYOUTS, detect_layout  # noqa: E402
from vit_embed.layouts.image_processors import equal_image_processor  # noqa: E402
from vit_embed.layouts.rules import (  # noqa: E402
    MODEL_CLASSES,
    ConversionOptions,
    Layout,
    Restored,
    SampleInputs,
    SourceConfig,
    StateDict,
    count_non_finite,
    empty_model,
    require,
    trunk_prefix,
)
from vit_embed.modeling_vit_embed import VitEmbedPreTrainedModel  # noqa: E402
from vit_embed.options_vit_embed import HIDDEN_ACTS, NORM_POSITIONS, POOLING_TYPES
from vit_embed.saving_vit_embed import IMAGE_PROCESSOR_FILE, image_processor_dict

logger = logging.getLogger("vit_embed.convert_checkpoint")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

MAX_SHARD_SIZE = "5GB"

# Options that mean something for every layout; a layout names the others that it reads.
COMMON_OPTIONS = ("dtype", "max_position_embeddings", "trunk_only")

# Both forms compute in float32 in another order of operations; small models with random weights differ by 1e-6 of the
# largest feature, 24 layers of 1024 by 1e-5. A wrong conversion is off by the whole size of a feature.
MAX_RELATIVE_DIFFERENCE = 1e-3

# The same in half precision, whose roundings move features of random weights by some hundredths of the largest.
MAX_ROUNDED_DIFFERENCE = 0.2

# Layouts of models that see images as CLIP does where nothing else is said.
CLIP_PREPROCESSED = ("openai", "open_clip", "hf_clip")

# Packages that can pad an image to whole patches (timm's dynamic_img_pad).
PADDING_LAYOUTS = ("timm",)

# What source and result are compared by: the name that a layout's `reference` gives it, and how ours computes it.
OUTPUTS: dict[str, Callable[[VitEmbedPreTrainedModel, SampleInputs], torch.Tensor]] = {
    "last_hidden_state": lambda model, inputs: model.trunk(inputs.pixel_values).last_hidden_state,
    "pooler_output": lambda model, inputs: model.trunk(inputs.pixel_values).pooler_output,
    "image_features": lambda model, inputs: model.get_image_features(inputs.pixel_values),
    "text_features": lambda model, inputs: model.get_text_features(inputs.input_ids),
    "logits_per_image": lambda model, inputs: (
        model(inputs.pixel_values, inputs.input_ids, return_loss=False).logits_per_image
    ),
    "logits": lambda model, inputs: model(inputs.pixel_values).logits,
    "predicted_depth": lambda model, inputs: model(inputs.pixel_values).predicted_depth,
}


def convert_checkpoint(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    options: ConversionOptions | None = None,
    tokenizer: str | os.PathLike | None = None,
    layout: str = "auto",
    max_shard_size: str = MAX_SHARD_SIZE,
) -> dict[str, float] | None:
    """Writes a checkpoint in another layout as a folder that every Auto class loads.

    Args:
        source: as `find_source` takes it.
        output_dir: a new or an empty folder.
        options: what the source does not say; None takes the defaults.
        tokenizer: as in `read_tokenizer`.
        layout: a key of LAYOUTS, or "auto".
        max_shard_size: of a file of weights, as in `save_pretrained`.

    Returns:
        The largest absolute difference of each output between the source run by its own code and the folder, in
        float32; None where the source could not be run, which is logged with the reason.

    Raises:
        ValueError, OSError: the source, the tokenizer or the output folder is not fit, the disk is full, or the folder
            does not compute what the source does. Nothing is written then.
    """
    output_dir, options = Path(output_dir).resolve(), options or ConversionOptions()
    check_output_dir(output_dir)
    found = find_source(source)
    state_dict = found.state_dict()
    layout = _chosen_layout(layout, state_dict, found.config)
    _check_options(layout, options)
    non_finite = _count_non_finite(state_dict)
    with _config_of_a_stranger(layout):
        config, weights = LAYOUTS[layout].convert(state_dict, found.config, options)
    del state_dict
    _check_logit_scale(config, weights)
    if options.max_position_embeddings is not None:
        config, weights = resize_text_positions(config, weights, options.max_position_embeddings)
    hashes = found.sha256()
    config.converted_from = {
        **config.converted_from,
        "source": found.name,
        "sha256": hashes,
        "license": found.licence,
    }
    vocabulary = None
    if config.text_config is not None:
        vocabulary = read_tokenizer(tokenizer, found.tokenizer_files, config.text_config)
        _take_padding(config.text_config, vocabulary)
    elif tokenizer is not None:
        raise ValueError(f"--tokenizer {tokenizer} is for a text tower, and this model has none; leave it out")
    with new_folder(output_dir) as folder:
        _write_model(folder, config, weights, found, layout, max_shard_size)
        if vocabulary is not None:
            write_tokenizer(folder, vocabulary)
        for path in folder.glob("*.safetensors"):
            sync(path)  # or its pages cannot be let go of when they are read back
        _check_written(folder, weights)
        model_class = type(empty_model(config))
        del weights
        differences = None
        if non_finite:
            logger.info("source and result were not compared: NaN or infinite weights give no numbers to compare")
        elif options.max_position_embeddings is not None:
            logger.info("source and result were not compared: the text positions were resampled")
        else:
            differences = compare(LAYOUTS[layout], found, folder, model_class, options.dtype)
        dtype = str(options.dtype).removeprefix("torch.")
        card = model_card(found, layout, hashes, empty_model(config), dtype, differences, vocabulary is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")
    logger.info("wrote %s", output_dir)
    return differences


def _chosen_layout(layout: str, state_dict: StateDict, source_config: SourceConfig) -> str:
    if layout == "auto":
        with _config_of_a_stranger(layout):
            layout, reason = detect_layout(state_dict, source_config)
        logger.info("layout %s, as %s", layout, reason)
    return layout


def _check_options(layout: str, options: ConversionOptions) -> None:
    """Raises ValueError for an option that is told and that the layout does not read."""
    readable = (*COMMON_OPTIONS, *LAYOUTS[layout].options)
    told = [name for name, value in dataclasses.asdict(options).items() if value not in (None, False)]
    if unread := [f"--{name}" for name in told if name not in readable]:
        raise ValueError(f"layout {layout} does not read {', '.join(unread)}; leave it out")


@contextlib.contextmanager
def _config_of_a_stranger(layout: str) -> Iterator[None]:
    """Makes ValueErrors of what a config raises that holds anything where the layout looks for a number."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        logger.debug("layout %s failed", layout, exc_info=True)
        raise ValueError(f"the source's config has values that layout {layout} cannot use: {error!r}") from error


def _check_logit_scale(config: VitEmbedConfig, weights: StateDict) -> None:
    """Warns where ours bounds what the source does not."""
    if _exceeds_bound(config, weights):
        logger.warning(
            "logit_scale is %.4f, above ln 100 = %.4f, by which CLIP bounds it in training: here logits are computed "
            "with the bound, features are not concerned",
            float(weights["logit_scale"]),
            MAX_LOGIT_SCALE,
        )


def _exceeds_bound(config: VitEmbedConfig, weights: StateDict) -> bool:
    scale = weights.get("logit_scale")
    # bfloat16 rounds ln 100 up by 0.005
    return scale is not None and config.contrastive_loss == "softmax" and float(scale) > MAX_LOGIT_SCALE + 0.01


def _count_non_finite(state_dict: StateDict) -> int:
    """How many numbers of the weights are NaN or infinite, with a warning that names their tensors."""
    counts = {}
    for key, tensor in state_dict.items():
        is_mask = key.endswith("attn_mask")  # old files of open_clip hold a causal mask, minus infinity by design
        if tensor.is_floating_point() and not is_mask and (count := count_non_finite(tensor)):
            counts[key] = count
        release(tensor)
    if counts:
        logger.warning(
            "%d numbers of the source are NaN or infinite, in %d tensors: %s",
            sum(counts.values()),
            len(counts),
            listing(list(counts)),
        )
    return sum(counts.values())


def _take_padding(config: VitEmbedTextConfig, vocabulary: dict[str, bytes] | None) -> None:
    """What the tokenizer pads with, where a text tower reads it: SigLIP's configs state another id than their
    tokenizers' as often as not."""
    pad = None if vocabulary is None else padding_id(vocabulary)
    if config.reads_padding and pad is not None and pad != config.pad_token_id:
        logger.warning(
            "the tokenizer pads with %d, the source's config says %s; taken is %d", pad, config.pad_token_id, pad
        )
        config.pad_token_id = pad
        config.validate_architecture()


# Attention over more takes more memory than there is.
MAX_TEXT_POSITIONS = 2**17
TEXT_POSITIONS = "text_model.embeddings.position_embedding.weight"


def resize_text_positions(
    config: VitEmbedConfig, weights: dict[str, torch.Tensor], num_positions: int
) -> tuple[VitEmbedConfig, dict[str, torch.Tensor]]:
    """A dual encoder for texts of `num_positions` tokens.

    A shorter table keeps its first rows, with which a causal tower read at its end token gives texts that fit what it
    gave before. A longer one is resampled linearly in float32, as open_clip's `resize_text_pos_embed` does; that moves
    every position, so texts of any length give other features than before, and the model should be fine-tuned.

    Raises:
        ValueError: a model without a text tower, or fewer than two positions.
    """
    if config.text_config is None:
        raise ValueError("--max_position_embeddings is for a text tower, and this model has none; leave it out")
    if not 2 <= num_positions <= MAX_TEXT_POSITIONS:
        raise ValueError(
            f"--max_position_embeddings must be from 2, start and end of a text, to {MAX_TEXT_POSITIONS}; got "
            f"{num_positions}"
        )
    table = weights[TEXT_POSITIONS]
    if num_positions <= len(table):
        resized = table[:num_positions].clone()
    else:
        resized = F.interpolate(table.t()[None].float(), size=num_positions, mode="linear", align_corners=False)
        resized = resized[0].t().to(table.dtype).contiguous()
    if config.text_config.reads_padding:
        logger.warning("this text tower reads the padding behind a text: with more or less of it every text is another")
    config.text_config.max_position_embeddings = num_positions
    return config, {**weights, TEXT_POSITIONS: resized}


# Writing the folder


def _write_model(
    folder: Path, config: VitEmbedConfig, weights: StateDict, source: Source, layout: str, max_shard_size: str
) -> None:
    check_space(folder, weights)
    model = empty_model(config)
    with _config_of_a_stranger(layout):
        image_processor = LAYOUTS[layout].image_processor(source.config, config)
    if image_processor is None and source.preprocessor is None and layout not in CLIP_PREPROCESSED:
        logger.warning(
            "nothing says how the source's images were prepared: the folder's image processor has CLIP's mean, "
            "standard deviation and crop; put a preprocessor_config.json beside the weights, or correct the folder's"
        )
    if source.preprocessor is not None:
        own = image_processor or image_processor_dict(config, model.image_processor_type)
        image_processor = equal_image_processor(source.preprocessor, own)
    if image_processor is not None:
        image_processor = _in_whole_patches(image_processor, config)
        (folder / IMAGE_PROCESSOR_FILE).write_text(json.dumps(image_processor, indent=2, sort_keys=True) + "\n")
    model.load_state_dict(weights, assign=True)
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except SafetensorError as error:
        raise OSError(f"the weights could not be written to {folder.parent}: {error}") from error


def _in_whole_patches(image_processor: dict[str, Any], config: VitEmbedConfig) -> dict[str, Any]:
    """The same for images without a remainder of pixels that fill no patch: other packages' convolutions leave it out
    (SigLIP's 384 pixels in patches of 14), ours refuses it."""
    if config.pad_to_patch:
        return image_processor
    units = dict(zip(("height", "width"), config.image_multiple))
    sizes = {name: image_processor[name] for name in ("size", "crop_size") if "height" in image_processor.get(name, ())}
    whole = {name: {side: size[side] // units[side] * units[side] for side in units} for name, size in sizes.items()}
    return {**image_processor, **whole}


def _weights_file(folder: Path) -> Path:
    index = folder / "model.safetensors.index.json"
    return index if index.is_file() else folder / "model.safetensors"


def _check_written(folder: Path, weights: StateDict) -> None:
    """Raises OSError unless the folder holds every weight bit for bit."""
    stored = read_checkpoint(_weights_file(folder))
    changed = sorted(set(weights).symmetric_difference(stored))
    for name in set(weights).intersection(stored):
        mine, written = weights[name], stored[name]
        if written.dtype != mine.dtype or not torch.equal(_bytes(written), _bytes(mine)):
            changed.append(name)
        release(written)
    if changed:
        raise OSError(f"{len(changed)} weights read back from {folder} differ from those written: {listing(changed)}")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The stored bytes (..., n), so that NaN equals itself."""
    return tensor.detach()[..., None].view(torch.uint8)


# Source and result on the same inputs


def sample_inputs(config: VitEmbedConfig) -> SampleInputs:
    """Two images and, for a text tower, two texts of different lengths, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(2, config.num_channels, *config.image_shape, generator=generator)
    text_config = config.text_config
    if text_config is None:
        return SampleInputs(pixel_values, None)
    length = text_config.max_position_embeddings
    # Ids below both special tokens, where those are the last two of the vocabulary.
    input_ids = torch.randint(0, max(1, text_config.vocab_size - 2), (2, length), generator=generator)
    if text_config.pooling_type == "eos":
        end = text_config.eos_token_id
        input_ids = torch.where(input_ids == end, 0 if end else 1, input_ids)
        if text_config.bos_token_id is not None:
            input_ids[:, 0] = text_config.bos_token_id
        input_ids[0, -1:] = end
        input_ids[1, length // 2 :] = end
    else:
        input_ids[1, length // 2 :] = text_config.pad_token_id
    return SampleInputs(pixel_values, input_ids)


@torch.no_grad()
def compare(
    layout: Layout, source: Source, folder: Path, model_class: type[VitEmbedPreTrainedModel], dtype: torch.dtype
) -> dict[str, float] | None:
    """Runs the source by its own code, and the folder, on the same inputs in float32.

    The one is gone before the other is loaded, so that both never are in memory.

    Returns:
        The largest absolute difference of each output; None, with the reason in the log, where the source cannot run.

    Raises:
        ValueError: the folder computes something else, or the source's code cannot take its weights.
    """
    config = model_class.config_class.from_pretrained(folder)
    inputs = sample_inputs(config)
    try:
        expected = layout.reference(source.state_dict(), source.config, config, inputs)
        collect()
    except RuntimeError as error:
        raise ValueError(f"the source's own code does not run these weights with their config: {error}") from error
    except ImportError as error:
        logger.info("the source could not be run: %s; the folder holds what was converted, bit for bit", error)
        return None
    model = model_class.from_pretrained(folder, dtype=dtype).eval()
    for parameter in model.parameters():  # one by one: `model.float()` would keep both forms of all of them
        stored, parameter.data = parameter.data, parameter.data.float()
        if stored.dtype != torch.float32:
            release(stored)
    if _exceeds_bound(config, dict(model.named_parameters())):
        expected.pop("logits_per_image", None)
    allowed = MAX_RELATIVE_DIFFERENCE if dtype == torch.float32 else MAX_ROUNDED_DIFFERENCE
    differences = {}
    for name, value in expected.items():
        difference, size = float((OUTPUTS[name](model, inputs) - value).abs().max()), float(value.abs().max())
        logger.info("largest difference of %s between source and result: %.2e of %.2e", name, difference, size)
        if not difference <= allowed * size:
            raise ValueError(
                f"{name} of the result differs from the source's by {difference:.2e} where its largest is {size:.2e}; "
                "this source is not what it seems to be, or the converter is wrong"
            )
        differences[name] = difference
    return differences


# The way back


def restore_checkpoint(
    source: str | os.PathLike,
    layout: str,
    output_file: str | os.PathLike | None = None,
    output_dir: str | os.PathLike | None = None,
) -> Restored:
    """Writes a model of ours in the layout of another package: its weights as a file, or a folder that it loads whole.

    Args:
        source: a folder of ours, or of a stock CLIPModel.
        layout: a key of LAYOUTS with a way back.
        output_file: a new file; its ending says the format, .safetensors or .pt, .pth, .bin of `torch.save`.
        output_dir: a new or an empty folder, for packages that have a form for one.

    Raises:
        ValueError, OSError: the package cannot express this model, or the output is not fit. Nothing is written then.
    """
    if (output_file is None) == (output_dir is None):
        raise ValueError("give --output_file for the weights alone, or --output_dir for a folder with their config")
    target = Path(output_file if output_dir is None else output_dir).resolve()
    check_output_file(target) if output_dir is None else check_output_dir(target)
    restore = LAYOUTS[layout].restore if layout in LAYOUTS else None
    if restore is None:
        ways = [name for name, each in LAYOUTS.items() if each.restore is not None]
        raise ValueError(f"--reverse needs --layout, one of {', '.join(ways)}; got {layout}")
    found = find_source(source)
    config, weights = _own_model(found)
    # What ours does at inference beyond its weights, and others do not.
    needed = {"token_merge_size": 0, **({} if layout in PADDING_LAYOUTS else {"pad_to_patch": False})}
    require(config, needed, f"layout {layout}")
    restored = restore(config, weights)
    del weights
    if output_dir is not None and restored.weights_file is None:
        raise ValueError(f"layout {layout} has no folder for this model, only a file; give --output_file")
    if output_dir is None:
        with new_file(target) as file:
            _write_restored(file, target.suffix, restored)
    else:
        with new_folder(target) as folder:
            _write_restored(folder / restored.weights_file, Path(restored.weights_file).suffix, restored)
            files = restored.files
            if found.preprocessor is not None:
                files = LAYOUTS[layout].restored_processor(files, found.preprocessor)
            for name, content in files.items():
                (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for file in found.tokenizer_files:
                (folder / file.name).write_bytes(file.read_bytes())
    logger.info("wrote %s; it is loaded by %s", target, restored.usage.replace("FILE", str(target)))
    return restored


def _own_model(source: Source) -> tuple[VitEmbedConfig, dict[str, torch.Tensor]]:
    """The config and weights of a folder of ours, the trunk below "vision_model." whichever class it is."""
    if source.config.get("model_type") not in ("vit_embed", "clip", "clip_vision_model"):
        raise ValueError(
            f"--reverse takes a folder that vit_embed wrote, with a config.json; {source.name} has "
            f"model_type={source.config.get('model_type')!r}"
        )
    config = VitEmbedConfig.from_pretrained(source.weights.parent)
    classes = [name for name in config.architectures or () if name in MODEL_CLASSES]
    if not classes:
        raise ValueError(
            f"--reverse takes one of {', '.join(MODEL_CLASSES)}, got architectures={config.architectures} in "
            f"{source.name}"
        )
    model = empty_model(config)
    prefix = trunk_prefix(model)
    state_dict, expected = source.state_dict(), model.state_dict()
    wrong = sorted(set(expected).symmetric_difference(state_dict))
    wrong += [name for name in expected if name in state_dict and state_dict[name].shape != expected[name].shape]
    if wrong:
        raise ValueError(f"the weights of {source.name} are not those that its config describes: {listing(wrong)}")
    return config, {prefix + name: tensor for name, tensor in state_dict.items()}


def _write_restored(path: Path, ending: str, restored: Restored) -> None:
    check_space(path.parent, restored.state_dict)
    try:
        write_state_dict(path, ending, restored.state_dict)
    except (SafetensorError, RuntimeError) as error:  # torch.save's own for a full disk
        raise OSError(f"the weights could not be written to {path.parent}: {error}") from error


# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vit_embed.convert_checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument(
        "source",
        help=f"a file of weights, a folder, owner/name on the Hub, or one of {', '.join(OPENAI_MODELS)}; with "
        "--reverse a folder of ours",
    )
    parser.add_argument("--output_dir", help="a new or an empty folder")
    parser.add_argument("--layout", choices=["auto", *LAYOUTS], default="auto", help="names of the source's weights")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the weights written")
    parser.add_argument("--max_shard_size", help=f"of a file of weights (default: {MAX_SHARD_SIZE})")
    parser.add_argument("--tokenizer", help=f"a folder of a tokenizer, or {BPE_FILE}")
    parser.add_argument("--reverse", action="store_true", help="from a folder of ours to --layout")
    parser.add_argument("--output_file", help="with --reverse: a new file, .safetensors, .pt, .pth or .bin")
    told = parser.add_argument_group("what the source does not say, or what to make of it")
    told.add_argument("--hidden_act", choices=HIDDEN_ACTS, help="activation of the towers")
    told.add_argument("--num_attention_heads", type=int, help="of the image tower")
    told.add_argument("--text_num_attention_heads", type=int, help="of the text tower")
    told.add_argument("--layer_norm_eps", type=float, help="what every norm adds to the variance")
    told.add_argument("--norm_position", choices=NORM_POSITIONS, help="before each branch, or behind the sum")
    told.add_argument("--pooling_type", choices=POOLING_TYPES, help="how the image tower's tokens become one vector")
    told.add_argument("--image_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="where it is no square")
    told.add_argument("--max_position_embeddings", type=int, help="tokens of a text; resamples the text positions")
    told.add_argument("--trunk_only", action="store_true", help="leave out heads, projections and the text tower")
    return parser


def _run(given: argparse.Namespace) -> None:
    names = [each.name for each in dataclasses.fields(ConversionOptions)]
    values: dict[str, Any] = {name: getattr(given, name) for name in names}
    values["dtype"] = DTYPES[given.dtype]
    values["image_size"] = None if given.image_size is None else tuple(given.image_size)
    options = ConversionOptions(**values)
    if given.reverse:
        if options != ConversionOptions() or given.tokenizer is not None or given.max_shard_size is not None:
            raise ValueError(
                "--reverse takes --layout and --output_file or --output_dir alone; the model says the rest"
            )
        restore_checkpoint(given.source, given.layout, given.output_file, given.output_dir)
        return
    if given.output_dir is None or given.output_file is not None:
        raise ValueError("give --output_dir, the folder to write; --output_file is for --reverse")
    convert_checkpoint(
        given.source, given.output_dir, options, given.tokenizer, given.layout, given.max_shard_size or MAX_SHARD_SIZE
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        _run(given)
    except (ValueError, OSError) as error:
        logger.error("nothing was written: %s", " ".join(str(error).split()))  # on one line
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
