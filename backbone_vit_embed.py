"""What dense models of transformers ask of a backbone, on any version."""

import torch

from .configuration_vit_embed import VitEmbedConfig
from .tokens_vit_embed import Tokens, feature_map, token_sequence

try:
    from transformers.backbone_utils import BackboneType
except ImportError:  # before transformers 5.2
    from transformers.utils.backbone_utils import BackboneType  # type: ignore[attr-defined,no-redef]


class BackboneMixin:
    """Names, places and channels of the maps that a backbone gives, from its config."""

    config: VitEmbedConfig
    backbone_type = BackboneType.TRANSFORMERS
    has_attentions = True

    @property
    def out_features(self) -> list[str]:
        """Names of the stages returned, among `stage_names`; may be set."""
        return self.config.out_features

    @out_features.setter
    def out_features(self, names: list[str] | None) -> None:
        self.config.out_features = names

    @property
    def out_indices(self) -> list[int]:
        """Their places among `stage_names`; may be set."""
        return self.config.out_indices

    @out_indices.setter
    def out_indices(self, indices: list[int] | None) -> None:
        self.config.out_indices = indices

    @property
    def stage_names(self) -> list[str]:
        """Every stage: maps of the stem if it has them, the input of the first layer, then the output of each."""
        return self.config.stage_names

    @property
    def num_features(self) -> list[int]:
        """Channels of each stage: those of the stem's maps, then D."""
        widths = self.config.pyramid_widths
        return [*widths, *[self.config.hidden_size] * (len(self.stage_names) - len(widths))]

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Channels of each stage, by its name."""
        return dict(zip(self.stage_names, self.num_features))

    @property
    def channels(self) -> list[int]:
        """Channels of each map returned."""
        return [self.out_feature_channels[name] for name in self.out_features]

    def _stages_by_part(self) -> tuple[list[int], list[int]]:
        """The stages returned, each once: numbers of the stem's maps, and of the trunk's hidden states."""
        num_maps, places = len(self.config.pyramid_widths), sorted(set(self.out_indices))
        return [i for i in places if i < num_maps], [i - num_maps for i in places if i >= num_maps]

    def _feature_maps(self, pyramid: list[torch.Tensor], stages: tuple[Tokens, ...]) -> tuple[torch.Tensor, ...]:
        """The maps in the order of `out_features`, from those of `_stages_by_part`."""
        num_prefix_tokens = self.config.num_prefix_tokens
        form = feature_map if self.config.reshape_hidden_states else token_sequence
        maps = dict(zip(sorted(set(self.out_indices)), [*pyramid, *(form(each, num_prefix_tokens) for each in stages)]))
        return tuple(maps[index] for index in self.out_indices)

    def forward_with_filtered_kwargs(self, *args, **kwargs):
        """What transformers' dense models call; the same as calling the backbone."""
        return self(*args, **kwargs)
