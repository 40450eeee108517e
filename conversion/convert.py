"""A checkpoint in another layout -> a folder that every Auto class loads, and back: the story, one stage a line."""

import dataclasses
import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.nn import functional as F

from vit_embed import VitEmbedConfig, VitEmbedTextConfig
from vit_embed.contrastive_vit_embed import MAX_LOGIT_SCALE
from vit_embed.conversion.card import model_card
from vit_embed.conversion.compare import compare, exceeds_bound
from vit_embed.conversion.image_processor import choose_image_processor
from vit_embed.conversion.layouts import LAYOUTS, detect_layout, detections
from vit_embed.conversion.layouts.layout import (
    COMMON_OPTIONS,
    MODEL_CLASSES,
    ConversionOptions,
    Converted,
    Layout,
    Restored,
    SourceConfig,
    StateDict,
    empty_model,
    trunk_prefix,
)
from vit_embed.conversion.layouts.questions import require
from vit_embed.conversion.layouts.rules import count_non_finite
from vit_embed.conversion.memory import one_by_one
from vit_embed.conversion.messages import listing
from vit_embed.conversion.processor_files import IMAGE_PROCESSOR_FILE
from vit_embed.conversion.reading import read_checkpoint
from vit_embed.conversion.source import Source, find_source
from vit_embed.conversion.tokenizer import padding_id, read_tokenizer, write_tokenizer
from vit_embed.conversion.writer import (
    check_output_dir,
    check_output_file,
    check_space,
    new_file,
    new_folder,
    sync,
    write_state_dict,
)
from vit_embed.modeling_vit_embed import VitEmbedPreTrainedModel

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = "5GB"
# Attention over more takes more memory than there is.
MAX_TEXT_POSITIONS = 2**17
TEXT_POSITIONS = "text_model.embeddings.position_embedding.weight"
# Folders that the way back takes: ours, and stock CLIP's, whose weights are ours.
OUR_MODEL_TYPES = ("vit_embed", "clip", "clip_vision_model")


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
    _check_layout_name(layout)
    found = find_source(source, options.weights_key)
    _check_is_foreign(found)
    state_dict = found.state_dict()
    chosen = _choose_layout(layout, state_dict, found.config)
    _check_options(chosen, options)
    is_finite = _warn_of_non_finite(state_dict)
    converted = _convert(chosen, state_dict, found.config, options)
    del state_dict
    _warn_of_logit_scale(converted)
    if options.max_position_embeddings is not None:
        converted = resize_text_positions(converted, options.max_position_embeddings)
    hashes = found.sha256()
    converted.config.converted_from.update(source=found.name, sha256=hashes, license=found.licence)
    tokenizer_files = _read_tokenizer(tokenizer, found, converted.config)
    with new_folder(output_dir) as folder:
        _write_model(folder, converted, choose_image_processor(chosen, found, converted.model), max_shard_size)
        if tokenizer_files is not None:
            write_tokenizer(folder, tokenizer_files)
        _check_written(folder, converted.weights)
        model = _without_weights(converted)
        differences = None
        if not is_finite:
            logger.info("source and result were not compared: NaN or infinite weights give no numbers to compare")
        elif options.max_position_embeddings is not None:
            logger.info("source and result were not compared: the text positions were resampled")
        else:
            differences = compare(chosen, found, folder, type(model), options.dtype)
        card = model_card(found, chosen, hashes, model, options.dtype, differences, tokenizer_files is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")
    logger.info("wrote %s", output_dir)
    return differences


# What is asked before


def _choose_layout(layout: str, state_dict: StateDict, source_config: SourceConfig) -> Layout:
    if layout == "auto":
        layout, reason = detect_layout(state_dict, source_config)
        logger.info("layout %s, as %s", layout, reason)
    return LAYOUTS[layout]


def _check_layout_name(layout: str) -> None:
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout must be auto or one of {', '.join(LAYOUTS)}; got {layout!r}")


def _check_is_foreign(source: Source) -> None:
    if source.config.get("model_type") == VitEmbedConfig.model_type:
        raise ValueError(
            f"{source.name} is a folder of vit_embed already: load it with from_pretrained; --reverse writes it in "
            "another layout"
        )


def _check_options(layout: Layout, options: ConversionOptions) -> None:
    """Raises ValueError for an option that is given and that the layout does not read."""
    given = [name for name, value in dataclasses.asdict(options).items() if value is not None and value is not False]
    if unread := [f"--{name}" for name in given if name not in (*COMMON_OPTIONS, *layout.options)]:
        raise ValueError(f"layout {layout.name} does not read {', '.join(unread)}; leave it out")


def _warn_of_non_finite(state_dict: StateDict) -> bool:
    """Whether all numbers of the weights are finite; warns with the names of tensors in which some are not."""
    counts = {}
    for key, tensor in one_by_one(state_dict):
        is_mask = key.endswith("attn_mask")  # old files of open_clip hold a causal mask, minus infinity by design
        if tensor.is_floating_point() and not is_mask and (count := count_non_finite(tensor)):
            counts[key] = count
    if counts:
        logger.warning(
            "%d numbers of the source are NaN or infinite, in %d tensors: %s",
            sum(counts.values()),
            len(counts),
            listing(counts),
        )
    return not counts


def _convert(
    layout: Layout, state_dict: StateDict, source_config: SourceConfig, options: ConversionOptions
) -> Converted:
    """As the layout does; an error says where the weights are of another layout than was given."""
    try:
        return layout.convert(state_dict, source_config, options)
    except ValueError as error:
        reasons = detections(state_dict, source_config)
        if layout.name in reasons or not reasons:
            raise
        others = "; ".join(f"--layout {name}, as {reason}" for name, reason in reasons.items())
        raise ValueError(f"{error} (the weights are rather of another layout: {others})") from error


# What is changed after


def _warn_of_logit_scale(converted: Converted) -> None:
    """Warns where ours bounds what the source does not."""
    if exceeds_bound(converted.config, converted.weights):
        logger.warning(
            "logit_scale is %.4f, above ln 100 = %.4f, by which CLIP bounds it in training: here logits are computed "
            "with the bound, features are not concerned",
            float(converted.weights["logit_scale"]),
            MAX_LOGIT_SCALE,
        )


def resize_text_positions(converted: Converted, num_positions: int) -> Converted:
    """A dual encoder for texts of `num_positions` tokens.

    A shorter table keeps its first rows, with which a causal tower read at its end token gives texts that fit what it
    gave before. A longer one is resampled linearly in float32, as open_clip's `resize_text_pos_embed` does; that moves
    every position, so texts of any length give other features than before, and the model should be fine-tuned.

    Raises:
        ValueError: a model without a text tower, or fewer than two positions.
    """
    config, weights = converted.config, converted.weights
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
        logger.warning(
            "this text tower reads the padding after a text: changing the length changes the features of every text"
        )
    config.text_config.max_position_embeddings = num_positions
    return Converted(empty_model(config), {**weights, TEXT_POSITIONS: resized})


def _read_tokenizer(path: str | os.PathLike | None, source: Source, config: VitEmbedConfig) -> dict[str, bytes] | None:
    """The files of the tokenizer, None without one; the text tower's padding is what it pads with."""
    if config.text_config is None:
        if path is not None:
            raise ValueError(f"--tokenizer {path} is for a text tower, and this model has none; leave it out")
        return None
    files = read_tokenizer(path, source.tokenizer_files, config.text_config)
    if files is not None and config.text_config.reads_padding:
        _take_padding(config.text_config, padding_id(files))
    return files


def _take_padding(config: VitEmbedTextConfig, pad: int | None) -> None:
    """SigLIP's configs state another id than their tokenizers pad with as often as not."""
    if pad is not None and pad != config.pad_token_id:
        logger.warning(
            "the tokenizer pads with %d, the source's config says %s; taken is %d", pad, config.pad_token_id, pad
        )
        config.pad_token_id = pad
        config.validate_architecture()


# Writing the folder


def _write_model(folder: Path, converted: Converted, image_processor: dict | None, max_shard_size: str) -> None:
    check_space(folder, converted.weights)
    converted.model.load_state_dict(converted.weights, assign=True)
    try:
        converted.model.save_pretrained(folder, max_shard_size=max_shard_size)
    except SafetensorError as error:
        raise OSError(f"the weights could not be written to {folder.parent}: {error}") from error
    # After saving, which would fit it to `image_size`: DINOv2 has positions for 518 pixels and is given images of 224.
    if image_processor is not None:
        (folder / IMAGE_PROCESSOR_FILE).write_text(json.dumps(image_processor, indent=2, sort_keys=True) + "\n")


def _check_written(folder: Path, weights: StateDict) -> None:
    """Raises OSError unless the folder holds every weight bit for bit."""
    for path in folder.glob("*.safetensors"):
        sync(path)  # or its pages cannot be let go of when they are read back
    index = folder / "model.safetensors.index.json"
    stored = read_checkpoint(index if index.is_file() else folder / "model.safetensors")
    changed = sorted(set(weights).symmetric_difference(stored))
    for name, written in one_by_one(stored):
        mine = weights.get(name)
        if mine is not None and (written.dtype != mine.dtype or not torch.equal(_bytes(written), _bytes(mine))):
            changed.append(name)
    if changed:
        raise OSError(f"{len(changed)} weights read back from {folder} differ from those written: {listing(changed)}")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The stored bytes (..., n), so that NaN equals itself."""
    return tensor.detach()[..., None].view(torch.uint8)


def _without_weights(converted: Converted) -> VitEmbedPreTrainedModel:
    """The model as it was before its weights, which are in the folder by now, so that their memory is free."""
    converted.weights.clear()
    return converted.model.to("meta")


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
    chosen = _choose_way_back(layout)
    found = find_source(source)
    config, weights = _own_model(found)
    _check_inference(config, chosen)
    restored = chosen.restore(config, weights)
    del weights
    if output_dir is None:
        with new_file(target) as file:
            _write_weights(file, target.suffix, restored)
    elif restored.weights_file is None:
        raise ValueError(f"layout {layout} has no folder for this model, only a file; give --output_file")
    else:
        with new_folder(target) as folder:
            _write_weights(folder / restored.weights_file, Path(restored.weights_file).suffix, restored)
            _write_files_beside(folder, restored, chosen, found)
    logger.info("wrote %s; it is loaded by %s", target, restored.usage.replace("FILE", str(target)))
    return restored


def _choose_way_back(layout: str) -> Layout:
    ways = [name for name, each in LAYOUTS.items() if each.restore is not None]
    if layout not in ways:
        raise ValueError(f"--reverse needs --layout, one of {', '.join(ways)}; got {layout}")
    return LAYOUTS[layout]


def _own_model(source: Source) -> tuple[VitEmbedConfig, dict[str, torch.Tensor]]:
    """The config and weights of a folder of ours, the trunk below "vision_model." whichever class it is."""
    if source.config.get("model_type") not in OUR_MODEL_TYPES:
        raise ValueError(
            f"--reverse takes a folder that vit_embed wrote, with a config.json; {source.name} has "
            f"model_type={source.config.get('model_type')!r}"
        )
    config = VitEmbedConfig.from_pretrained(source.weights.parent)
    if not any(name in MODEL_CLASSES for name in config.architectures or ()):
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


def _check_inference(config: VitEmbedConfig, layout: Layout) -> None:
    """Raises ValueError for what ours does at inference beyond its weights, and the package does not."""
    needed = {"token_merge_size": 0, **({} if layout.can_pad else {"pad_to_patch": False})}
    require(config, needed, f"layout {layout.name}")


def _write_weights(path: Path, ending: str, restored: Restored) -> None:
    check_space(path.parent, restored.state_dict)
    try:
        write_state_dict(path, ending, restored.state_dict)
    except (SafetensorError, RuntimeError) as error:  # torch.save's own for a full disk
        raise OSError(f"the weights could not be written to {path.parent}: {error}") from error


def _write_files_beside(folder: Path, restored: Restored, layout: Layout, source: Source) -> None:
    """The package's configs, with our image processor in them, and the tokenizer."""
    files = restored.files
    if source.preprocessor is not None:
        files = layout.restored_processor(files, source.preprocessor)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in source.tokenizer_files:
        (folder / file.name).write_bytes(file.read_bytes())
