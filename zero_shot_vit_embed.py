"""The zero-shot pipeline of a model trained with the sigmoid loss, found by `pipeline` through its config.

transformers gives sigmoid scores to models whose type is called "siglip" alone, and a softmax over the labels to every
other; a single label then always scores 1.
"""

from typing import Any

from transformers import ZeroShotImageClassificationPipeline


class VitEmbedZeroShotPipeline(ZeroShotImageClassificationPipeline):
    """Scores each label on its own, in [0, 1]: the sigmoid of its logit. They do not add up to 1.

    Texts longer than the text tower takes are cut, as in transformers' SigLIP.
    """

    def preprocess(  # type: ignore[override]
        self, image, candidate_labels=None, tokenizer_kwargs=None, **options
    ) -> dict[str, Any]:
        max_length = self.model.config.text_config.max_position_embeddings
        tokenizer_kwargs = {
            "padding": "max_length",
            "max_length": max_length,
            "truncation": True,
            **(tokenizer_kwargs or {}),
        }
        return super().preprocess(image, candidate_labels, tokenizer_kwargs=tokenizer_kwargs, **options)

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:  # type: ignore[override]
        scores = model_outputs["logits"][0].float().sigmoid().tolist()
        pairs = sorted(zip(scores, model_outputs["candidate_labels"]), key=lambda pair: -pair[0])
        return [{"score": score, "label": label} for score, label in pairs]
