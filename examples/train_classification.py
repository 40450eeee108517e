"""Train a `VitEmbedForImageClassification` on labelled pictures with the stock Trainer.

    python examples/train_classification.py --dataset my_photos --mode full --mirror 0.5 --output_dir run \\
        --do_train --do_eval --do_predict --eval_strategy epoch --num_train_epochs 20 --learning_rate 3e-4

The dataset is a folder with a folder of pictures for each label, in `train/`, `validation/` and `test/` or without
splits; a folder of parquet files or one written by `save_to_disk`; or a name on the Hub. For `--do_eval` without a
validation split a stratified `--validation_share` of the training split is held out. `--mode` chooses what is trained:

- linear: the classifier alone, on a trunk that stays as it is, bit for bit.
- full: everything; `--layer_decay 0.75` changes early layers less.
- lora: low-rank changes of the projections in `--lora_targets` and the classifier (arXiv:2106.09685). They are merged
  before the model is saved, so that it loads without peft.

What is saved is loaded with `AutoModelForImageClassification.from_pretrained("run", trust_remote_code=True)`. Each
evaluation leaves a picture in `pictures/` of the output folder: which labels were mistaken for which, and the worst
mistakes. Before the first step the log names unreadable files, missing and unknown labels, and pictures that had to be
changed: transparency, 16 bits, EXIF rotations. Labels in folders of several depths are refused.

Augmentation stays within what a digit survives; for photos set `--mirror 0.5`, and `--mirror_vertical 0.5` where
there is no up, as seen from above or through a microscope.

Two processes without a GPU: `accelerate launch --multi_gpu --num_processes 2 examples/train_classification.py
--use_cpu ...`; with `--cpu` instead of `--multi_gpu` accelerate starts one alone.

Needs: `pip install accelerate datasets kornia matplotlib pillow scikit-learn tqdm`, and `peft` for `--mode lora`.
"""

from functools import partial

from transformers import DefaultDataCollator

from recipes.arguments import SHIPPED_CHECKPOINT, parse
from recipes.classification import (
    DataArguments,
    DrawMistakes,
    ModelArguments,
    Process,
    Vary,
    check_columns,
    check_label_sets,
    check_labelled,
    choose_trained,
    classification_metrics,
    label_names,
    load_classifier,
    load_labelled,
    stratified_rows,
)
from recipes.data import SeededRows, hold_out, require_splits, wanted_splits
from recipes.models import image_processor_of
from recipes.reading.labels import LABEL
from recipes.trainer import RecipeTrainer, run
from vit_embed import VitEmbedConfig


def main() -> None:
    """Parse the command line, then train, evaluate and test as asked."""
    model_arguments, data, recipe, training = parse(ModelArguments, DataArguments, description=__doc__)
    splits = load_labelled(data)
    wanted = wanted_splits(data, training)
    for split in {*wanted, data.train_split} & set(splits):
        check_columns(splits[split], split, data)
    if training.do_eval:
        splits = hold_out(splits, data, training.seed, partial(stratified_rows, column=LABEL))
    require_splits(splits, wanted, data.dataset)
    source = model_arguments.config_name or model_arguments.model_name_or_path or SHIPPED_CHECKPOINT
    names = label_names(splits, data, VitEmbedConfig.from_pretrained(source))
    checked = {split: check_labelled(splits[split], split, data, names) for split in wanted}
    check_label_sets(checked, data, names)

    model = load_classifier(model_arguments, names)
    processor = image_processor_of(model)
    model = choose_trained(model, model_arguments, recipe, training)
    judged = {split: SeededRows(rows, Process(processor), training.seed) for split, rows in checked.items()}
    trained = None
    if training.do_train:
        trained = SeededRows(checked[data.train_split], Vary(processor, data), training.seed)
    sheets = {"eval": checked.get(data.validation_split), "test": checked.get(data.test_split)}
    trainer = RecipeTrainer(
        recipe,
        draw=DrawMistakes(sheets, names),
        data=data.dataset,
        model=model,
        args=training,
        data_collator=DefaultDataCollator(),
        train_dataset=trained,
        eval_dataset=judged.get(data.validation_split),
        compute_metrics=classification_metrics,
        processing_class=processor,
    )
    run(trainer, test_dataset=judged.get(data.test_split))


if __name__ == "__main__":
    main()
