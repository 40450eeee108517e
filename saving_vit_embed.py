"""A checkpoint's folder: loading at another image size, and saving weights, code, config and processor whole or not
at all. The processors themselves are transformers'.
"""

import copy
import json
import logging
import math
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import PretrainedConfig

from .card_vit_embed import CARD_FILE, LICENCE_FILES, NOTICE_FILES, card_metadata, model_card
from .configuration_vit_embed import VitEmbedConfig, as_size, reject_misspelled

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
# transformers 5 saves a CLIPProcessor's image processor inside this one.
PROCESSOR_FILE = "processor_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG_FILE,
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.txt",
)

# What tells sentence-transformers (6 or newer) how to get the vector of a picture or a text.
MODULES_FILE, SENTENCE_FILE = "modules.json", "sentence_bert_config.json"
SENTENCE_SETTINGS = {"transformer_task": "feature-extraction", "module_output_name": "sentence_embedding"}
SENTENCE_MODULE = "sentence_transformers.base.modules.transformer.Transformer"

# What goes along with weights and is not made of them: what a repository has of it stays.
COMPANIONS = (
    *(IMAGE_PROCESSOR_FILE, PROCESSOR_FILE, MODULES_FILE, SENTENCE_FILE),
    *(*TOKENIZER_FILES, *LICENCE_FILES, *NOTICE_FILES),
)

# Where a checkpoint is read from, among the keywords of `from_pretrained`.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What `save_pretrained(push_to_hub=True)` and `push_to_hub` say of the repository and the commit.
REPO_OPTIONS = ("private", "token")
COMMIT_OPTIONS = ("commit_message", "commit_description", "create_pr", "revision")
PUSH_OPTIONS = ("repo_id", "tags", *REPO_OPTIONS, *COMMIT_OPTIONS)

# OpenAI's statistics of its training images (the `_transform` of its reference code).
CLIP_IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
DEPTH_PROCESSOR = "DPTImageProcessor"
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


# --- image processors -------------------------------------------------------------------------------------------------


def image_processor_dict(config: VitEmbedConfig, image_processor_type: str) -> dict[str, Any]:
    """What `preprocessor_config.json` of a model says when there is no source to take it from.

    Args:
        config: gives the size in pixels and the patch.
        image_processor_type: "CLIPImageProcessor" resizes the shorter side and crops the centre as CLIP does (a
            rectangular model resizes to its size without a crop); "DPTImageProcessor" resizes to the size, as depth
            labels must not be cropped away.
    """
    height, width = config.image_shape
    result = {
        "image_processor_type": image_processor_type,
        # DPTImageProcessor's own default leaves greyscale and alpha in; its transformers 4 version has no such step.
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": BICUBIC,
        "size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_IMAGE_MEAN,
        "image_std": CLIP_IMAGE_STD,
    }
    if image_processor_type == DEPTH_PROCESSOR:
        return {
            **result,
            "do_pad": False,
            "keep_aspect_ratio": False,
            "ensure_multiple_of": math.lcm(*config.patch_shape),
        }
    result.update(do_center_crop=height == width, crop_size={"height": height, "width": width})
    if height == width:
        result["size"] = {"shortest_edge": height}
    if config.text_config is not None:
        result["processor_class"] = "CLIPProcessor"
    return result


def image_processor_kind(source: dict[str, Any]) -> str:
    """The stock class that a `preprocessor_config.json` names, without the suffixes of its backends; "" for none."""
    kind = source.get("image_processor_type", source.get("feature_extractor_type"))
    if not isinstance(kind, str):
        return ""
    return kind.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def edge_of(size: Any) -> int | None:
    """The one number of a size in any of transformers' forms; None for a rectangle or no size."""
    if isinstance(size, dict):
        edges = set(size.values()) if "shortest_edge" not in size else {size["shortest_edge"]}
        return edges.pop() if len(edges) == 1 else None
    return size if isinstance(size, int) else None


def resized(source: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """An image processor with the sizes of `own`, and all else as it is. A margin around the crop keeps its share."""
    if "crop_size" not in source and "height" in (source.get("size") or {}):  # resizes to the size, without a crop
        return {**source, "size": own.get("crop_size", own["size"])}
    result = {**source, "size": own["size"]}
    if "crop_size" not in own:
        return result
    result.update(crop_size=own["crop_size"], do_center_crop=own["do_center_crop"])
    size, crop, new_crop = (edge_of(each) for each in (source.get("size"), source.get("crop_size"), own["crop_size"]))
    if size and crop and new_crop and source.get("do_center_crop", True):
        result["size"] = {"shortest_edge": round(size * new_crop / crop)}
    return result


def carried_image_processor(source: dict[str, Any], own: dict[str, Any], same_image_size: bool) -> dict[str, Any]:
    """The source's image processor as a model with the image processor `own` needs it.

    Of the same kind, or of one that it does not name, it is the source's, at its size where the model has kept its
    `image_size`, which need not be the processor's (DINOv2: positions for 518 pixels, images of 224). Of another kind,
    its mean and deviation in `own`.
    """
    if image_processor_kind(source) not in ("", own["image_processor_type"]):
        return {**own, **{name: source[name] for name in ("image_mean", "image_std") if name in source}}
    # OpenAI's repos name neither: transformers 4.25 had another field, and their model type says the rest.
    named = {name: own[name] for name in ("image_processor_type", "processor_class") if name in own}
    carried = {**named, **source}
    carried.pop("feature_extractor_type", None)
    if "processor_class" not in own:
        carried.pop("processor_class", None)
    has_own_size = same_image_size or edge_of(source.get("crop_size", source.get("size"))) == edge_of(
        own.get("crop_size", own["size"])
    )
    return carried if has_own_size else resized(carried, own)


# --- what lies in a folder --------------------------------------------------------------------------------------------


def read_json(folder: str | None, name: str) -> dict[str, Any]:
    """The content of a file of a folder, {} where there is none."""
    path = os.path.join(folder or "", name)
    if folder is None or not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def image_processor_in(folder: str | None) -> dict[str, Any]:
    """The image processor of a folder, as AutoProcessor reads it; {} where there is none."""
    return read_json(folder, PROCESSOR_FILE).get("image_processor") or read_json(folder, IMAGE_PROCESSOR_FILE)


def image_size_in(folder: str | None) -> Any:
    """`image_size` of a folder's config.json, ours or CLIP's; None where it does not say."""
    config = read_json(folder, CONFIG_FILE)
    towers = (config.get(name) for name in ("vision_config_dict", "vision_config"))
    return as_size(next((each["image_size"] for each in (config, *towers) if each and "image_size" in each), None))


def with_tokenizer_class(content: bytes | None) -> bytes:
    """A `tokenizer_config.json` that names its class, which CLIP's own (of OpenAI's repos) leaves to the model type."""
    stated = {} if content is None else json.loads(content)
    if "tokenizer_class" in stated:
        return content
    return (json.dumps({**stated, "tokenizer_class": "CLIPTokenizer"}, indent=2) + "\n").encode()


def as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def image_processor_files(
    config: VitEmbedConfig, kind: str, architecture: str, source: str | None, target: str
) -> dict[str, bytes]:
    """{name: content} of the image processor that belongs into `target`.

    What is there already is somebody's choice, and what the checkpoint came with belongs to its weights: either keeps
    its mean, deviation and all else, and follows the size of the model.

    Args:
        kind: the image processor's class. architecture: the model's class.
        source: the folder that the model was loaded from, or None. target: the one that it is saved to.
    """
    own = image_processor_dict(config, kind)
    there, result = image_processor_in(target), own
    for folder, found in ((target, there), (source, image_processor_in(source))):
        if not found:
            continue
        saved_by = read_json(folder, CONFIG_FILE).get("architectures") or [architecture]
        # Somebody's choice for this class, or for one that reads pictures as it does: depth alone takes no crop.
        found_kind = image_processor_kind(found)
        if found_kind and (saved_by == [architecture] or (found_kind == DEPTH_PROCESSOR) == (kind == DEPTH_PROCESSOR)):
            own = {**own, "image_processor_type": found_kind}
        result = carried_image_processor(found, own, image_size_in(folder) == config.image_size)
        break
    files = {IMAGE_PROCESSOR_FILE: as_json(result)}
    if whole := read_json(target, PROCESSOR_FILE):  # the Auto classes read this one first
        nested = {name: value for name, value in result.items() if name != "processor_class"}
        files[PROCESSOR_FILE] = as_json({**whole, "image_processor": nested})
    return files


def carried_files(patterns: tuple[str, ...], source: str | None, target: str) -> dict[str, bytes]:
    """{name: content} of the source's files of these names, where the target has none of them."""

    def found_in(folder: str) -> list[Path]:
        return [path for pattern in patterns for path in sorted(Path(folder).glob(pattern)) if path.is_file()]

    if source is None or found_in(target):
        return {}
    return {path.name: path.read_bytes() for path in found_in(source)}


def tokenizer_files(source: str | None, target: str) -> dict[str, bytes]:
    """{name: content} of the source's tokenizer, where the target has none."""
    files = carried_files(TOKENIZER_FILES, source, target)
    if files and read_json(source, CONFIG_FILE).get("model_type") == "clip":
        files[TOKENIZER_CONFIG_FILE] = with_tokenizer_class(files.get(TOKENIZER_CONFIG_FILE))
    return files


def sentence_files(model_class: Any, target: str) -> dict[str, bytes]:
    """{name: content} of what sentence-transformers reads, where the target has none: pictures and texts give what
    `get_image_features` and `get_text_features` give, and of a class without them the pooled vector."""
    there = read_json(target, SENTENCE_FILE)
    if os.path.exists(os.path.join(target, MODULES_FILE)) and there.keys() != {*SENTENCE_SETTINGS, "modality_config"}:
        return {}  # sentence-transformers' own, or somebody's; those that we wrote follow the class
    methods = {"text": "get_text_features", "image": "get_image_features"}
    found = {
        modality: {"method": method, "method_output_name": None}
        for modality, method in methods.items()
        if hasattr(model_class, method)
    }
    modality = "text" if model_class.image_processor_type is None else "image"
    pooled = {modality: {"method": "forward", "method_output_name": "pooler_output"}}
    settings = {**SENTENCE_SETTINGS, "modality_config": found or pooled}
    modules = [{"idx": 0, "name": "0", "path": "", "type": SENTENCE_MODULE}]
    return {MODULES_FILE: as_json(modules), SENTENCE_FILE: as_json(settings)}


def processor_folder(source: str, hub_options: dict[str, Any]) -> str | None:
    """A local folder with what goes with the weights of a checkpoint (processor, licence, card): the checkpoint's own,
    or what the Hub has of it.

    They are fetched when the model is, so that saving it asks nobody.
    """
    subfolder = hub_options.get("subfolder") or ""
    if os.path.isdir(source):
        return os.path.abspath(os.path.join(source, subfolder))
    names = (
        CONFIG_FILE,
        IMAGE_PROCESSOR_FILE,
        PROCESSOR_FILE,
        CARD_FILE,
        *LICENCE_FILES,
        *NOTICE_FILES,
        *TOKENIZER_FILES,
    )
    patterns = [os.path.join(subfolder, name) for name in names]
    options = {
        name: hub_options[name]
        for name in ("cache_dir", "local_files_only", "revision", "token")
        if name in hub_options
    }
    try:
        return os.path.join(snapshot_download(source, allow_patterns=patterns, **options), subfolder)
    except (OSError, HfHubHTTPError, ValueError) as error:
        logger.warning(
            "the processor of %s could not be fetched (%s): where this model is saved, the image processor will have "
            "CLIP's mean and standard deviation and there will be no tokenizer; save its processor there yourself",
            source,
            error,
        )
        return None


# --- writing ----------------------------------------------------------------------------------------------------------

SHARD = re.compile(r"(model(?:\.[^-.]+)?)-\d{5}-of-\d{5}\.safetensors")


@contextmanager
def aside(folder: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
    """A new folder inside `folder`, whose files take their places there at the end; after an error none does.

    Yields:
        its path, and a list of the names that is filled at the end.
    """
    os.makedirs(folder, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=".saving-", dir=folder)
    names: list[str] = []
    try:
        yield unfinished, names
        names += sorted(os.listdir(unfinished))
        # The config last: a folder without one is no checkpoint.
        for name in sorted(names, key=lambda name: name == CONFIG_FILE):
            os.replace(os.path.join(unfinished, name), os.path.join(folder, name))
        remove_stale_weights(folder, names)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_stale_weights(folder: str | os.PathLike, names: list[str]) -> None:
    """Removes shards of an earlier save that the new one, in other pieces, has left; transformers does so as well."""
    stems = {name.partition("-")[0].removesuffix(".safetensors") for name in names if name.endswith(".safetensors")}
    for name in os.listdir(folder):
        shard = SHARD.fullmatch(name)
        index = name.removesuffix(".safetensors.index.json") if name.endswith(".index.json") else None
        if name not in names and ((shard and shard[1] in stems) or index in stems):
            os.remove(os.path.join(folder, name))


def write_files(folder: str | os.PathLike, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)


def fetch_companions(repo_id: str, folder: str, options: dict[str, Any]) -> set[str]:
    """Fetches COMPANIONS and card of a repository into a folder; their names, none for a new repository."""
    access = {"revision": options.get("revision"), "token": options.get("token")}
    if "/" not in repo_id:
        repo_id = f"{HfApi(token=access['token']).whoami()['name']}/{repo_id}"
    try:
        snapshot_download(repo_id, local_dir=folder, allow_patterns=[*COMPANIONS, CARD_FILE], **access)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return set()
    shutil.rmtree(os.path.join(folder, ".cache"), ignore_errors=True)
    found = set(os.listdir(folder))
    # The two go together: beside somebody's modules our settings would be read as theirs.
    return found | {SENTENCE_FILE} if MODULES_FILE in found else found


def push(model: Any, folder: str | os.PathLike, names: list[str], repo_id: str, options: dict[str, Any]) -> CommitInfo:
    """Uploads files of a folder to the Hub, in one commit, with a card where neither the folder nor the repository has
    one."""
    api = HfApi(token=options.get("token"))
    repo_id = api.create_repo(
        repo_id, exist_ok=True, **{name: options[name] for name in REPO_OPTIONS if name in options}
    ).repo_id
    revision = options.get("revision")
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = {name: options[name] for name in COMMIT_OPTIONS if options.get(name) is not None}
    commit = {"commit_message": "Upload model", **commit}
    files: dict[str, str | bytes] = {name: os.path.join(folder, name) for name in names}
    card = os.path.join(folder, CARD_FILE)
    if CARD_FILE not in files and not api.file_exists(repo_id, CARD_FILE, revision=revision):
        written = model_card(model, repo_id, card_metadata(model._processor_folder), options.get("tags")).encode()
        files[CARD_FILE] = card if os.path.exists(card) else written
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    return api.create_commit(repo_id, operations, **commit)


def other_parts(*names: str) -> list[str]:
    """Patterns of the weights that a class leaves in the checkpoints of others: parts of a model by name, and the
    tables of place numbers that CLIP's checkpoints of transformers < 4.31 carry."""
    return [r"embeddings\.position_ids$", *(rf"^{name}(\.|$)" for name in names)]


# Every model that a constructor has made, towers included: several may hold one config object.
MADE: weakref.WeakSet[Any] = weakref.WeakSet()


class CheckpointMixin:
    """Of a model class: how its checkpoint is loaded and saved."""

    config: Any
    config_class: Any
    # The class of the image processor that belongs to the model; None for a model without images.
    image_processor_type: str | None = "CLIPImageProcessor"
    has_text_tower = False
    # The folder with the processor files of the checkpoint that this model came from.
    _processor_folder: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PretrainedConfig | str | os.PathLike | None = None,
        **kwargs,
    ):
        """As in transformers; the processor files of the checkpoint are remembered, to be saved with the model."""
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        reject_misspelled(kwargs, cls.config_class.field_names, cls.__name__)
        if isinstance(config, (str, os.PathLike)):
            config = cls.config_class.from_pretrained(config)
        loaded = cls._load(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            folder = processor_folder(os.fspath(pretrained_model_name_or_path), hub_options)
            for module in model.modules():
                if isinstance(module, CheckpointMixin):  # a tower may be saved by itself
                    module._processor_folder = folder
        return loaded

    @classmethod
    def _load(cls, *args, **kwargs):
        """transformers' own loading."""
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, **kwargs) -> None:
        """As in transformers, and the folder is complete: code, the whole auto_map, a processor, what
        sentence-transformers reads, and the licence that came with the weights.

        The processor is the one that lies in the folder, else that of the checkpoint that this model was loaded from,
        else an image processor with CLIP's mean and standard deviation; it follows `config.image_size`. What is
        written takes the place of what was there when all of it is written. With `push_to_hub` it is then pushed, to
        `repo_id` or else the name of the folder.
        """
        options = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        repo_id = options.pop("repo_id", None) or os.path.basename(os.path.abspath(save_directory))
        names = self._save(save_directory, repo_id, *args, **kwargs)
        if push_to_hub and names:
            with tempfile.TemporaryDirectory() as folder:
                there = fetch_companions(repo_id, folder, options)
            self._push(save_directory, [name for name in names if name not in there], repo_id, options)

    def push_to_hub(self, repo_id: str, **kwargs) -> CommitInfo:
        """As in transformers: saves to a folder that is gone afterwards, and pushes that, with a card where the
        repository has none."""
        options = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            fetch_companions(repo_id, folder, options)
            return self._push(folder, self._save(folder, repo_id, **kwargs), repo_id, options)

    def _save(self, save_directory: str | os.PathLike, card_name: str, *args, **kwargs) -> list[str]:
        """Saves; the names of the files, none where other processes than this one write them. A card is written where
        there is a licence to pass on, under this name."""
        with self._saved_config():
            # Other processes than the main one take part in gathering weights, and write nothing of ours.
            if not kwargs.get("is_main_process", True) or kwargs.get("distributed_checkpoint"):
                super().save_pretrained(save_directory, *args, **kwargs)
                return []
            with aside(save_directory) as (unfinished, names):
                super().save_pretrained(unfinished, *args, **kwargs)
                target, source = os.fspath(save_directory), self._source_of_processor(save_directory)
                write_files(unfinished, self._processor_files(source, target))
                for patterns in (LICENCE_FILES, NOTICE_FILES):
                    write_files(unfinished, carried_files(patterns, source, target))
                metadata = card_metadata(source)
                if "license" in metadata and not os.path.exists(os.path.join(target, CARD_FILE)):
                    write_files(unfinished, {CARD_FILE: model_card(self, card_name, metadata).encode()})
                write_files(unfinished, sentence_files(type(self), target))
            return names

    def _push(self, folder: str | os.PathLike, names: list[str], repo_id: str, options: dict[str, Any]) -> CommitInfo:
        with self._saved_config():
            return push(self, folder, names, repo_id, options)

    def save_processor(self, save_directory: str | os.PathLike) -> None:
        """Writes the processor alone, as `save_pretrained` does: `AutoProcessor.from_pretrained` reads it there."""
        target = os.fspath(save_directory)
        with aside(save_directory) as (unfinished, _):
            write_files(unfinished, self._processor_files(self._source_of_processor(target), target))

    @contextmanager
    def _saved_config(self) -> Iterator[None]:
        """The config of what is saved: without a text tower where the class has none, so that no Auto class expects
        one."""
        config = self.config
        if self.image_processor_type is not None and not self.has_text_tower:
            self.config = config.vision_only()
        try:
            yield
        finally:
            self.config = config

    def _source_of_processor(self, target: str | os.PathLike) -> str | None:
        """The folder of the checkpoint that this model came from; None, with a warning, where it is gone."""
        source = self._processor_folder
        if source is not None and not os.path.isdir(source):
            logger.warning(
                "%s, which this model was loaded from, is gone: %s gets an image processor with CLIP's mean and "
                "standard deviation and no tokenizer, unless it has its own; save the processor there yourself",
                source,
                target,
            )
            return None
        return source

    def _processor_files(self, source: str | None, target: str) -> dict[str, bytes]:
        """{name: content} of the processor that belongs into `target`."""
        files = {}
        if self.image_processor_type is not None:
            kind, architecture = self.image_processor_type, type(self).__name__
            files.update(image_processor_files(self.config, kind, architecture, source, target))
        if self.has_text_tower:
            files.update(tokenizer_files(source, target))
        return files


class ImageCheckpointMixin(CheckpointMixin):
    """Of a class with an image tower: how its checkpoint is loaded at another image size."""

    trunk: Any

    @classmethod
    def _load(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PretrainedConfig | None = None,
        image_size: int | tuple[int, int] | None = None,
        **kwargs,
    ):
        """With another `image_size`, given here or in `config`, than the checkpoint's, the model is loaded at the
        checkpoint's and its position table is then resampled; nothing is re-initialised.

        Raises:
            ValueError: `image_size` is not a multiple of the patch, or the table is offloaded.
        """
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        merge_size = kwargs.pop("token_merge_size", None) if image_size is not None else None
        # As remote code the config's class may come from another copy of the file than the one imported here.
        if isinstance(config, PretrainedConfig) and pretrained_model_name_or_path is not None:
            image_size = config.image_size if image_size is None else image_size
            # Saved beside the weights, so it says what shape they have; absent where only weights were given.
            try:
                stored = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub_options)
            except OSError:
                stored = config
            if stored.patch_shape == config.patch_shape:
                config = copy.deepcopy(config)
                # What may merge is held against the size asked for, below.
                merge_size = config.token_merge_size if merge_size is None else merge_size
                config.image_size, config.token_merge_size = stored.image_size, 0
        loaded = super()._load(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if image_size is not None:
            model.set_image_size(image_size)
        if merge_size is not None:
            model.config.token_merge_size = merge_size
            model.config.validate_architecture()
        return loaded

    def set_image_size(self, image_size: int | tuple[int, int]) -> None:
        """Makes (height, width) in pixels the native size: a learned position table is resampled to its grid, in place.

        Raises:
            ValueError: a side is not a multiple of the patch, and `pad_to_patch` is not set; or the table is offloaded.
        """
        changed = copy.deepcopy(self.config)
        changed.image_size = as_size(image_size)
        changed.validate_architecture()
        embeddings = self.trunk.embeddings
        if changed.grid_size != self.config.grid_size:
            if embeddings.has_offloaded_positions:
                raise ValueError(
                    f"image_size={image_size!r} resamples the position table, which device_map has offloaded; save it "
                    "at this size first (from_pretrained(..., image_size=...).save_pretrained(folder)) and load that "
                    "folder, or keep vision_model.embeddings on a device"
                )
            embeddings.resize_positions(changed.grid_size)
        self._part_config()
        self.config.image_size = changed.image_size

    def _part_config(self) -> None:
        """Leaves a copy of the config to the models that hold the same object and are neither parts of this one nor
        have it as a part.

        They take the copy, as what this model is a part of (a dense model of transformers, say) holds the object, too.
        """
        config = self.config
        models = [model for model in list(MADE) if model.config is config]
        together = {module for model in models if self in model.modules() for module in model.modules()}
        copied = copy.copy(config)  # not deep: its text_config is that of the text tower
        for model in models:
            if model in together:
                continue
            for module in model.modules():
                if getattr(module, "config", None) is config:
                    module.config = copied
