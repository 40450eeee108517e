"""Adapters of PEFT on every class: they start without effect, learn, show in the result, merge, and come back."""

import peft
import pytest
import torch
from catalogue import CLASSES, GRAPHS, STEMS, flat, mostly_heavy
from tiny import pixels, score, vision_config
from torch import nn

import vit_embed

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 sums in another order, of outputs around 1


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **options})


ATTENTION = ["q_proj", "v_proj"]
METHODS = {
    "lora": lambda: lora(target_modules=ATTENTION),
    "lora, all-linear": lambda: lora(target_modules="all-linear"),
    "dora": lambda: lora(target_modules=ATTENTION, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=ATTENTION),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=ATTENTION),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=ATTENTION),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=ATTENTION),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "k_proj"]),
    "modules to save": lambda: lora(target_modules=["q_proj"], modules_to_save=["layer_norm1"]),
}
# Methods on the layers at the two ends of the trunk, which are layers of torch like any other.
AT_THE_STEM = {
    "lora": lambda names: lora(target_modules=names),
    "dora": lambda names: lora(target_modules=names, use_dora=True),
    "modules to save": lambda names: lora(target_modules=["q_proj"], modules_to_save=names),
}


def run(case, model) -> list[torch.Tensor]:
    with torch.no_grad():
        return flat(model.eval()(**case.inputs()), case.outputs)


def assert_close(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, **CLOSE)


def assert_adapts(case, settings: peft.PeftConfig, folder) -> None:
    plain = run(case, case.model())
    torch.manual_seed(0)
    model = peft.get_peft_model(case.model(), settings)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert learning, "there is nothing to learn"
    assert_close(run(case, model), plain)
    with torch.no_grad():
        for parameter in learning.values():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    learned = run(case, model)
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(learned, plain)), "the adapter has no effect"
    score(model.train()(**case.training_inputs())).backward()
    idle = [name for name, p in learning.items() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias shifts all scores of a query alike.
    assert not [name for name in idle if "k_proj" not in name], "no gradients reach them"
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(case.model(), folder)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_close(run(case, again), learned)
    assert_close(run(case, again.merge_and_unload()), learned)


# A method sees the layers alone, which the classes share: every method on one class, one method on every case.
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", mostly_heavy(CLASSES, "contrastive"))
def test_every_method_on_every_class(name, method, tmp_path):
    assert_adapts(CLASSES[name], METHODS[method](), tmp_path)


@pytest.mark.parametrize("name", GRAPHS)
def test_all_linear_layers_of_every_class_option_and_stem(name, tmp_path):
    """A stem's buffers are in no adapter's file, so they must not have moved."""
    assert_adapts(GRAPHS[name], METHODS["lora, all-linear"](), tmp_path)


@pytest.mark.parametrize("method", AT_THE_STEM)
@pytest.mark.parametrize("layer", ["input", "position"])
@pytest.mark.parametrize("name", mostly_heavy(CLASSES, "masked", "text"))
def test_the_layers_of_the_embeddings(name, layer, method, tmp_path):
    inputs = "token_embedding" if name.startswith("text") else "patch_embedding"
    names = [inputs if layer == "input" else "position_embedding"]
    assert_adapts(CLASSES[name], AT_THE_STEM[method](names), tmp_path)


@pytest.mark.parametrize("stem", ["linear", "dct", "wavelet"])
def test_a_stem_that_is_a_linear_layer_is_adapted_as_one(stem, tmp_path):
    case = STEMS[f"stem {stem}"]
    assert type(case.model().vision_model.embeddings.patch_embedding).__mro__[1] is nn.Linear
    assert_adapts(case, lora(target_modules=["patch_embedding"]), tmp_path)


@pytest.mark.parametrize("stem", ["overlap", "adaptive", "deformable", "hybrid"])
def test_a_stem_that_is_no_layer_of_torch_is_refused_by_peft(stem):
    """By name; never adapted without effect. Its layers inside have names of their own."""
    model = STEMS[f"stem {stem}"].model()
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(model, lora(target_modules=["patch_embedding"]))


def test_the_layer_of_the_default_stem_is_a_convolution():
    layer = vit_embed.VitEmbedModel(vision_config()).embeddings.patch_embedding
    assert isinstance(layer, nn.Conv2d) and layer(pixels()).shape == (3, 32, 4, 4)
    other = type(layer)(3, 5, kernel_size=3, stride=2, padding=1)
    expected = nn.functional.conv2d(pixels(), other.weight, other.bias, stride=2, padding=1)
    torch.testing.assert_close(other(pixels()), expected)
