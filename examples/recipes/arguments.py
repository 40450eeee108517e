"""The command line of the recipes: what they all take beside TrainingArguments, and what is refused at once."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments, set_seed

from recipes.command import REPOSITORY, Parser

HELD_OUT_HELP = "share of the training split to hold out for --do_eval without a validation split, in (0, 1)"
SHIPPED_CHECKPOINT = str(REPOSITORY)
NUM_CHECKPOINTS = 2  # kept where --save_total_limit does not say
SHARED_MEMORY = 2**29  # bytes: three batches of 256 pictures of 224 pixels
# Endings of the names of metrics of which less is better.
ERRORS = ("loss", "abs_rel", "rmse", "log10", "mae", "cross_entropy")


@dataclass
class ModelArguments:
    """Which model to start from. What a recipe adds and names in CONFIG_FIELDS replaces that field of its config."""

    _argument_group_name = "model"
    CONFIG_FIELDS = ()

    model_name_or_path: str | None = field(default=None, metadata={"help": "checkpoint to start from"})
    config_name: str | None = field(default=None, metadata={"help": "config.json of a model to train from scratch"})
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "eager or sdpa; under bf16 on a CPU eager can be the faster one, time both"}
    )

    def config_fields(self) -> dict:
        """The fields of the config that the command line sets."""
        chosen = {name: getattr(self, name) for name in self.CONFIG_FIELDS}
        return {name: value for name, value in chosen.items() if value is not None}


@dataclass
class DataArguments:
    """Which pictures, and which part of them is for what."""

    _argument_group_name = "data"
    streaming = False  # for recipes that cannot

    dataset: str = field(metadata={"help": "a folder, a file, or a name on the Hub; docs/your-data.md has the layouts"})
    image_column: str | None = field(
        default=None,
        metadata={"help": "column of the pictures; default: the first of image, img, path, file_name, ..."},
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "folder that the paths in a table start at; default: found beside the table"}
    )
    separator: str | None = field(
        default=None,
        metadata={"help": "what separates the cells of a table, as '\\t'; default: found in its first line"},
    )
    check_only: bool = field(
        default=False, metadata={"help": "read, count and name the rows, draw some as the model sees them, and stop"}
    )
    train_split: str = field(default="train", metadata={"help": "split that is trained on"})
    validation_split: str = field(default="validation", metadata={"help": "split that picks the best checkpoint"})
    test_split: str = field(default="test", metadata={"help": "split for --do_predict, never seen before"})
    validation_share: float = field(default=0.1, metadata={"help": HELD_OUT_HELP})

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(f"expected --validation_share in (0, 1), got {self.validation_share}")

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, as the user gave them."""
        return (self.train_split, *self.validation_splits, self.test_split)

    @property
    def validation_splits(self) -> list[str]:
        """`validation_split`, of which a recipe may take several, as a list."""
        return [self.validation_split] if isinstance(self.validation_split, str) else list(self.validation_split)


@dataclass
class RecipeArguments:
    """What all recipes can do beside TrainingArguments."""

    _argument_group_name = "recipe"

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


def parse(*dataclasses: type, description: str | None = None) -> tuple:
    """Read the command line into `dataclasses`, RecipeArguments and TrainingArguments, start the log, set the seed.

    Raises:
        ValueError: training would write over a run, or an option lacks another one that it needs.
    """
    parser = Parser((*dataclasses, RecipeArguments, TrainingArguments), description)
    parser.set_defaults(save_total_limit=NUM_CHECKPOINTS, dataloader_num_workers=usual_workers())
    parsed = parser.parse()
    recipe, training = parsed[-2:]
    level = logging.INFO if training.process_index == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(message)s")
    is_check = any(getattr(arguments, "check_only", False) for arguments in parsed)
    if not (is_check or training.do_train or training.do_eval or training.do_predict):
        raise ValueError("nothing to do: give --do_train, --do_eval, --do_predict, or --check_only to look at the data")
    with training.main_process_first(local=False):
        if training.process_index == 0:
            check_output_dir(training)
    if recipe.early_stopping_patience is not None:
        check_early_stopping(training)
    if training.metric_for_best_model is not None and training.metric_for_best_model.endswith(ERRORS):
        training.greater_is_better = False  # transformers assumes that larger is better for all but the loss
    # Rows carry pictures, which no forward takes by name; the recipe turns them into what it takes.
    training.remove_unused_columns = False
    set_seed(training.seed)
    return parsed


def usual_workers() -> int:
    """How many processes read pictures while the model computes: one, as two cores have no use for more, where it is a
    fork, which starts at once, and batches have room on their way (Docker gives 64 MiB, where a worker dies of it)."""
    if multiprocessing.get_all_start_methods()[0] != "fork" or len(os.sched_getaffinity(0)) < 2:
        return 0
    shared_memory = Path("/dev/shm")
    return int(shared_memory.is_dir() and shutil.disk_usage(shared_memory).free > SHARED_MEMORY)


def check_output_dir(training: TrainingArguments) -> None:
    """ValueError where training would write over a run."""
    output_dir = Path(training.output_dir)
    used = output_dir.is_dir() and any(output_dir.iterdir())
    if training.do_train and not training.resume_from_checkpoint and used:
        raise ValueError(
            f"expected --output_dir {output_dir} to be empty, it is not; name another folder, or continue "
            "with --resume_from_checkpoint True"
        )


def check_early_stopping(training: TrainingArguments) -> None:
    """ValueError that names all that stopping at the best evaluation still needs."""
    strategies = {"--eval_strategy": training.eval_strategy, "--save_strategy": training.save_strategy}
    unset = [f"{name} epoch or steps" for name, strategy in strategies.items() if strategy == "no"]
    unset += ["--metric_for_best_model, e.g. loss"] if training.metric_for_best_model is None else []
    if unset or not training.load_best_model_at_end:
        unset += [] if training.load_best_model_at_end else ["--load_best_model_at_end True"]
        raise ValueError(f"--early_stopping_patience stops at the best evaluation; also set {', '.join(unset)}")
