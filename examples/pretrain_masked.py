"""Pretrain a `VitEmbedForMaskedImageModeling` on pictures without labels with the stock Trainer.

    python examples/pretrain_masked.py --dataset my_photos --config_name small.json --output_dir run \\
        --do_train --do_eval --eval_strategy steps --eval_steps 500 --per_device_train_batch_size 256

The dataset is a folder of pictures, a folder written by `datasets` (`save_to_disk`), a folder of parquet files, or a
name on the Hub; without a validation split, `--validation_share` of the training split is held out. Training sees
random crops, mirrored half of the time. Evaluation hides the same patches every time, and each one leaves a sheet in
`pictures/` of the output folder: held-out pictures, what the model sees of them, and what it fills in.

The trunk then loads into every other class: `VitEmbedForImageClassification.from_pretrained("run", num_labels=10)`.

Needs: `pip install accelerate datasets kornia matplotlib pillow tqdm`. Source: arXiv:2111.06377.
"""

from pathlib import Path

import numpy as np
import torch

from recipes.arguments import parse
from recipes.check import check_and_show
from recipes.command import run_command
from recipes.data import Report, SeededRows, hold_out, require_splits, wanted_splits
from recipes.drawing import as_colours, spread_over
from recipes.masked import (
    NUM_SHOWN,
    Collator,
    DataArguments,
    ModelArguments,
    TrainingPicture,
    check_pictures,
    evaluation_rows,
    load_pictures,
)
from recipes.models import image_processor_of, load_model, prepare
from recipes.reconstructions import draw_reconstructions, masked_pictures
from recipes.trainer import RecipeTrainer, run
from vit_embed import VitEmbedForMaskedImageModeling


def main() -> None:
    """Parse the command line, then train, evaluate and test as asked."""
    model_arguments, data, recipe, training = parse(ModelArguments, DataArguments, description=__doc__)
    model = load_model(VitEmbedForMaskedImageModeling, model_arguments)
    processor = image_processor_of(model)
    prepare(model, recipe)
    splits = load_pictures(data)
    if training.do_eval:
        splits = hold_out(splits, data, training.seed)
    wanted, report = wanted_splits(data, training, splits), Report()
    require_splits(splits, wanted, data.dataset)
    checked = {split: check_pictures(splits[split], split, report) for split in wanted}
    judged = {split: evaluation_rows(rows, processor, model.config, training.seed) for split, rows in checked.items()}
    collate = Collator(processor, data, model.config.image_shape)
    if data.check_only:
        check_and_show(judged, report, collate, processor, lambda item: "", Path(training.output_dir) / "check")
        return
    trained = None
    if training.do_train:
        make = TrainingPicture(model.config.image_shape)
        trained = SeededRows(checked[data.train_split], make, training.seed)

    def reconstruct(prefix: str) -> dict[str, np.ndarray]:
        rows = judged[data.test_split if prefix == "test" else data.validation_split]
        shown = torch.stack([rows[place]["pixel_values"] for place in spread_over(len(rows), NUM_SHOWN)])
        seen, filled = masked_pictures(trainer.accelerator.unwrap_model(trainer.model), shown, processor)
        hidden = f"{model.config.mask_ratio:.0%} hidden"
        return {"picture": as_colours(shown, processor), hidden: seen, "filled in": filled}

    trainer = RecipeTrainer(
        recipe,
        draw=draw_reconstructions,
        compute=reconstruct,
        data=data.dataset,
        report=report,
        model=model,
        args=training,
        data_collator=collate,
        train_dataset=trained,
        eval_dataset=judged.get(data.validation_split),
        processing_class=processor,
    )
    run(trainer, test_dataset=judged.get(data.test_split))


if __name__ == "__main__":
    run_command(main)
