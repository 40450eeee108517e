"""Teach an adaptive stem where pictures have detail: a depth head that has to paint the brightness of every pixel.

    python examples/train_adaptive.py --dataset data/emoji --output_dir runs/adaptive --do_train --max_steps 800 \\
        --per_device_train_batch_size 32 --learning_rate 1.5e-3 --weight_decay 0.05 --use_cpu --report_to none

A label for a whole picture teaches a gate little of where to look closely; a target for every pixel does, within
minutes. The model is `VitEmbedForDepthEstimation` with the "l2" loss, and brightness takes the place of metres: a
stand-in for real depth, segmentation or the like. `examples/show_tokens.py --adaptive runs/adaptive` draws the result.

Needs: `pip install accelerate datasets kornia matplotlib pillow tqdm`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPImageProcessor

from recipes.arguments import parse
from recipes.check import check_and_show
from recipes.command import run_command
from recipes.data import Report, SeededRows, require_splits
from recipes.masked import Collator, DataArguments, TrainingPicture, check_pictures, load_pictures
from recipes.models import image_processor_of, prepare
from recipes.trainer import RecipeTrainer, run
from vit_embed import VitEmbedConfig, VitEmbedForDepthEstimation

# Depth is positive; brightness spreads over a range in which its squared error weighs like the budget loss.
DARKEST, BRIGHTEST = 0.1, 4.1


@dataclass
class BrightnessCollator:
    """Rows -> pictures cropped and mirrored as for pretraining, and the brightness of their pixels as labels."""

    collator: Collator
    processor: CLIPImageProcessor

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pixel_values = self.collator(rows)["pixel_values"]  # (B, 3, H, W)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.processor.image_mean, self.processor.image_std))
        brightness = (pixel_values * std + mean).mean(dim=1)  # (B, H, W) in [0, 1]
        return {"pixel_values": pixel_values, "labels": DARKEST + (BRIGHTEST - DARKEST) * brightness}


def main() -> None:
    """Parse the command line and train."""
    data, recipe, training = parse(DataArguments, description=__doc__)
    if not data.check_only and (not training.do_train or training.do_eval or training.do_predict):
        raise ValueError("expected --do_train and neither --do_eval nor --do_predict: this script trains, no more")
    config = VitEmbedConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        hidden_act="gelu",
        image_size=64,
        patch_size=4,
        stem_type="adaptive",
        adaptive_budget_weight=0.5,
        use_cls_token=False,
        pooling_type="mean",
        depth_loss="l2",
    )
    model = VitEmbedForDepthEstimation(config)
    processor = image_processor_of(model)
    prepare(model, recipe)
    splits = load_pictures(data)
    require_splits(splits, [data.train_split], data.dataset)
    report = Report()
    rows = check_pictures(splits[data.train_split], data.train_split, report)
    trained = SeededRows(rows, TrainingPicture(config.image_shape), training.seed)
    collate = BrightnessCollator(Collator(processor, data, config.image_shape), processor)
    if data.check_only:
        folder = Path(training.output_dir) / "check"
        check_and_show({data.train_split: trained}, report, collate, processor, lambda item: "", folder)
        return
    trainer = RecipeTrainer(
        recipe,
        data=data.dataset,
        model=model,
        args=training,
        data_collator=collate,
        train_dataset=trained,
        report=report,
        processing_class=processor,
    )
    run(trainer)


if __name__ == "__main__":
    run_command(main)
