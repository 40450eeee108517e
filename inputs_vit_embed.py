"""What callers may give: checks of images, texts and labels, each an error that says what was expected, what came and
what to change.

Checks of shape and type cost nothing and are always made. Checks of values (ids in range, an end token in every row)
have to wait for the device: `ChecksValues` says when they are made.

Symbols: B batch, C channels, H W image pixels, T text tokens, N patches. Height comes before width everywhere.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .configuration_vit_embed import VitEmbedConfig, VitEmbedTextConfig

# Cross-entropy's mark for a row to leave out; Trainer counts the label entries that are not this one.
IGNORED_LABEL = -100

# Devices whose tensors can be looked at without waiting.
HOST_DEVICES = ("cpu",)


def is_traced() -> bool:
    """Whether a graph is being recorded (torch.compile, torch.export, torch.jit.trace): no shape and no branch may
    then depend on values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exported() -> bool:
    """Whether the graph that is recorded is for good, so that it has to serve sizes that it has not seen
    (torch.export, torch.jit.trace); torch.compile records another one for them."""
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 has no word for it
    return exporting() or torch.jit.is_tracing()


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether its values can be looked at without waiting."""
    return tensor.device.type in HOST_DEVICES


class ChecksValues:
    """Of a module: when its forward pass may look at the values of its inputs, which makes an accelerator wait.

    input_checks: "auto" checks every pass on a CPU and the first pass on any other device; "always" checks every pass;
        "never" checks none. No pass is checked while a graph is recorded or captured.
    """

    modules: Callable[[], Iterator[nn.Module]]
    input_checks = "auto"
    _has_checked = False

    def set_input_checks(self, when: str) -> None:
        """Sets `input_checks` for this module and all those in it.

        Raises:
            ValueError: not one of "auto", "always", "never".
        """
        if when not in ("auto", "always", "never"):
            raise ValueError(f"input checks are 'auto', 'always' or 'never', got {when!r}")
        for module in self.modules():
            if isinstance(module, ChecksValues):
                module.input_checks = when

    def checks_values(self, tensor: torch.Tensor) -> bool:
        """Whether to look at the values of this input now."""
        # A subclass may have no values (FakeTensor) or not all of them (DTensor).
        if self.input_checks == "never" or type(tensor) is not torch.Tensor or tensor.is_meta or is_traced():
            return False
        if is_on_host(tensor):
            return True
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        is_first, self._has_checked = not self._has_checked, True
        return is_first or self.input_checks == "always"


def check_tensor(name: str, value: Any, shape: str, how: str) -> None:
    """Raises TypeError unless `value` is a tensor. `shape` says what it should be, `how` where to get it."""
    if isinstance(value, torch.Tensor):
        return
    kind = type(value).__name__
    if hasattr(value, "keys"):
        how = f"give its entries by name, model(**inputs), in place of the whole {kind}"
    raise TypeError(f"{name} must be a tensor of shape {shape}, got {kind}; {how}")


def check_images(
    config: VitEmbedConfig,
    pixel_values: Any,
    patch_embeds: Any = None,
    pixel_mask: Any = None,
    interpolate_pos_encoding: bool | None = None,
    training: bool = False,
) -> None:
    """Raises TypeError or ValueError unless these are images for a model of this config: what VitEmbedModel takes."""
    if (pixel_values is None) == (patch_embeds is None):
        got = "neither" if pixel_values is None else "both"
        raise ValueError(f"give exactly one of pixel_values and patch_embeds, got {got}")
    if patch_embeds is not None:
        if pixel_mask is not None:
            raise ValueError("pixel_mask says which pixels are padding, but patch_embeds have no pixels; leave it out")
        check_patch_embeds(config, patch_embeds)
    else:
        check_pixel_values(config, pixel_values)
    if pixel_mask is not None:
        check_tensor("pixel_mask", pixel_mask, "(batch, height, width)", "pad the images with the image processor")
        if config.token_merge_size and not training:
            raise ValueError(
                f"token_merge_size={config.token_merge_size} merges equally many tokens of every image, but "
                "pixel_mask pads images of different sizes; set token_merge_size=0, or batch images of one size"
            )
    if interpolate_pos_encoding is False and pixel_values is not None:
        size = tuple(pixel_values.shape[2:])
        if size != config.image_shape:
            raise ValueError(
                f"interpolate_pos_encoding=False takes images of image_size {config.image_shape} only, got {size}; "
                "leave it out: positions are resampled to any grid"
            )


def check_pixel_values(config: VitEmbedConfig, pixel_values: Any) -> None:
    """Raises TypeError or ValueError unless they are (B, C, H, W) of floating-point numbers in whole patches."""
    channels = config.num_channels
    shape = f"(batch, num_channels={channels}, height, width)"
    check_tensor(
        "pixel_values", pixel_values, shape, "use the image processor: processor(images=..., return_tensors='pt')"
    )
    found = tuple(pixel_values.shape)
    if len(found) != 4 or found[1] != channels or not found[0]:
        what = f"convert the images to {channels} channels in the image processor"
        if len(found) == 3:
            what = "a single image needs a batch dimension: pixel_values[None]"
        elif len(found) == 4 and found[3] == channels:
            what = "channels come before height and width: pixel_values.permute(0, 3, 1, 2)"
        elif len(found) == 4 and not found[0]:
            what = "leave empty batches out"
        raise ValueError(f"pixel_values must be {shape}, got {found}; {what}")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values must be normalised floating-point numbers, got {pixel_values.dtype}; scale and normalise "
            "the images with the image processor"
        )
    check_image_sizes(config, [found[2:]])


def check_patch_embeds(config: VitEmbedConfig, patch_embeds: Any) -> None:
    """Raises TypeError or ValueError unless they are (B, D, gh, gw) that may take the place of the stem's output."""
    shape = f"(batch, hidden_size={config.hidden_size}, grid rows, grid columns)"
    check_tensor("patch_embeds", patch_embeds, shape, "give what another encoder makes of the images")
    if config.stem_type == "adaptive":
        raise ValueError(
            "patch_embeds take the place of the stem, but stem_type='adaptive' has to see pixels to choose its "
            "tokens; use another stem_type, or pixel_values"
        )
    found = tuple(patch_embeds.shape)
    if len(found) != 4 or found[1] != config.hidden_size or 0 in found or not patch_embeds.is_floating_point():
        raise ValueError(f"patch_embeds must be {shape} of floating-point numbers, got {found} of {patch_embeds.dtype}")


def check_image_sizes(config: VitEmbedConfig, sizes: list[tuple[int, int]]) -> None:
    """Raises ValueError for an image (height, width) that is not cut into whole patches."""
    unit = config.image_multiple
    for height, width in sizes:
        remainder = height % unit[0] or width % unit[1]
        if min(height, width) < 1 or (remainder and not config.pad_to_patch):
            twice = "twice " if unit != config.patch_shape else ""
            raise ValueError(
                f"image height and width must be multiples of {twice}patch_size {unit}, got ({height}, {width}); "
                "resize or crop in the image processor, or set pad_to_patch=True"
            )
        if config.stem_type == "overlap" and min(config.grid_of((height, width))) < 1:
            raise ValueError(
                f"an image must hold the kernel, patch_kernel_size={config.patch_kernel_shape}, got "
                f"({height}, {width}) pixels; enlarge it in the image processor"
            )


def image_sizes(pixel_mask: torch.Tensor, pixel_values: torch.Tensor) -> list[tuple[int, int]]:
    """(height, width) in pixels of each image of a padded batch. Reads values, so no graph can hold it.

    Args:
        pixel_mask: (B, H, W), 1 for pixels of the image, which lie in the top left corner, and 0 for padding.
        pixel_values: (B, C, H, W) that it belongs to.

    Raises:
        ValueError: another shape, an image that is no rectangle in the top left corner, or a graph is being exported.
    """
    expected = (pixel_values.shape[0], *pixel_values.shape[2:])
    if tuple(pixel_mask.shape) != expected:
        raise ValueError(f"pixel_mask must be (batch, height, width) = {expected}, got {tuple(pixel_mask.shape)}")
    if is_exported():
        raise ValueError(
            "pixel_mask says in its values how large each image is, which a traced or exported graph cannot follow; "
            "export without pixel_mask, for images of one size a batch"
        )
    mask = pixel_mask.bool()
    heights, widths = mask[:, :, 0].sum(dim=1), mask[:, 0].sum(dim=1)
    rows = torch.arange(mask.shape[1], device=mask.device)[:, None] < heights[:, None, None]
    columns = torch.arange(mask.shape[2], device=mask.device) < widths[:, None, None]
    wrong = (mask != (rows & columns)).flatten(1).any(dim=1)
    found = torch.stack([heights, widths, wrong.long()], dim=1).tolist()  # read once
    for image, (*_, is_wrong) in enumerate(found):
        if is_wrong:
            raise ValueError(
                "pixel_mask must be 1 in a rectangle in the top left corner and 0 elsewhere, image "
                f"{image} is not; pad images on the right and at the bottom"
            )
    return [(height, width) for height, width, _ in found]


def check_pyramid_inputs(patch_embeds: torch.Tensor | None, pixel_mask: torch.Tensor | None, reader: str) -> None:
    """Raises ValueError for inputs that have no feature pyramid."""
    for name, value in (("patch_embeds", patch_embeds), ("pixel_mask", pixel_mask)):
        if value is not None:
            raise ValueError(
                f"{reader} reads the stem's feature pyramid, which there is for pixel_values of one size only, got "
                f"{name}; leave {name} out or do not read the pyramid"
            )


def check_every_patch(config: VitEmbedConfig, training: bool) -> None:
    """Raises ValueError where training drops patches that a dense output needs."""
    if training and config.patch_drop_rate:
        raise ValueError(
            f"patch_drop_rate={config.patch_drop_rate} leaves holes in the grid in training; set "
            "patch_drop_rate=0 for dense outputs"
        )


def check_chunk_options(chunk_size: int, output_attentions: bool, output_hidden_states: bool) -> None:
    """Raises ValueError for what a batch that is embedded in chunks has not kept."""
    if output_attentions or output_hidden_states:
        raise ValueError(
            f"contrastive_chunk_size={chunk_size} keeps nothing of a batch in training but its embeddings; leave "
            "output_attentions and output_hidden_states out, or set contrastive_chunk_size=None"
        )


def check_some_input(
    pixel_values: torch.Tensor | None, patch_embeds: torch.Tensor | None, input_ids: torch.Tensor | None
) -> None:
    """Raises ValueError unless a dual encoder is given something to embed."""
    if pixel_values is None and patch_embeds is None and input_ids is None:
        raise ValueError("give images (pixel_values or patch_embeds), texts (input_ids), or both; got neither")


def check_normalize(normalize: Any) -> None:
    """Raises TypeError unless it is a bool: CLIP's second argument, the attention mask, must not pass for it."""
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be True or False, got {type(normalize).__name__}; pass other inputs by name")


def check_sentences(names: Any, templates: Any) -> None:
    """Raises TypeError or ValueError unless these are names of classes and templates that make sentences of them."""
    for what, given in (("names", names), ("templates", templates)):
        if isinstance(given, str):
            raise TypeError(f"{what} must be a list of strings, got one string; give [{given!r}]")
        if not len(given):
            raise ValueError(f"{what} must have at least one entry, got none")
        for each in given:
            if not isinstance(each, str) and (what == "names" or not callable(each)):
                raise TypeError(f"{what} must be strings, got {type(each).__name__}")
    for template in templates:
        if isinstance(template, str) and "{}" not in template:
            raise ValueError(f"a template needs {{}} where the name of a class goes, got {template!r}")


def check_sentence_lengths(sentences: list[str], attention_mask: torch.Tensor, longest: int) -> None:
    """Raises ValueError for a sentence of more than `longest` tokens, which (B, T) of the tokenizer say."""
    lengths = attention_mask.sum(1)
    if lengths.max() > longest:
        worst = int(lengths.argmax())
        raise ValueError(
            f"a sentence must have at most max_position_embeddings={longest} tokens, {sentences[worst]!r} has "
            f"{int(lengths[worst])}; shorten the name or the template"
        )


def check_texts(
    config: VitEmbedTextConfig, input_ids: Any, attention_mask: Any = None, position_ids: Any = None
) -> None:
    """Raises TypeError or ValueError unless these are token ids of the right shapes: what VitEmbedTextModel takes."""
    how = "use the tokenizer: tokenizer(texts, padding=True, return_tensors='pt')"
    check_tensor("input_ids", input_ids, "(batch, tokens)", how)
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or 0 in shape or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be (batch, tokens) of integers, got {shape} of {input_ids.dtype}; {how}")
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, "(batch, tokens)", how)
        if tuple(attention_mask.shape) != shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {shape}, got {tuple(attention_mask.shape)}"
            )
    if shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"input_ids must have at most max_position_embeddings={config.max_position_embeddings} tokens, got "
            f"{shape[1]}; call the tokenizer with truncation=True, or split the text"
        )
    if position_ids is not None:
        check_tensor("position_ids", position_ids, "(1 or batch, tokens)", "leave it out to count from 0")
        found = tuple(position_ids.shape)
        if len(found) != 2 or found[0] not in (1, shape[0]) or found[1] != shape[1] or position_ids.is_floating_point():
            raise ValueError(
                f"position_ids must be (1, {shape[1]}) or {shape} of integers, got {found} of {position_ids.dtype}"
            )
        if config.reads_padding and shape[1] != config.max_position_embeddings:
            raise ValueError(
                "this tower reads the padding behind a text, so position_ids must be given for all "
                f"max_position_embeddings={config.max_position_embeddings} places, got {shape[1]}; pad the texts to "
                "that length, or leave position_ids out"
            )


def check_text_values(
    config: VitEmbedTextConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_end: torch.Tensor,
    ends: torch.Tensor,
) -> None:
    """Raises ValueError for ids outside the vocabulary, a row without the end token it is to be read at, padding on the
    left. Its inputs are read from the device once.

    Args:
        is_end: (B, T) bool, where end-of-text tokens are. ends: (B,) index of the first one.
    """
    outside = (input_ids < 0) | (input_ids >= config.vocab_size)
    endless = ~is_end.any(dim=1)
    hidden_before_seen = torch.zeros_like(endless)
    if attention_mask is not None:
        seen = attention_mask.bool()
        if config.pooling_type == "eos":
            hidden_before_seen = ~seen.cumprod(dim=1).gather(1, ends[:, None]).bool()[:, 0]
        if config.reads_padding:
            hidden_before_seen = hidden_before_seen | (seen[:, 1:] & ~seen[:, :-1]).any(dim=1)
    problems = [outside.any(), hidden_before_seen.any()]
    if config.pooling_type == "eos":
        problems.append(endless.any())
    if not torch.stack(problems).any():
        return
    if outside.any():
        raise ValueError(
            f"input_ids must be in [0, vocab_size={config.vocab_size}), got {input_ids[outside][0].item()}; use the "
            "tokenizer of this checkpoint"
        )
    if config.pooling_type == "eos" and endless.any():
        raise ValueError(
            f"every row of input_ids needs its end-of-text token {config.eos_token_id}, row "
            f"{endless.int().argmax().item()} has none; tokenize with add_special_tokens=True and keep the last token"
        )
    raise ValueError(
        "attention_mask hides a token before one that it shows, or before a row's end-of-text token; pad on the right "
        "(padding_side='right')"
    )


def check_class_numbers(labels: Any, logits: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless `labels` are (B,) of integers, for logits (B, num_labels)."""
    batch, num_labels = logits.shape
    check_tensor("labels", labels, f"({batch},)", "make one of the class numbers: torch.tensor(labels)")
    if labels.shape != (batch,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be ({batch},) class numbers, got {tuple(labels.shape)} of {labels.dtype}; set "
            "config.problem_type for multi-label or regression targets"
        )


def check_class_values(labels: torch.Tensor, num_labels: int) -> None:
    """Raises ValueError for class numbers outside [0, num_labels) that are not IGNORED_LABEL."""
    outside = ((labels < 0) | (labels >= num_labels)) & (labels != IGNORED_LABEL)
    if outside.any():
        raise ValueError(
            f"labels must be in [0, num_labels={num_labels}), got {labels[outside][0].item()}; load the model with "
            "num_labels=... of your data set"
        )


def check_targets(labels: Any, logits: torch.Tensor, problem_type: str) -> torch.Tensor:
    """Targets of multi-label classification or regression in the shape of the logits (B, num_labels).

    Raises:
        TypeError, ValueError: no tensor, or another shape.
    """
    check_tensor("labels", labels, str(tuple(logits.shape)), "make one of the targets: torch.tensor(labels)")
    if labels.dim() == 1 and logits.shape[1] == 1:
        labels = labels[:, None]
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels for problem_type={problem_type!r} must be {tuple(logits.shape)}, got {tuple(labels.shape)}"
        )
    return labels


def check_multi_label_values(targets: torch.Tensor, known: torch.Tensor) -> None:
    """Raises ValueError for known targets outside [0, 1]."""
    outside = known & ((targets < 0) | (targets > 1))
    if outside.any():
        raise ValueError(
            "labels for problem_type='multi_label_classification' must be in [0, 1], one entry a class, or "
            f"{IGNORED_LABEL} or NaN where it is not known; got {targets[outside][0].item():g}; for class numbers set "
            "config.problem_type='single_label_classification'"
        )


def check_depth_labels(labels: Any, depth: torch.Tensor, pixel_mask: torch.Tensor | None) -> None:
    """Raises TypeError or ValueError unless `labels` are one map of real numbers for each map of depths (B, H, W)."""
    shape = f"(batch={depth.shape[0]}, height, width)"
    check_tensor("labels", labels, shape, "make one of the depth maps: torch.tensor(labels)")
    if labels.dim() != 3 or labels.shape[0] != depth.shape[0] or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be {shape} of numbers, one depth a pixel; got {tuple(labels.shape)} of {labels.dtype}"
        )
    if pixel_mask is not None and labels.shape != depth.shape:
        raise ValueError(
            f"labels of a batch with pixel_mask must have its height and width {tuple(depth.shape[1:])}, as "
            f"they are padded alike; got {tuple(labels.shape[1:])}"
        )


def check_masked_patches(bool_masked_pos: Any, batch: int, grid_size: tuple[int, int]) -> None:
    """Raises TypeError or ValueError unless the mask is (B, N) or (B, gh, gw)."""
    how = "give a tensor, or None to hide patches at random"
    check_tensor("bool_masked_pos", bool_masked_pos, "(batch, patches)", how)
    num_patches = grid_size[0] * grid_size[1]
    # Sizes of a graph are symbols, which comparing would tie to each other.
    if not is_traced() and tuple(bool_masked_pos.shape) not in ((batch, num_patches), (batch, *grid_size)):
        raise ValueError(
            f"bool_masked_pos must be (batch={batch}, patches={num_patches}) or (batch, {grid_size[0]}, "
            f"{grid_size[1]}), got {tuple(bool_masked_pos.shape)}"
        )


def check_group_ids(group_ids: Any, batch: int) -> None:
    """Raises TypeError or ValueError unless they are (B,) of int64."""
    check_tensor("group_ids", group_ids, f"({batch},)", "give one number a pair: torch.tensor(numbers)")
    if group_ids.shape != (batch,) or group_ids.dtype != torch.int64:
        raise ValueError(
            f"group_ids must be (batch={batch},) of torch.int64, one number a pair; got {tuple(group_ids.shape)} "
            f"of {group_ids.dtype}"
        )
