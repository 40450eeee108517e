"""The stock Trainer with what the recipes share: learning rates by layer, sheets, and resuming after a kill.

The loop, resuming, mixed precision, several processes and FSDP are transformers' and accelerate's own. What is drawn
at random while training belongs to a row and an epoch (`recipes.data.SeededRows`), not to a process or a worker, so
that a run that was killed and resumed sees the same pictures as one that was not. So do several processes together,
but for recipes that vary the pictures of a process's batch together (contrastive, masked).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.distributed.fsdp import FSDPModule
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from recipes.arguments import RecipeArguments
from recipes.card import Base, write_model_card
from recipes.data import Report, SeededRows
from recipes.models import base_model_of, frozen_modules, own_name, steps_to_head
from vit_embed import VitEmbedForImageClassification
from vit_embed.contrastive_vit_embed import MAX_LOGIT_SCALE

logger = logging.getLogger(__name__)

# Parameters without weight decay: everything of a normalisation, and what has these words in its name.
NORM_LAYERS = (
    *(torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm),
    torch.nn.modules.batchnorm._BatchNorm,
)
NO_WEIGHT_DECAY = (r"bias", r"norm", r"logit_scale", r"layer_scale", r"class_embedding", r"_token(s)?$")


def asks_for_fsdp(training: TrainingArguments) -> bool:
    """Whether --fsdp or the config of `accelerate launch` asks for it."""
    return bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class SetEpoch(TrainerCallback):
    """Sets the epoch that rows are drawn for."""

    def __init__(self, rows: SeededRows) -> None:
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.rows.set_epoch(int(state.epoch or 0))


class BoundLogitScale(TrainerCallback):
    """Clamps CLIP's logit_scale to ln 100 after every step, as OpenAI does.

    The model computes with no more than that in any case; so stock CLIPModel, which does not, computes the same with
    what is saved.
    """

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        for name, parameter in model.named_parameters():
            if own_name(name) == "logit_scale" and parameter.requires_grad:
                with torch.no_grad():
                    parameter.clamp_(max=MAX_LOGIT_SCALE)


def unsharded_class(model: torch.nn.Module) -> type[torch.nn.Module]:
    """The model's class; FSDP 2 puts a class of its own in front of it."""
    return next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))


class RecipeTrainer(Trainer):
    """The stock Trainer, with layer-wise learning rates and a sheet of pictures after every evaluation.

    Args:
        recipe: as parsed.
        draw: writes a sheet of an evaluation to a path, in the main process.
        compute: prefix of the metrics -> what `draw` gets in place of the evaluation's output; called in every process,
            as the parts of a sharded model compute together.
        data: folder or Hub id of the data set, for the model card.
        report: what was found about its rows, for the card and the last line of the log.
        kwargs: those of Trainer.

    Raises:
        ValueError: --label_smoothing_factor for a model without class numbers; --prediction_loss_only with a metric to
            choose the best by; FSDP where accelerate does not shard.
    """

    def __init__(
        self,
        recipe: RecipeArguments,
        draw: Callable[[EvalLoopOutput, Path], None] | None = None,
        compute: Callable[[str], object] | None = None,
        data: str = "",
        report: Report | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        own = base_model_of(self.model)
        best_by = self.args.metric_for_best_model
        if self.args.prediction_loss_only and best_by is not None and not best_by.endswith("loss"):
            raise ValueError(
                f"--prediction_loss_only leaves out all metrics, got --metric_for_best_model {best_by}; drop one"
            )
        if self.args.label_smoothing_factor and not isinstance(own, VitEmbedForImageClassification):
            raise ValueError(
                f"--label_smoothing_factor {self.args.label_smoothing_factor} smooths class numbers, of which "
                f"{type(own).__name__} has none; leave it out"
            )
        self._prepare_fsdp()
        if getattr(own, "logit_scale", None) is not None and own.logit_bias is None:
            self.add_callback(BoundLogitScale())
        self.recipe, self.draw, self.compute, self.data, self.report = recipe, draw, compute, data, report or Report()
        self.base = Base.of(own) if self.is_world_process_zero() else None
        self.results: dict[str, dict[str, float]] = {}  # metrics of the splits evaluated last, for the model card
        self.drawn: Path | None = None  # the last sheet, until it is logged
        self.frozen = frozen_modules(self.model)
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(SetEpoch(self.train_dataset))
        if recipe.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(recipe.early_stopping_patience))

    def _prepare_fsdp(self) -> None:
        """Settings of accelerate's FSDP that these models need; ValueError where FSDP is asked for and is not there.

        accelerate shards on accelerators only; on CPUs it would run DistributedDataParallel without a word.
        """
        if asks_for_fsdp(self.args) and not self.is_fsdp_enabled:
            raise ValueError(
                f"expected accelerators for FSDP, got {self.accelerator.distributed_type} on {self.args.device}, where "
                "accelerate does not shard; drop --fsdp, or use a launcher config without it"
            )
        if not self.is_fsdp_enabled:
            return
        plugin, model = self.accelerator.state.fsdp_plugin, self.model
        # A scalar such as logit_scale cannot be sharded: each process keeps it whole. Its gradient is the same in every
        # process, as the contrastive loss is that of the joined batch.
        scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
        if plugin.ignored_modules is None and scalars:
            plugin.ignored_modules = [torch.nn.ParameterList(scalars)]
        # accelerate 1.15 shards the input embeddings by themselves, which fails if what holds them was sharded before.
        if plugin.transformer_cls_names_to_wrap is None:
            inputs = model.get_input_embeddings()
            holders = {type(module).__name__ for module in model.modules() if inputs in list(module.modules())[1:]}
            plugin.transformer_cls_names_to_wrap = sorted(set(model._no_split_modules) - holders)

    # --- training ---

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As in Trainer, and what is frozen neither drops anything nor gathers statistics."""
        for module in self.frozen:
            module.eval()
        return super().compute_loss(model, inputs, *args, **kwargs)

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer, but what is saved last has the changes of peft merged into it and loads without peft."""
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, FSDPModule):
            # transformers copies the file that defines the class; that of a sharded model's class is torch's.
            type(model).__module__ = unsharded_class(model).__module__
        if output_dir is not None or not hasattr(model, "merge_and_unload"):
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            copy.deepcopy(model).merge_and_unload().save_pretrained(self.args.output_dir)
            self.processing_class.save_pretrained(self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes README.md and the licence files of the base to the output folder; `push_to_hub` calls it, too."""
        if self.is_world_process_zero():
            model = base_model_of(self.accelerator.unwrap_model(self.model))
            own_class = unsharded_class(model)
            steps, notes = self.state.global_step, self.report.notes()
            write_model_card(model, own_class, self.base, self.data, self.args, steps, self.results, notes)

    def lost_rows(self, rows: object) -> np.ndarray:
        """(rows,) which rows of a data set could not be read any more, in any process; empty where that is not kept."""
        lost = getattr(rows, "lost", torch.zeros(0, dtype=torch.bool))
        return self.accelerator.reduce(lost.int().to(self.accelerator.device)).bool().cpu().numpy()

    def num_lost(self, rows: object) -> int:
        return int(self.lost_rows(rows).sum())

    # --- evaluation ---

    @contextlib.contextmanager
    def _every_row_once(self) -> Iterator[None]:
        """--dataloader_drop_last and --train_sampling_strategy are for training; evaluation reads all rows in order."""
        meanwhile = {"dataloader_drop_last": False, "train_sampling_strategy": "random"}
        before = {name: getattr(self.args, name) for name in meanwhile if hasattr(self.args, name)}
        vars(self.args).update({name: meanwhile[name] for name in before})
        try:
            yield
        finally:
            vars(self.args).update(before)

    def get_eval_dataloader(self, *args, **kwargs):
        with self._every_row_once():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs):
        with self._every_row_once():
            return super().get_test_dataloader(*args, **kwargs)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        shown = output if self.compute is None else self.compute(metric_key_prefix)
        if self.draw is not None and self.args.prediction_loss_only:
            logger.info("--prediction_loss_only: neither metrics nor pictures of this evaluation")
        elif self.draw is not None and self.is_world_process_zero():
            path = Path(self.args.output_dir) / "pictures" / f"{metric_key_prefix}-{self.state.global_step:06d}.png"
            self.draw(shown, path)
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
        """Log the sheet drawn last. After the metrics, for which the callback opens its file."""
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


def run(
    trainer: RecipeTrainer,
    *,
    test_dataset=None,
    test_metrics: Callable | None = None,
    write_predictions: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> None:
    """Do what --do_train, --do_eval and --do_predict ask, and leave the model and its metrics in --output_dir.

    Args:
        write_predictions: gets the model's outputs for `test_dataset`, and which of its rows could not be read.
    """
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
        trainer.results["eval"] = metrics
    if arguments.do_predict:
        # predict, not evaluate: with persistent workers evaluate would read the validation split again.
        trainer.compute_metrics = test_metrics or trainer.compute_metrics
        output = trainer.predict(test_dataset)
        metrics, lost = output.metrics, trainer.lost_rows(test_dataset)
        if write_predictions is not None and trainer.is_world_process_zero():
            write_predictions(output.predictions, lost)
        trainer.log_metrics("test", metrics)
        trainer.save_metrics("test", metrics)
        trainer.results["test"] = metrics
    if arguments.do_train:
        trainer.create_model_card()
    if arguments.push_to_hub:
        trainer.push_to_hub()
    log_end(trainer, [trainer.train_dataset, trainer.eval_dataset, test_dataset])


def log_end(trainer: RecipeTrainer, datasets: list) -> None:
    """The last line of the log: where the result is, and how many rows it is without."""
    flat = [part for rows in datasets for part in (rows.values() if isinstance(rows, dict) else [rows])]
    lost = sum(trainer.num_lost(rows) for rows in {id(rows): rows for rows in flat}.values())
    left_out = trainer.report.num_left_out()
    level = logging.WARNING if lost else logging.INFO
    logger.log(
        level,
        "done: %s; %d rows were left out before the first step, %d could not be read later",
        trainer.args.output_dir,
        left_out,
        lost,
    )
