"""Train or fine-tune a two-tower `VitEmbedForContrastive` on captioned pictures with the stock Trainer.

    python examples/train_contrastive.py --dataset data/icons --group_column group --tag_column tags \\
        --config_name configs/icon-search.json --tokenizer_name . --output_dir runs/icons --do_train --do_eval

The dataset is a folder written by `datasets` (`save_to_disk`), of parquet files, of tar shards (WebDataset) or of
pictures with `metadata.jsonl`, or a name on the Hub; `--streaming` reads it without a copy. Each row has an image and a
caption, or a list of captions, the first of which is the name of the picture. Pairs whose first captions are equal are
not each other's negatives (`--duplicates_are_negatives` for CLIP's way); where most are equal the log warns before the
first step. With `--group_column` an epoch draws one picture of each group. Transparent pictures are drawn on random
backgrounds, and in random colours if they are drawn in one grey (icons).

Needs: `pip install accelerate datasets kornia matplotlib pillow scikit-learn tqdm`.
"""

from functools import partial

from datasets import Dataset

from recipes.arguments import parse
from recipes.contrastive import (
    Collator,
    DataArguments,
    Groups,
    ModelArguments,
    as_list,
    check_captions_differ,
    check_columns,
    check_pairs,
    check_streaming,
    evaluation_pictures,
    load_captioned,
    load_two_towers,
    random_groups,
    training_item,
    training_stream,
    undecoded,
)
from recipes.data import SeededRows, hold_out, require_splits, wanted_splits
from recipes.models import prepare
from recipes.reading.captions import CAPTIONS
from recipes.retrieval import DrawFound, retrieval_metrics
from recipes.trainer import RecipeTrainer, run


def main() -> None:
    """Parse the command line, then train, evaluate and test as asked."""
    model_arguments, data, recipe, training = parse(ModelArguments, DataArguments, description=__doc__)
    training.label_names = ["group_ids"]  # what the metrics compare pairs by
    model, processor = load_two_towers(model_arguments)
    prepare(model, recipe)
    splits = load_captioned(data)
    wanted = wanted_splits(data, training)
    for split in {*wanted, data.train_split} & set(splits):
        check_columns(splits[split], split, data)
    if training.do_eval and not data.streaming:
        splits = hold_out(splits, data, training.seed, partial(random_groups, column=data.group_column))
    require_splits(splits, wanted, data.dataset)
    checked = {}
    for split in wanted:
        rows = splits[split]
        if data.streaming and split in (*data.validation_split, data.test_split):  # metrics need all of it
            rows = Dataset.from_list(list(undecoded(rows)), features=rows.features)
        if isinstance(rows, Dataset):
            checked[split] = check_pairs(rows, split, data, processor.tokenizer)
    # A margin keeps detail where a picture is enlarged.
    canvas = max(model.config.image_shape) * 4 // 3
    trained = None
    if training.do_train and data.streaming:
        check_streaming(data, training)
        trained = training_stream(splits[data.train_split], data, processor.tokenizer, canvas, training.seed)
    elif training.do_train:
        check_captions_differ(checked[data.train_split], data.train_split, data)
        make = partial(training_item, arguments=data, tokenizer=processor.tokenizer, canvas=canvas)
        trained = SeededRows(Groups(checked[data.train_split], data.group_column), make, training.seed)
    judged = {split: evaluation_pictures(rows, processor.image_processor) for split, rows in checked.items()}
    validation = {split: judged[split] for split in data.validation_split * training.do_eval}
    is_one = len(validation) == 1
    sheets = {"eval" if is_one else f"eval_{split}": checked[split] for split in validation}
    sheets["test"] = checked.get(data.test_split)
    trainer = RecipeTrainer(
        recipe,
        draw=DrawFound(sheets, lambda row: as_list(row[CAPTIONS])[0]),
        data=data.dataset,
        model=model,
        args=training,
        data_collator=Collator(processor, data, model.config.image_shape),
        train_dataset=trained,
        eval_dataset=next(iter(validation.values())) if is_one else validation or None,
        compute_metrics=retrieval_metrics,
        processing_class=processor,
    )
    run(trainer, test_dataset=judged.get(data.test_split))


if __name__ == "__main__":
    main()
