"""torchao and bitsandbytes on the checkpoint that ships: layers are read through their own forward, so they may change.

In another process, with the folder that `make test-all` installs both into: wherever torchao is installed transformers
imports it, which takes a second.
"""

import sys
from pathlib import Path

import pytest
import torch
from fresh_process import run_fresh

import vit_embed

REPO = Path(vit_embed.__file__).resolve().parent
ECOSYSTEM = Path(sys.prefix) / "ecosystem"


def differences(repo: str) -> dict[str, dict[str, float]]:
    """{kind: the largest difference in logits, layers quantised}."""
    import copy

    from PIL import Image
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig

    model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    picture = Image.open(f"{repo}/examples/pictures/red-apple.png").convert("RGB")
    inputs = processor(text=["red apple", "car"], images=picture, padding=True, return_tensors="pt")

    def logits(of):
        with torch.no_grad():
            return of(**inputs).logits_per_image

    expected, found = logits(model), {}
    for config in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
        for kind, small in (("", copy.deepcopy(model)), (", optimized", model.optimized())):
            quantize_(small, config)
            layers = sum(type(weight).__module__.startswith("torchao") for weight in small.parameters())
            off = float((logits(small) - expected).abs().max())
            found[type(config).__name__ + kind] = {"off": off, "layers": layers}
    for bits in (8, 4):
        config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        small = AutoModel.from_pretrained(repo, trust_remote_code=True, quantization_config=config).eval()
        layers = sum(type(module).__module__.startswith("bitsandbytes") for module in small.modules())
        found[f"bitsandbytes {bits}"] = {"off": float((logits(small) - expected).abs().max()), "layers": layers}
    return found


@pytest.mark.heavy
def test_quantised_logits_are_near(tmp_path):
    """Bounds: three times what docs/ecosystem.md measured. Logits go up to 16."""
    if not ECOSYSTEM.is_dir():
        pytest.skip("torchao and bitsandbytes are not there; `make test-all` installs them")
    found = run_fresh(differences, tmp_path, repo=str(REPO), environment={"PYTHONPATH": str(ECOSYSTEM)})
    bounds = {
        "Int8WeightOnlyConfig": 0.12,
        "Int8WeightOnlyConfig, optimized": 0.12,
        "Int8DynamicActivationInt8WeightConfig": 0.21,
        "Int8DynamicActivationInt8WeightConfig, optimized": 0.21,
        "bitsandbytes 8": 0.27,
        "bitsandbytes 4": 2.4,
    }
    assert found.keys() == bounds.keys()
    for kind, bound in bounds.items():
        # Ten linear layers or more a tower: the quantiser has found them.
        assert found[kind]["layers"] > 20 and 0 < found[kind]["off"] < bound, kind
