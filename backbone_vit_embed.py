"""What dense models of transformers ask of a backbone."""


class BackboneMixin:
    """Names, places and channels of the maps that a backbone gives, from its config."""

    @property
    def out_features(self) -> list[str]:
        """Names of the stages returned, among `config.stage_names`."""
        return self.config.out_features

    @property
    def out_indices(self) -> list[int]:
        """Their places among `stage_names`."""
        return [self.stage_names.index(name) for name in self.out_features]

    @property
    def stage_names(self) -> list[str]:
        """Every stage: maps of the stem if it has them, the input of the first layer, then the output of each."""
        return self.config.stage_names

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Channels of each stage: D, but for the stem's maps."""
        widths = self.config.pyramid_widths
        return {
            name: widths[i] if i < len(widths) else self.config.hidden_size for i, name in enumerate(self.stage_names)
        }

    @property
    def channels(self) -> list[int]:
        """Channels of each map returned."""
        return [self.out_feature_channels[name] for name in self.out_features]
