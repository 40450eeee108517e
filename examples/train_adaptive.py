"""Teach an adaptive stem where pictures have detail: a depth head that has to paint the brightness of every pixel.

    python examples/train_adaptive.py --dataset data/emoji --output_dir runs/adaptive --do_train --max_steps 800 \\
        --per_device_train_batch_size 32 --learning_rate 1.5e-3 --weight_decay 0.05 --use_cpu --report_to none

A label for a whole picture teaches a gate little of where to look closely; a target for every pixel does, within
minutes. The model is `VitEmbedForDepthEstimation` with the "l2" loss, and brightness takes the place of metres: a
stand-in for real depth, segmentation or the like. `examples/show_tokens.py --adaptive runs/adaptive` draws the result.

Needs: `pip install accelerate datasets kornia matplotlib pillow tqdm`.
"""

import logging
from dataclasses import dataclass

import torch
from pretrain_masked import Collator, DataArguments, TrainingPictures, readable_rows
from recipe import check_output_dir, checkpoint_to_resume, load_splits
from transformers import CLIPImageProcessor, HfArgumentParser, Trainer, TrainingArguments, set_seed

from vit_embed import VitEmbedConfig, VitEmbedForDepthEstimation

IMAGE_SIZE = 64
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
    data_arguments, arguments = HfArgumentParser(
        (DataArguments, TrainingArguments), description=__doc__
    ).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if not arguments.do_train or arguments.do_eval or arguments.do_predict:
        raise ValueError("expected --do_train and neither --do_eval nor --do_predict: this script trains, no more")
    check_output_dir(arguments)
    set_seed(arguments.seed)
    arguments.remove_unused_columns = False  # rows carry pictures, which no forward takes by name
    config = VitEmbedConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        hidden_act="gelu",
        image_size=IMAGE_SIZE,
        patch_size=4,
        stem_type="adaptive",
        adaptive_budget_weight=0.5,
        use_cls_token=False,
        pooling_type="mean",
        depth_loss="l2",
    )
    shape = config.image_shape
    processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    rows = readable_rows(
        load_splits(data_arguments.dataset)[data_arguments.train_split], data_arguments.train_split, data_arguments
    )
    trainer = Trainer(
        model=VitEmbedForDepthEstimation(config),
        args=arguments,
        data_collator=BrightnessCollator(Collator(processor, data_arguments, shape), processor),
        train_dataset=TrainingPictures(rows, data_arguments.image_column, tuple(side * 5 // 4 for side in shape)),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(arguments))
    trainer.save_model()


if __name__ == "__main__":
    main()
