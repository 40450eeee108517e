"""Train or fine-tune a two-tower `VitEmbedForContrastive` on captioned pictures with the stock Trainer.

    python examples/train_contrastive.py --dataset data/icons --group_column group --tag_column tags \\
        --config_name configs/icon-search.json --tokenizer_name . --output_dir runs/icons --do_train --do_eval

docs/your-data.md has the layouts of --dataset: tables, COCO's captions, texts beside pictures, parquet, tars, the Hub.
`--streaming` reads it without a copy. Each picture has a caption or several, of which one is drawn at random; with
`--tag_column` or `--name_share` the first of them is its name. Pairs whose first captions are equal are not each
other's negatives (`--duplicates_are_negatives` for CLIP's way); where most batches hold one caption alone nothing is
trained. With `--group_column` an epoch draws one picture of each group. Transparent pictures are drawn on random
backgrounds, and in random colours if they are drawn in one grey (icons).

Needs: `pip install accelerate datasets kornia matplotlib pillow scikit-learn tqdm`.
"""

from functools import partial
from pathlib import Path

from datasets import Dataset, IterableDataset

from recipes.arguments import SHIPPED_CHECKPOINT, parse
from recipes.check import check_and_show
from recipes.command import run_command
from recipes.contrastive import (
    Collator,
    DataArguments,
    Groups,
    ModelArguments,
    check_columns,
    check_pairs,
    evaluation_pictures,
    first_ids,
    load_captioned,
    load_two_towers,
    random_groups,
    training_item,
)
from recipes.data import Report, SeededRows, hold_out, require_splits, wanted_splits
from recipes.models import prepare
from recipes.negatives import check_batch_size, check_captions_differ, leave_out_single
from recipes.reading.captions import CAPTIONS, as_list
from recipes.retrieval import DrawFound, retrieval_metrics
from recipes.streams import check_first_rows, check_streaming, training_stream, whole
from recipes.trainer import RecipeTrainer, run


def main() -> None:
    """Parse the command line, then train, evaluate and test as asked."""
    model_arguments, data, recipe, training = parse(ModelArguments, DataArguments, description=__doc__)
    training.label_names = ["group_ids"]  # what the metrics compare pairs by
    data.streaming = data.streaming and not data.check_only  # which reads every row
    if training.do_train:
        check_batch_size(training)
    if training.do_train and data.streaming:
        check_streaming(data, training)
    if data.check_only and model_arguments.model_name_or_path is None and model_arguments.config_name is None:
        model_arguments.model_name_or_path = SHIPPED_CHECKPOINT  # to look at rows any will do
    model, processor = load_two_towers(model_arguments)
    prepare(model, recipe)
    splits = load_captioned(data)
    wanted, report = wanted_splits(data, training, splits), Report()
    for split in {*wanted, data.train_split} & set(splits):
        check_columns(splits[split], split, data)
    if training.do_eval and not data.streaming:
        splits = hold_out(splits, data, training.seed, partial(random_groups, column=data.group_column))
    require_splits(splits, wanted, data.dataset)
    checked = {}
    for split in wanted:
        rows = splits[split]
        if isinstance(rows, IterableDataset) and split in (*data.validation_split, data.test_split):
            rows = whole(rows)
        if isinstance(rows, Dataset):
            checked[split] = check_pairs(rows, split, data, processor.tokenizer, report)
    judged = {split: evaluation_pictures(rows, processor.image_processor) for split, rows in checked.items()}
    collate = Collator(processor, data, model.config.image_shape)
    if data.check_only:
        folder = Path(training.output_dir) / "check"
        check_and_show(judged, report, collate, processor.image_processor, lambda item: item["caption"], folder)
        return
    # A margin keeps detail where a picture is enlarged.
    canvas = max(model.config.image_shape) * 4 // 3
    trained = None
    if training.do_train and data.streaming:
        check_first_rows(splits[data.train_split], data.train_split, data, training)
        trained = training_stream(splits[data.train_split], data, processor.tokenizer, canvas, training.seed)
    elif training.do_train:
        rows, split = checked[data.train_split], data.train_split
        rows = rows if data.group_column is None else Groups(rows, data.group_column)
        where = f"split {split!r}"
        check_captions_differ(first_ids(rows), where, training, data.caption_column, data.duplicates_are_negatives)
        leave_out_single(len(rows), training)
        make = partial(training_item, arguments=data, tokenizer=processor.tokenizer, canvas=canvas)
        trained = SeededRows(rows, make, training.seed)
    validation = {split: judged[split] for split in data.validation_split * training.do_eval}
    is_one = len(validation) == 1
    sheets = {"eval" if is_one else f"eval_{split}": checked[split] for split in validation}
    sheets["test"] = checked.get(data.test_split)
    trainer = RecipeTrainer(
        recipe,
        draw=DrawFound(sheets, lambda row: as_list(row[CAPTIONS])[0]),
        data=data.dataset,
        report=report,
        model=model,
        args=training,
        data_collator=collate,
        train_dataset=trained,
        eval_dataset=next(iter(validation.values())) if is_one else validation or None,
        compute_metrics=retrieval_metrics,
        processing_class=processor,
    )
    run(trainer, test_dataset=judged.get(data.test_split))


if __name__ == "__main__":
    run_command(main)
