"""What the training scripts of this folder share: arguments, data, a Trainer with layer-wise decay and pictures.

The loop, resuming, mixed precision, several processes and FSDP are transformers' and accelerate's own. What is drawn
at random while training belongs to a row and an epoch (`SeededRows`), not to a process or a worker, so that a run
that was killed and resumed, and one shared among processes, sees the same pictures as one that was neither. (The
contrastive recipe varies the pictures of a process's batch together: shared among processes, they vary otherwise.)
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
from PIL import Image
from transformers import EarlyStoppingCallback, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from vit_embed import VitEmbedForImageClassification, VitEmbedModel, VitEmbedTextModel
from vit_embed.contrastive_vit_embed import MAX_LOGIT_SCALE

logger = logging.getLogger("recipe")

NUM_NAMED = 10  # rows that the log names for each problem
# Parameters without weight decay: everything of a normalisation, and what has these words in its name.
NORM_LAYERS = (
    *(torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm),
    torch.nn.modules.batchnorm._BatchNorm,
)
NO_WEIGHT_DECAY = (r"bias", r"norm", r"logit_scale", r"layer_scale", r"class_embedding", r"_token(s)?$")
# Endings of the names of metrics of which less is better.
ERRORS = ("loss", "abs_rel", "rmse", "log10")
# What wrappers put in front of the names of a model's own parameters (peft, FSDP, torch.compile, DDP).
WRAPPER_NAMES = ("base_model.model.", "_fsdp_wrapped_module.", "_orig_mod.", "module.")


@dataclass
class RecipeArguments:
    """What all recipes can do beside TrainingArguments."""

    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "beginnings of names of parameters not to train, as in vision_model.embeddings"},
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "learning rate of a layer = --learning_rate * layer_decay ** (steps from it to the head), in "
            "(0, 1]; 0.65 to 0.9 keep a pretrained trunk close to where it was"
        },
    )
    patch_drop_rate: float | None = field(
        default=None,
        metadata={"help": "share in [0, 1) of the patches left out while training; default: the checkpoint's own"},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better --metric_for_best_model"}
    )

    channels_last: bool = field(
        default=False,
        metadata={
            "help": "lay out convolutions channels last: the same up to rounding, faster with a convolutional stem"
        },
    )

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"expected --layer_decay in (0, 1], got {self.layer_decay}; 1 trains all layers alike")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"expected --early_stopping_patience of at least 1, got {self.early_stopping_patience}")


def check_output_dir(training: TrainingArguments) -> None:
    """Raises ValueError where training would write over a run."""
    output_dir = Path(training.output_dir)
    used = output_dir.is_dir() and any(output_dir.iterdir())
    if training.do_train and not training.resume_from_checkpoint and used:
        raise ValueError(
            f"expected --output_dir {output_dir} to be empty, it is not; name another folder, or continue "
            "with --resume_from_checkpoint True"
        )


def parse(*dataclasses: type, description: str | None = None) -> tuple:
    """Read the command line into `dataclasses`, RecipeArguments and TrainingArguments, start the log, set the seed."""
    parser = HfArgumentParser((*dataclasses, RecipeArguments, TrainingArguments), description=description)
    parsed = parser.parse_args_into_dataclasses()
    recipe, training = parsed[-2:]
    level = logging.INFO if training.process_index == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(message)s")
    with training.main_process_first(local=False):
        if training.process_index == 0:
            check_output_dir(training)
    if recipe.early_stopping_patience is not None:
        strategies = {"--eval_strategy": training.eval_strategy, "--save_strategy": training.save_strategy}
        unset = [f"{name} epoch or steps" for name, strategy in strategies.items() if strategy == "no"]
        unset += ["--metric_for_best_model, e.g. loss"] if training.metric_for_best_model is None else []
        if unset or not training.load_best_model_at_end:
            unset += [] if training.load_best_model_at_end else ["--load_best_model_at_end True"]
            raise ValueError(f"--early_stopping_patience stops at the best evaluation; also set {', '.join(unset)}")
    if training.metric_for_best_model is not None and training.metric_for_best_model.endswith(ERRORS):
        training.greater_is_better = False  # transformers takes whatever is no loss for something to be large
    # Rows carry pictures, which no forward takes by name; the script turns them into what it takes.
    training.remove_unused_columns = False
    set_seed(training.seed)
    return parsed


# --- rows ---


def load_splits(path: str, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """Open a dataset by the reader that `datasets` has for it.

    Args:
        path: a folder written by `save_to_disk`, a folder of parquet files, of tar shards (WebDataset) or of pictures
            (with a folder for each label or with `metadata.jsonl`), one such file, or a name on the Hub.
        streaming: read rows as they are needed, with no copy in the cache.
    """
    location = Path(path)
    with PartialState().main_process_first():  # one process fills the cache, the others read it
        if (location / "dataset_dict.json").exists() or (location / "dataset_info.json").exists():
            saved = load_from_disk(path)
            splits = DatasetDict(train=saved) if isinstance(saved, Dataset) else saved
            if not streaming:
                return splits
            return IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in splits.items()})
        for suffix, reader in ((".parquet", "parquet"), (".tar", "webdataset")):
            if location.is_file() and location.suffix == suffix:
                return load_dataset(reader, data_files=path, streaming=streaming)
            if location.is_dir() and any(location.rglob(f"*{suffix}")):
                return load_dataset(reader, data_dir=path, streaming=streaming)
        if location.is_dir():
            return load_dataset("imagefolder", data_dir=path, streaming=streaming)
        if location.exists() or path.startswith((".", "/", "~")):
            raise ValueError(f"expected a folder, a .parquet or .tar file, or a name on the Hub, got {path}")
        return load_dataset(path, streaming=streaming)


class Problems:
    """Counts the rows with a problem by reason, and names the first ten of each in the log."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int | str]] = defaultdict(list)
        self.dropped: set[int | str] = set()

    def add(self, reason: str, row: int | str, drop: bool = True) -> None:
        """Note a row, and whether it is of no use."""
        self.rows[reason].append(row)
        if drop:
            self.dropped.add(row)

    def report(self, split: str, total: int) -> set[int | str]:
        """Log every reason and return the rows to drop of `total`; ValueError when none would be left."""
        for reason, rows in self.rows.items():
            more = " ..." if len(rows) > NUM_NAMED else ""
            logger.warning("split %s: %d rows with %s: %s%s", split, len(rows), reason, rows[:NUM_NAMED], more)
        if len(self.dropped) >= total:
            reasons = ", ".join(f"{len(rows)} with {reason}" for reason, rows in self.rows.items()) or "it is empty"
            raise ValueError(f"expected usable rows in split {split!r}, none of {total} are: {reasons}")
        logger.info("split %s: %d rows kept, %d dropped", split, total - len(self.dropped), len(self.dropped))
        return self.dropped


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Draw from python, numpy and torch as `key` says within, and as if nothing had been drawn afterwards."""
    words = np.random.SeedSequence([int(number) for number in key]).generate_state(3)
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would seed devices too, and takes 0.3 ms
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


class SeededRows(torch.utils.data.Dataset):
    """`make(rows[i])` with randomness that depends on the seed, the epoch and the row alone.

    RecipeTrainer tells it the epoch. Workers share that number with the process that started them.
    """

    def __init__(self, rows, make: Callable[[object], dict], seed: int) -> None:
        self.rows, self.make, self.seed = rows, make, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        with seeded(self.seed, int(self.epoch), row):
            return self.make(self.rows[row])


# --- model ---


def own_name(name: str) -> str:
    """The name that a parameter has in the model itself, without what peft, FSDP or DDP put before it."""
    for wrapper in WRAPPER_NAMES:
        name = name.replace(wrapper, "")
    return name


def towers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The image tower and, if there is one, the text tower."""
    return [module for module in model.modules() if isinstance(module, (VitEmbedModel, VitEmbedTextModel))]


def steps_to_head(model: torch.nn.Module) -> dict[torch.nn.Parameter, int]:
    """How many layers up the head is from each parameter of a tower: 0 behind the last layer, most in the stem.

    Differs from BEiT (arXiv:2106.08254) in nothing but the count of each tower by its own depth.
    """
    steps = {}
    for tower in towers_of(model):
        layers = tower.encoder.layers
        entrance = [tower.embeddings, getattr(tower, "pre_layrnorm", None)]
        parts = [(module, len(layers) + 1) for module in entrance if module is not None]
        parts += [(layer, len(layers) - index) for index, layer in enumerate(layers)]
        steps.update({parameter: count for module, count in parts for parameter in module.parameters()})
    return steps


def frozen_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The largest modules of which no parameter is trained.

    Embeddings count in parts: patches are dropped in front of a trained encoder, whether or not the stem is trained.
    """
    found = []
    for name, child in model.named_children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters) and name != "embeddings":
            found.append(child)
        else:
            found += frozen_modules(child)
    return found


def prepare(model: torch.nn.Module, recipe: RecipeArguments) -> None:
    """Freeze what `recipe.freeze` names, set the share of patches dropped, and lay out the weights."""
    names = {own_name(name): parameter for name, parameter in model.named_parameters()}
    for prefix in recipe.freeze:
        chosen = [parameter for name, parameter in names.items() if f"{name}.".startswith(prefix.rstrip(".") + ".")]
        if not chosen:
            known = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}
            near = difflib.get_close_matches(prefix, sorted(known), n=5, cutoff=0.3) or sorted(known)[:5]
            raise ValueError(f"--freeze {prefix}: no parameter has a name that begins so; near are {', '.join(near)}")
        for parameter in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ValueError(f"expected parameters to train, --freeze {' '.join(recipe.freeze)} leaves none")
    if recipe.patch_drop_rate is not None:
        _set_patch_drop_rate(model, recipe.patch_drop_rate)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # what a convolution gives takes the layout of its weight


def _set_patch_drop_rate(model: torch.nn.Module, rate: float) -> None:
    tower = next(tower for tower in towers_of(model) if isinstance(tower, VitEmbedModel))
    if rate and not any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError(f"--patch_drop_rate {rate} drops patches of a trunk in training, but this one is frozen")
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.device("meta"):  # the config and the class say what they cannot do with the rate
        type(own)(type(own.config).from_dict({**own.config.to_dict(), "patch_drop_rate": rate}))
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "patch_drop_rate"):
            config.patch_drop_rate = rate


class SetEpoch(TrainerCallback):
    """Tells rows which epoch they are drawn for."""

    def __init__(self, rows: SeededRows) -> None:
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.rows.set_epoch(int(state.epoch or 0))


class BoundLogitScale(TrainerCallback):
    """Keeps CLIP's logit_scale at ln 100 after every step, as OpenAI does.

    The model computes with no more than that in any case; so what is saved says what was computed with, to stock
    CLIPModel as well.
    """

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        for name, parameter in model.named_parameters():
            if own_name(name) == "logit_scale" and parameter.requires_grad:
                with torch.no_grad():
                    parameter.clamp_(max=MAX_LOGIT_SCALE)


class RecipeTrainer(Trainer):
    """The stock Trainer, with layer-wise learning rates and a picture behind every evaluation.

    Args:
        recipe: as parsed.
        draw: writes a picture of what an evaluation came to, to a path.
        kwargs: those of Trainer.
    """

    def __init__(
        self, recipe: RecipeArguments, draw: Callable[[EvalLoopOutput, Path], None] | None = None, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        own = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if self.args.label_smoothing_factor and not isinstance(own, VitEmbedForImageClassification):
            raise ValueError(
                f"--label_smoothing_factor {self.args.label_smoothing_factor} smooths class numbers, of which "
                f"{type(own).__name__} has none; leave it out"
            )
        if getattr(own, "logit_scale", None) is not None and own.logit_bias is None:
            self.add_callback(BoundLogitScale())
        self.recipe, self.draw = recipe, draw
        self.drawn: Path | None = None  # the last picture, until it is logged
        self._keep_scalars_whole()
        self.frozen = frozen_modules(self.model)
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(SetEpoch(self.train_dataset))
        if recipe.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(recipe.early_stopping_patience))

    def _keep_scalars_whole(self) -> None:
        """FSDP cannot shard a scalar, as logit_scale: each process keeps it whole.

        Its gradient is the same in every process, as the contrastive loss is that of the joined batch.
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        scalars = [parameter for parameter in self.model.parameters() if parameter.ndim == 0]
        if plugin is not None and plugin.ignored_modules is None and scalars:
            plugin.ignored_modules = [torch.nn.ParameterList(scalars)]

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As in Trainer, and what is frozen neither drops anything nor gathers statistics."""
        for module in self.frozen:
            module.eval()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer, but that what is saved last has the changes of peft merged into it and loads without peft."""
        model = self.accelerator.unwrap_model(self.model)
        if output_dir is not None or not hasattr(model, "merge_and_unload"):
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            copy.deepcopy(model).merge_and_unload().save_pretrained(self.args.output_dir)
            self.processing_class.save_pretrained(self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def get_decay_parameter_names(self, model) -> list[str]:
        return get_parameter_names(model, list(NORM_LAYERS), list(NO_WEIGHT_DECAY))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The optimizer of --optim, each of its groups split by the distance to the head."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.recipe.layer_decay != 1:
            steps = steps_to_head(self.model if model is None else model)
            groups = []
            for group in optimizer.param_groups:
                alike = defaultdict(list)
                for parameter in group["params"]:
                    alike[steps.get(parameter, 0)].append(parameter)
                for count, parameters in sorted(alike.items()):
                    rate = group["lr"] * self.recipe.layer_decay**count
                    groups.append({**group, "params": parameters, "lr": rate})
            optimizer.param_groups[:] = groups
        return optimizer

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.draw is not None and self.is_world_process_zero():
            path = Path(self.args.output_dir) / "pictures" / f"{metric_key_prefix}-{self.state.global_step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished.png")
            with matplotlib.rc_context({"text.parse_math": False}):  # names and captions may have dollars in them
                self.draw(output, unfinished)
            os.replace(unfinished, path)
            logger.info("wrote %s", path)
            self.drawn = path
        return output

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        self._show_on_tensorboard()
        return metrics

    def predict(self, *args, **kwargs) -> PredictionOutput:
        output = super().predict(*args, **kwargs)
        self._show_on_tensorboard()
        return output

    def _show_on_tensorboard(self) -> None:
        """Log what was drawn last. Behind the metrics, as the callback opens its file for those."""
        path, self.drawn = self.drawn, None
        writers = [getattr(callback, "tb_writer", None) for callback in self.callback_handler.callbacks]
        for writer in filter(None, writers if path is not None else ()):
            name, step = path.stem.rsplit("-", 1)
            pixels = np.asarray(Image.open(path).convert("RGB"))
            writer.add_image(f"pictures/{name}", pixels, int(step), dataformats="HWC")
            writer.flush()


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that was written to its end, which its trainer_state.json is; None if there is none."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        try:
            found.append((TrainerState.load_from_json(str(path / "trainer_state.json")).global_step, str(path)))
        except (OSError, ValueError):
            logger.warning("%s is unfinished, left out", path)
    return max(found, default=(0, None))[1]


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """What `--resume_from_checkpoint` names; for "True" the newest that was written to its end, if there is one."""
    if arguments.resume_from_checkpoint != "True":
        return arguments.resume_from_checkpoint
    checkpoint = last_complete_checkpoint(arguments.output_dir)
    logger.info("resume from %s", checkpoint or "the start: no checkpoint was written yet")
    return checkpoint


def run(trainer: RecipeTrainer, *, test_dataset=None, test_metrics: Callable | None = None) -> None:
    """Do what --do_train, --do_eval and --do_predict ask, and leave the model and its metrics in --output_dir."""
    arguments = trainer.args
    if arguments.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(arguments))
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("train", result.metrics)
    if arguments.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if arguments.do_predict:
        # predict, not evaluate: with persistent workers evaluate would read the validation split again.
        trainer.compute_metrics = test_metrics or trainer.compute_metrics
        metrics = trainer.predict(test_dataset).metrics
        trainer.log_metrics("test", metrics)
        trainer.save_metrics("test", metrics)
    if arguments.push_to_hub:
        trainer.push_to_hub()
