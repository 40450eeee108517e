"""One suite over every layout: a source and its conversion compute the same, and the way back gives the same bits.

The cases are in support/sources.py, a model for every form of every layout.
"""

import pytest
import tiny
import torch
from sources import CASES, NAMED_CASES, TRUNK, run_source, with_trunk_prefix
from transformers import AutoModel

from vit_embed import VitEmbedForContrastive, VitEmbedForImageClassification, VitEmbedModel
from vit_embed.conversion.compare import OUTPUTS, sample_inputs
from vit_embed.conversion.layouts import LAYOUTS, detect_layout, detections
from vit_embed.conversion.layouts.layout import MODEL_CLASSES, ConversionOptions
from vit_embed.conversion.reading import read_checkpoint
from vit_embed.conversion.source import find_source
from vit_embed.convert_checkpoint import convert_checkpoint, restore_checkpoint

# Two orders of float32 operations over three layers, of the largest value; measured at most 6e-6.
CLOSE = 1e-5


def assert_close(found, expected, name):
    assert found.shape == expected.shape, name
    assert float((found - expected).abs().max() / expected.abs().max()) < CLOSE, name


def assert_equal_outputs(found, expected):
    """Every state of every layer, and every output."""
    (states, outputs), (their_states, their_outputs) = found, expected
    assert len(states) == len(their_states) and outputs.keys() == their_outputs.keys() and outputs
    for number, (ours, theirs) in enumerate(zip(states, their_states)):
        assert_close(ours, theirs, f"state {number}")
    for name, output in their_outputs.items():
        assert_close(outputs[name], output, name)


def run_ours(model, inputs, names):
    """As `run_source`: what enters the first layer of each tower and what leaves each layer, and the outputs."""
    states = list(model.trunk(inputs.pixel_values, output_hidden_states=True).hidden_states)
    if inputs.input_ids is not None:
        states += model.text_model(inputs.input_ids, output_hidden_states=True).hidden_states
    return states, {name: OUTPUTS[name](model, inputs) for name in names}


def convert(case, state_dict, config, **options):
    return LAYOUTS[case.layout].convert(state_dict, config, ConversionOptions(**{**case.options, **options}))


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_there_and_back(case, made, tmp_path):
    source = made(str(case))
    assert detect_layout(source.state_dict, source.config)[0] == case.layout
    assert case.layout in detections(source.state_dict, {})
    differences = convert_checkpoint(source.path, tmp_path / "ours", ConversionOptions(**case.options))
    assert set(differences or ()) == case.compared and all(each < 1e-4 for each in (differences or {}).values())
    auto = AutoModel.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    is_trunk = case.model_class in ("VitEmbedForImageClassification", "VitEmbedForDepthEstimation")
    assert type(auto).__name__ == ("VitEmbedModel" if is_trunk else case.model_class)
    assert auto.config.architectures == [case.model_class] and auto.config.converted_from["layout"] == case.layout
    model = MODEL_CLASSES[case.model_class].from_pretrained(tmp_path / "ours").eval()
    inputs = sample_inputs(model.config)
    expected = run_source(case, source.model, inputs)
    assert_equal_outputs(run_ours(model, inputs, expected[1]), expected)

    if case.back is None:
        return
    back = tmp_path / ("back" if case.back == "folder" else "back.pt")
    restore_checkpoint(tmp_path / "ours", case.layout, **{f"output_{'dir' if case.back == 'folder' else 'file'}": back})
    again, original = find_source(back), with_trunk_prefix(source.state_dict)
    weights = again.state_dict()
    assert weights.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(weights[name], tensor) or name in case.one_way, name
    first, second = read_checkpoint(tmp_path / "ours" / "model.safetensors"), convert(case, weights, again.config)
    prefix = "" if first.keys() == second.weights.keys() else "vision_model."
    assert first.keys() == {prefix + name for name in second.weights}
    assert all(torch.equal(first[prefix + name], tensor) for name, tensor in second.weights.items())
    if case.reload is not None:
        assert_equal_outputs(run_source(case, case.reload(back, source.model), inputs), expected)


# One form after the other takes the same rules; of open_clip and timm the first few have them all.
KEYED = [
    case if case.is_keyed else pytest.param(case, marks=pytest.mark.heavy)
    for case in CASES
    if case.is_keyed or case.layout not in ("open_clip", "timm")
]


@pytest.mark.parametrize("case", KEYED, ids=str)
def test_every_key_is_needed_and_no_other_is_taken(case, made):
    source = made(str(case))

    def is_refused(state_dict):
        try:
            convert(case, state_dict, source.config)
        except ValueError:
            return True
        return False

    for key, tensor in source.state_dict.items():
        if case.is_needed(key):
            assert is_refused({name: value for name, value in source.state_dict.items() if name != key}), key
            longer = [torch.cat([tensor, tensor[:1]])] if tensor.dim() else []
            for wrong in (torch.stack([tensor] * 3), *longer):
                # Nothing reads Meta's mask token.
                assert key == "mask_token" or is_refused({**source.state_dict, key: wrong}), (key, wrong.shape)
    with pytest.raises(ValueError, match=r"without a place in the model: .*extra\.weight"):
        convert(case, {**source.state_dict, "extra.weight": torch.ones(1)}, source.config)


TRUNKS = [
    *("openai: CLIP", "open_clip: clipa", "open_clip: siglip", "timm: class token", "torch_encoder: MiniViT"),
    *("hf_clip: CLIPModel", "hf_clip: SiglipModel", "hf_clip: SiglipForImageClassification"),
    *("hf_vit: ViTForImageClassification", "hf_vit: DeiTForImageClassification"),
]


@pytest.mark.parametrize("name", TRUNKS)
def test_the_trunk_alone(name, made, tmp_path):
    case, source = NAMED_CASES[name], made(name)
    options = ConversionOptions(**case.options, trunk_only=True)
    differences = convert_checkpoint(source.path, tmp_path / "trunk", options)
    if case.layout != "openai":  # whose code runs whole models
        assert set(differences) == TRUNK and max(differences.values()) < 1e-4
    trunk = VitEmbedModel.from_pretrained(tmp_path / "trunk")
    assert trunk.config.architectures == ["VitEmbedModel"] and trunk.config.text_config is None
    whole = convert(case, source.state_dict, source.config).weights
    for key, tensor in trunk.state_dict().items():
        assert name.endswith("SiglipForImageClassification") or torch.equal(whole[f"vision_model.{key}"], tensor), key


# Options that override what the source has: its case, the options, the warning.
OVERRIDDEN = [
    ("openai: CLIP", {"num_attention_heads": 4, "text_num_attention_heads": 8}, None),
    (
        "open_clip: clip",
        {"hidden_act": "quick_gelu"},
        "--hidden_act quick_gelu overrides the source's activation, gelu",
    ),
    ("open_clip: clip", {"num_attention_heads": 2, "text_num_attention_heads": 6}, None),
    ("hf_clip: CLIPModel", {"hidden_act": "relu"}, "--hidden_act relu overrides the source's activation, gelu"),
    ("hf_vit: ViTModel", {"num_attention_heads": 8}, "--num_attention_heads 8 overrides the source's"),
    ("deepseek_ocr: whole model", {"num_attention_heads": 8}, "--num_attention_heads 8 overrides the source's"),
]


@pytest.mark.parametrize(("name", "options", "warning"), OVERRIDDEN)
def test_an_option_overrides_the_source(name, options, warning, made, tmp_path, caplog):
    case, source = NAMED_CASES[name], made(name)
    config = convert(case, source.state_dict, source.config, **options).config
    for option, value in options.items():
        tower = config.text_config if option.startswith("text_") else config
        assert getattr(tower, option.removeprefix("text_")) == value
    if "hidden_act" in options:  # of both towers
        assert config.text_config.hidden_act == options["hidden_act"]
    assert warning is None or warning in caplog.text
    if case.layout in ("hf_clip", "open_clip"):  # their own code, run with the option
        options = ConversionOptions(**options)
        assert max(convert_checkpoint(source.path, tmp_path / "ours", options).values()) < 1e-4


# Configs and tensors that contradict the others, by the case that they are tried on.

CONFIGS = {
    ("hf_clip: CLIPVisionModel", "hf_clip: SiglipVisionModel"): [
        ({"num_hidden_layers": 3}, "without a place in the model: .*layers.3"),
        ({"hidden_size": 36}, "another shape than the sizes"),
        ({"num_attention_heads": 5}, "num_attention_heads|number of attention heads"),
        ({"hidden_act": "mish"}, "hidden_act must be one of"),
        ({"image_size": 64}, "position_embedding.weight must be"),
        ({"image_size": "large"}, "image_size"),
    ],
    ("hf_clip: SiglipVisionModel",): [({"vision_use_head": False}, "vision_use_head=false")],
    ("hf_clip: CLIPModel",): [
        ({"model_type": name}, f"model_type '{name}' cannot be converted: ")
        for name in ("siglip2", "metaclip_2", "chinese_clip", "clipseg")
    ],
    ("hf_vit: ViTForImageClassification",): [
        ({"hidden_size": 64}, "hidden_size=64 .here 32"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2 .here 3"),
        ({"patch_size": 4, "image_size": 16}, "patch_size=.4, 4. .here"),
        ({"num_attention_heads": "four"}, "cannot be read as a ViTConfig|num_attention_heads must be"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"hidden_act": "mish"}, "hidden_act must be one of"),
        ({"model_type": "beit"}, "model_type vit or deit or vit_mae for these weights, got 'beit'"),
        ({"model_type": "deit"}, "model_type='deit', but there is no distillation token"),
    ],
    ("dinov2: Dinov2Model", "dinov2: Dinov2WithRegistersModel"): [
        ({"hidden_size": 64}, "hidden_size=64 .here 32"),
        ({"mlp_ratio": 3}, "intermediate_size=96 .here 64"),
        ({"image_size": 84}, "make 36 patches .here 25"),
        ({"model_type": "vit"}, "model_type dinov2 or dinov2_with_registers for these weights, got 'vit'"),
        ({"model_type": "dinov2_with_registers", "num_register_tokens": 5}, "says 5 registers"),
    ],
}
TENSORS = {
    ("openai: CLIP",): [
        ("visual.positional_embedding", torch.zeros(12, 128), "square grid.* 12 positions"),
        ("visual.conv1.weight", torch.zeros(128, 3, 8, 4), r"patches of \(8, 4\)"),
        ("visual.proj", torch.zeros(128, 0), r"visual.proj must be \(width, joint width\), got \(128, 0\)"),
        ("ln_final.bias", torch.zeros(64, dtype=torch.int64), "ln_final.bias must be a float tensor, got torch.int64"),
        ("vocab_size", torch.tensor(99), "vocab_size must be 100 as the weights say, got 99"),
        ("input_resolution", torch.tensor([32, 32]), "input_resolution must be 32"),
    ],
    ("hf_clip: SiglipModel",): [
        ("vision_model.embeddings.patch_embedding.weight", torch.ones(1, 32, 3, 8, 8), "embedding.weight must be"),
    ],
    ("hf_vit: ViTForImageClassification",): [
        ("vit.embeddings.patch_embeddings.projection.weight", torch.ones(32, 192), "patch height"),
        ("vit.embeddings.position_embeddings", torch.ones(1, 26, 32), "make 16 patches .here 25"),
        ("vit.encoder.layer.0.intermediate.dense.weight", torch.ones(40, 32), "intermediate_size=48 .here 40"),
        ("classifier.weight", torch.ones(6, 32), "names 5 classes in id2label, classifier.weight has 6"),
    ],
    ("dinov2: Dinov2Model of Meta", "dinov2: Dinov2WithRegistersModel of Meta"): [
        ("pos_embed", torch.ones(26, 32), "pos_embed must be"),
        ("pos_embed", torch.ones(1, 25, 32), "no square grid"),
        ("blocks.1.mlp.fc1.weight", torch.ones(60, 32), "blocks.1.mlp.fc1.weight must be"),
    ],
    ("deepseek_ocr: whole model",): [
        (f"model.vision_model.{key}", torch.ones(shape), message)
        for key, shape, message in (
            ("embeddings.patch_embedding.weight", (32, 192), "patch_embedding.weight must be .*channels"),
            ("embeddings.position_embedding.weight", (19, 32), "square grid.*19 positions"),
            ("embeddings.patch_embedding.weight", (32, 3, 8, 4), "square patches"),
            ("transformer.layers.1.mlp.fc2.bias", (33,), r"layers.1.mlp.fc2.bias must be \(32,\)"),
        )
    ],
    ("torch_encoder: MiniViT",): [
        ("encoder.layers.1.linear2.weight", torch.ones(32, 47), r"linear2.weight must be \(32, 48\)"),
        ("patch_embed.weight", torch.ones(32, 192), "patch_embed is a linear map of flattened patches"),
    ],
    ("torch_encoder: MiniViTDepth",): [
        ("decoder.0.weight", torch.ones(32, 16, 3, 3), "deconv_kernel_size must be an even")
    ],
}


def rows(table):
    return [(name, *row) for names, lines in table.items() for name in names for row in lines]


@pytest.mark.parametrize(("name", "changes", "message"), rows(CONFIGS))
def test_a_config_that_contradicts_the_weights_is_refused(made, name, changes, message):
    source, config = made(name), {**made(name).config, **changes}
    with pytest.raises(ValueError, match=message):
        convert(NAMED_CASES[name], source.state_dict, config)


@pytest.mark.parametrize(("name", "key", "tensor", "message"), rows(TENSORS))
def test_a_tensor_that_contradicts_the_others_is_refused(made, name, key, tensor, message):
    source = made(name)
    with pytest.raises(ValueError, match=message):
        convert(NAMED_CASES[name], {**source.state_dict, key: tensor}, source.config)


# What a file alone does not show, by the case that needs all of it.
ASKED = {
    "hf_vit: ViTForImageClassification": ("num_attention_heads", "hidden_act", "layer_norm_eps"),
    "dinov2: Dinov2Model": ("num_attention_heads", "hidden_act", "layer_norm_eps"),
    "timm: class token": ("num_attention_heads", "hidden_act", "layer_norm_eps", "pooling_type"),
    "torch_encoder: ViTTiny": ("num_attention_heads", "norm_position", "hidden_act", "layer_norm_eps"),
    "torch_encoder: MiniViT": ("num_attention_heads", "norm_position", "hidden_act"),
}
ANSWERS = {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-3, "pooling_type": "cls"}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, options in ASKED.items() for option in options])
def test_an_option_that_a_file_alone_needs_is_asked_for(made, name, option):
    options = {**{each: ANSWERS.get(each, "pre") for each in ASKED[name]}, option: None}
    with pytest.raises(ValueError, match=f"--{option}"):
        convert(NAMED_CASES[name], made(name).state_dict, {}, **options)


# A tensor of the source in another form of the same layout, of which the detection says why.
REASONS = {
    "hf_vit: ViTForImageClassification": "it has the keys of transformers' ViT, no config",
    "dinov2: Dinov2Model of Meta": "it has the keys of Meta's DINOv2, mask_token and layer scales among them",
    "open_clip: custom text": "it has open_clip's keys",
    "open_clip: siglip": "it has open_clip's keys",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_of_a_detection_is_given(made, name):
    assert detect_layout(made(name).state_dict, {}) == (NAMED_CASES[name].layout, REASONS[name])


NOT_OF_IT = {
    "hf_vit": "not a ViT of transformers; its own keys are visual.proj",
    "dinov2": "its own keys are visual.proj",
    "openai": r"not a CLIP in OpenAI's layout.*visual\.conv1\.weight.*\(6 in all\)",
}


@pytest.mark.parametrize("layout", NOT_OF_IT)
def test_weights_of_another_layout_are_refused(layout):
    with pytest.raises(ValueError, match=NOT_OF_IT[layout]):
        LAYOUTS[layout].convert({"visual.proj": torch.ones(2)}, {}, ConversionOptions())


# What another package cannot express: our class, fields of its config, the message.

UNFIT = {
    "openai": [
        (VitEmbedForContrastive, fields, f"OpenAI's CLIP cannot express this model: .*{message}")
        for fields, message in (
            ({"hidden_act": "gelu"}, "hidden_act='gelu' .it has 'quick_gelu'."),
            ({"num_register_tokens": 2}, "num_register_tokens=2"),
            ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06"),
            ({"contrastive_loss": "sigmoid"}, "contrastive_loss='sigmoid'"),
            ({"num_attention_heads": 4}, "num_attention_heads=4"),
            ({}, "intermediate_size=48"),
        )
    ]
    + [(VitEmbedModel, {}, "has a text tower, this model has none")],
    "hf_clip": [
        (VitEmbedModel, {"num_register_tokens": 2, "norm_type": "rms_norm"}, "num_register_tokens=2 .*norm_type='rms"),
        (VitEmbedModel, {"pooling_type": "map", "patch_bias": True}, "SiglipModel cannot .*use_cls_token=True"),
        (VitEmbedModel, {"image_size": (32, 16)}, r"image_size=\(32, 16\)"),
        (VitEmbedModel, {"pooling_type": "mean"}, "pooling_type='mean'"),
        (VitEmbedModel, {"final_norm_type": "none"}, "final_norm_type='none'"),
        (VitEmbedForImageClassification, {}, "no class for a VitEmbedForImageClassification"),
        (VitEmbedForContrastive, {"contrastive_loss": "sigmoid"}, "contrastive_loss='sigmoid'"),
        (VitEmbedForContrastive, {"text_config": tiny.SIGLIP_TEXT}, "text_config.pooling_type='last'"),
        (VitEmbedForContrastive, {**tiny.SIGLIP, "text_config": tiny.TEXT}, "text_config.projection_bias=False"),
        (VitEmbedForContrastive, {**tiny.SIGLIP, "contrastive_loss": "softmax"}, "contrastive_loss='softmax'"),
    ],
    "open_clip": [
        (VitEmbedForContrastive, fields, message)
        for fields, message in (
            ({"num_register_tokens": 2}, "num_register_tokens=2"),
            ({"patch_bias": True, "position_embedding_type": "sinusoidal"}, "patch_bias=True .*, position_embedding_t"),
            ({"hidden_act": "gelu"}, "hidden_act='gelu' with text_config.hidden_act='quick_gelu'"),
            ({"hidden_act": "relu"}, "hidden_act='relu'"),
            ({"final_norm_type": "none"}, "final_norm_type='none'"),
            (tiny.SIGLIP, "in sizes that timm has names for.*: num_attention_heads=4"),
        )
    ]
    + [(VitEmbedModel, {}, "open_clip's models are dual encoders, this is a VitEmbedModel")],
    "timm": [
        (VitEmbedModel, fields, f"VisionTransformer cannot express.*{message}")
        for fields, message in (
            ({"norm_position": "post"}, "norm_position='post'"),
            ({"stem_type": "linear"}, "stem_type='linear'"),
            ({"patch_bias": True}, "patch_bias=True"),
            ({"position_embedding_type": "sinusoidal"}, "position_embedding_type='sinusoidal'"),
            ({"final_norm_type": "rms_norm"}, "final_norm_type='rms_norm'"),
            ({"norm_type": "rms_norm", "pooling_type": "map"}, "norm_type='rms_norm'"),
        )
    ]
    + [(VitEmbedForContrastive, {}, "no place for a text tower.*VitEmbedModelWithProjection")],
}
for layout, name in [(layout, name) for layout in UNFIT for name in ("token_merge_size", "pad_to_patch")]:
    if (layout, name) != ("timm", "pad_to_patch"):  # timm's dynamic_img_pad
        changes = {name: 2 if name == "token_merge_size" else True}
        UNFIT[layout].append((VitEmbedForContrastive, changes, f"cannot express this model: {name}="))


@pytest.mark.parametrize(
    ("layout", "model_class", "fields", "message"), [(layout, *row) for layout in UNFIT for row in UNFIT[layout]]
)
def test_what_another_package_cannot_express_is_refused(layout, model_class, fields, message, tmp_path):
    make = tiny.dual_config if model_class is VitEmbedForContrastive else tiny.vision_config
    model_class(make(**fields)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        restore_checkpoint(tmp_path / "ours", layout, output_file=tmp_path / "back.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
