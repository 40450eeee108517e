"""Train a `VitEmbedForImageClassification` on labelled pictures with the stock Trainer.

    python examples/train_classification.py --dataset my_photos --mode full --mirror 0.5 --output_dir run \\
        --do_train --do_eval --do_predict --eval_strategy epoch --num_train_epochs 20 --learning_rate 3e-4

The dataset is a folder with a folder of pictures for each label, a table of paths and labels, parquet files, or a name
on the Hub: docs/your-data.md has every layout with its command. A picture has one label or several, a number or
several, or a probability of each label: which is found from the data, logged, and set by `--problem_type`. For
`--do_eval` without a validation split a `--validation_share` of the training split is held out, stratified where a
picture has one label. `--do_predict` writes predictions.csv, also for pictures without labels. `--mode` chooses what is
trained:

- linear: the classifier alone, on a trunk that stays as it is, bit for bit.
- full: everything; `--layer_decay 0.75` changes early layers less.
- lora: low-rank changes of the projections in `--lora_targets` and the classifier (arXiv:2106.09685). They are merged
  before the model is saved, so that it loads without peft.

What is saved is loaded with `AutoModelForImageClassification.from_pretrained("run", trust_remote_code=True)`. Each
evaluation leaves a picture in `pictures/` of the output folder: what was mixed up or how far off it was, and the worst
mistakes. Before the first step the log has the labels with their counts, and names unreadable files, missing and
unknown labels, and pictures that had to be changed: transparency, 16 bits, EXIF rotations. Labels that can be read in
two ways are refused.

Augmentation stays within what a digit survives; for photos set `--mirror 0.5`, and `--mirror_vertical 0.5` where
there is no up, as seen from above or through a microscope.

Two processes without a GPU: `accelerate launch --multi_gpu --num_processes 2 examples/train_classification.py
--use_cpu ...`; with `--cpu` instead of `--multi_gpu` accelerate starts one alone.

Needs: `pip install accelerate datasets kornia matplotlib pillow scikit-learn tqdm`, and `peft` for `--mode lora`.
"""

from functools import partial
from pathlib import Path

import numpy as np
from transformers import DefaultDataCollator

from recipes.arguments import SHIPPED_CHECKPOINT, parse
from recipes.check import check_and_show
from recipes.classification import (
    DataArguments,
    ModelArguments,
    Process,
    Vary,
    check_label_sets,
    check_labelled,
    choose_trained,
    find_problem,
    held_out,
    is_same,
    known_problem,
    learn_in_units,
    load_classifier,
    load_labelled,
    loss_of,
)
from recipes.classification_losses import class_weights
from recipes.classification_metrics import PREDICTIONS_FILE, Metrics, write_predictions
from recipes.classification_sheets import DrawMistakes, true
from recipes.command import run_command
from recipes.data import Report, SeededRows, hold_out, require_splits, wanted_splits
from recipes.models import image_processor_of
from recipes.problems import REGRESSION
from recipes.reading.tables import ROW
from recipes.trainer import RecipeTrainer, run
from vit_embed import VitEmbedConfig


def main() -> None:
    """Parse the command line, then train, evaluate and test as asked."""
    model_arguments, data, recipe, training = parse(ModelArguments, DataArguments, description=__doc__)
    data.trains = training.do_train or data.check_only
    data.only_predicts = training.do_predict and not (training.do_train or training.do_eval or data.check_only)
    if training.do_predict and training.prediction_loss_only:
        raise ValueError(f"--do_predict writes {PREDICTIONS_FILE}, which --prediction_loss_only leaves out; drop one")
    labelled = load_labelled(data)
    source = model_arguments.config_name or model_arguments.model_name_or_path or SHIPPED_CHECKPOINT
    config = VitEmbedConfig.from_pretrained(source)
    problem = find_problem(labelled, data, config)
    known = None if model_arguments.config_name else known_problem(config)
    splits = labelled.splits
    if training.do_eval:
        splits = hold_out(splits, data, training.seed, partial(held_out, problem))
    wanted = wanted_splits(data, training, splits)
    require_splits(splits, wanted, data.dataset)
    report = Report()
    checked = {split: check_labelled(splits[split], split, data, problem, report) for split in wanted}
    check_label_sets(checked, data, problem)
    is_trained = data.trains and data.train_split in checked
    targets = np.array(checked[data.train_split]["labels"][:] if is_trained else [])
    weights = class_weights(problem, targets, data.class_weights)

    model = load_classifier(model_arguments, problem, known)
    processor = image_processor_of(model)
    judged = {split: SeededRows(rows, Process(processor), training.seed) for split, rows in checked.items()}
    if data.check_only:
        folder = Path(training.output_dir) / "check"
        check_and_show(judged, report, DefaultDataCollator(), processor, partial(describe, problem), folder)
        return
    if training.do_train and problem.kind == REGRESSION:
        learn_in_units(model, problem, targets, is_new=not is_same(problem, known))
    loss = loss_of(problem, model, weights, training)
    model = choose_trained(model, model_arguments, recipe, training)
    trained = None
    if training.do_train:
        trained = SeededRows(checked[data.train_split], Vary(processor, data), training.seed)
    test = checked.get(data.test_split)
    trainer = RecipeTrainer(
        recipe,
        draw=DrawMistakes({"eval": checked.get(data.validation_split), "test": test}, problem),
        data=data.dataset,
        report=report,
        model=model,
        args=training,
        data_collator=DefaultDataCollator(),
        train_dataset=trained,
        eval_dataset=judged.get(data.validation_split),
        compute_loss_func=loss,
        compute_metrics=Metrics(problem),
        processing_class=processor,
    )

    def write(logits: np.ndarray, lost: np.ndarray) -> None:
        names = [name for name, is_lost in zip(test[ROW][:], lost) if not is_lost]
        write_predictions(problem, names, logits[~lost], Path(training.output_dir) / PREDICTIONS_FILE)

    run(trainer, test_dataset=judged.get(data.test_split), write_predictions=write)


def describe(problem, item: dict) -> str:
    """The label of a row in words."""
    return true(problem, np.array(item["labels"])) if "labels" in item else "no label"


if __name__ == "__main__":
    run_command(main)
