"""What benchmarks of dual encoders share: the two classes, a batch, and whether their outputs are equal."""

import logging

import torch
from transformers import CLIPModel

from vit_embed import VitEmbedForContrastive

logger = logging.getLogger(__name__)

MODELS = {"ours": VitEmbedForContrastive, "theirs": CLIPModel}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMAGE_SIZE = 224  # pixels
NUM_TOKENS = 77
START_TOKEN, END_TOKEN = 49406, 49407  # of CLIP's vocabulary
# Largest relative difference between two equal models: sums taken in another order. 2e-2 is a few steps of bf16.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}

Batch = dict[str, torch.Tensor]


def make_batch(batch_size: int, image_size: int = IMAGE_SIZE) -> Batch:
    """Pixels (B, 3, H, W) and token ids (B, 77), every text as long as the model allows: nothing can be trimmed."""
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    input_ids = torch.randint(1, START_TOKEN, (batch_size, NUM_TOKENS), generator=generator)
    input_ids[:, 0], input_ids[:, -1] = START_TOKEN, END_TOKEN
    return {"pixel_values": pixel_values, "input_ids": input_ids}


def features_of(output) -> torch.Tensor:
    """transformers 5 returns an output object where 4.57 and vit_embed return the tensor (B, projection_dim)."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def check_equal(what: str, ours: torch.Tensor, theirs: torch.Tensor, dtype_name: str) -> None:
    """Raises unless the two agree: a faster wrong answer is not faster."""
    difference = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    if not difference <= TOLERANCE[dtype_name]:
        raise RuntimeError(f"{what}: outputs differ by {difference:.1e}, expected {TOLERANCE[dtype_name]:.0e} at most")
    logger.info("%s: outputs agree to %.1e", what, difference)
