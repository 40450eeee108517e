"""Train or fine-tune a `VitEmbedForDepthEstimation` on pictures with depth with the stock Trainer.

    python examples/data/render_depth_scenes.py --output_dir data/scenes
    python examples/train_depth.py --dataset data/scenes --config_name configs/depth-scenes.json --max_depth 10 \\
        --output_dir run --do_train --do_eval --do_predict

docs/your-data.md has the layouts that are read, among them folders of pictures beside folders of depths, tables, NYU,
KITTI and TUM RGB-D. Whole numbers are divided by `--depth_scale` (by default the layout's own, or 1000: millimetres),
floating point ones are metres. What is zero, negative, infinite, not a number or beyond `--max_depth` counts as not
measured. What is wrong with the data is counted and named before the first step, and left out.

A crop is enlarged to the size of the model, so what it shows looks nearer, and its depths are made smaller by the same
factor: those of a picture that the same camera took from there.

Every evaluation leaves its metrics, and `pictures/` in the output folder: picture, depth, prediction and error.
Metrics are the mean over pictures of scikit-learn's metrics of the measured pixels of each, as in the benchmarks of
NYU and KITTI, at the size of the depth maps where these are of one size; once as predicted, and once with each
prediction scaled to the median of its depth map (`median_scaled_`), which leaves out a wrong unit or camera.

Needs: `pip install accelerate datasets kornia matplotlib pillow scikit-learn tqdm`.
"""

import logging
from pathlib import Path

from recipes.arguments import parse
from recipes.check import check_and_show
from recipes.command import run_command
from recipes.data import Report, SeededRows, hold_out, require_splits, wanted_splits
from recipes.depth import (
    DataArguments,
    DepthEvaluation,
    DepthTrainer,
    EvaluationPair,
    ModelArguments,
    TrainingPair,
    collate,
    load_depth_model,
    load_pairs,
)
from recipes.depth_checks import check_pairs, compare_splits
from recipes.models import prepare
from recipes.trainer import run

logger = logging.getLogger("train_depth")


def main() -> None:
    """Parse the command line, then train, evaluate and test as asked."""
    model_arguments, data, recipe, training = parse(ModelArguments, DataArguments, description=__doc__)
    training.batch_eval_metrics = True
    model, processor = load_depth_model(model_arguments)
    prepare(model, recipe)
    splits, scale = load_pairs(data)
    if training.do_eval:
        splits = hold_out(splits, data, training.seed)
    wanted, report = wanted_splits(data, training, splits), Report()
    require_splits(splits, wanted, data.dataset)
    trained, judged, metrics, medians = None, {}, {}, {}
    for split in wanted:
        rows, label_shape, medians[split] = check_pairs(splits[split], split, scale, model.config.max_depth, report)
        if split == data.train_split:
            trained = SeededRows(rows, TrainingPair(data, scale, model.config, processor), training.seed)
        judged[split] = SeededRows(rows, EvaluationPair(scale, model.config, processor, label_shape), training.seed)
        metrics[split] = DepthEvaluation(judged[split], processor)
        if label_shape is None:
            logger.warning("split %s: depths of several sizes, compared at %s", split, model.config.image_shape)
    compare_splits(medians)
    if data.check_only:
        shown = {**judged, **({data.train_split: trained} if trained is not None else {})}
        check_and_show(shown, report, collate, processor, lambda item: "", Path(training.output_dir) / "check")
        return
    trainer = DepthTrainer(
        recipe,
        draw=lambda output, path: trainer.compute_metrics.draw(path),
        data=data.dataset,
        report=report,
        model=model,
        args=training,
        data_collator=collate,
        train_dataset=trained if training.do_train else None,
        eval_dataset=judged.get(data.validation_split),
        compute_metrics=metrics.get(data.validation_split),
        processing_class=processor,
    )
    run(trainer, test_dataset=judged.get(data.test_split), test_metrics=metrics.get(data.test_split))


if __name__ == "__main__":
    run_command(main)
