"""CLIP and ViT in one trunk: the two towers, and the classes that the Auto classes load.

Symbols, used in every shape comment: B batch, C channels, H W image pixels, gh gw patch rows and columns,
N = gh * gw patches, P prefix tokens (class token and registers), L = P + N, T text tokens, D hidden size, h heads.
Height comes before width everywhere.

The state dict of `VitEmbedForContrastive` is that of `transformers.CLIPModel`, key for key.

The rules of a forward pass, which tests/model/test_forward_rules.py holds every class to:

1. Submodules are called. Nobody reads another module's weights, so hooks, compilation, sharding, offload and adapters
   work on any of them.
2. Dtype and device come from the inputs or a named weight of the same module: a replica of `nn.DataParallel` has no
   `parameters()`.
3. Shapes come from `.shape`, and no branch of a recorded graph depends on values. No argument is keyword-only: torch's
   older exporter gives all of them by position.
4. Collectives belong to training steps: evaluation and passes without gradients are local.
5. No parameter is written to.
6. Losses take `num_items_in_batch`, so a step cut into batches and processes is the step in one.
7. Parts may lie on different devices.
8. A layer that is a layer of torch behaves as one.
9. On an accelerator a training step does not make the host wait, but for what `ChecksValues` and docstrings say.
10. What was not asked for is not kept.
11. What is frozen does not move, running statistics included.
"""

from collections.abc import Collection

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    DepthEstimatorOutput,
    ImageClassifierOutput,
)
from typing_extensions import Unpack

# Of remote code transformers 4 copies what its entry file imports: every file is imported here.
from .activations_vit_embed import activation  # noqa: F401
from .backbone_vit_embed import BackboneMixin
from .card_vit_embed import model_card  # noqa: F401
from .classification_vit_embed import classification_loss
from .combinations_vit_embed import (
    BACKBONE_COMBINATIONS,
    CONTRASTIVE_COMBINATIONS,
    DEPTH_COMBINATIONS,
    MASKED_COMBINATIONS,
    Combination,
    check_combinations,
)
from .configuration_vit_embed import VitEmbedConfig, VitEmbedTextConfig
from .contrastive_vit_embed import SIGMOID_LOGIT_BIAS_INIT, ContrastiveMixin, contrastive_logits, contrastive_loss
from .depth_vit_embed import DEPTH_HEADS, depth_loss, evenly_spaced_layers, predict_depth
from .embeddings_vit_embed import VitEmbedEmbeddings, VitEmbedTextEmbeddings, in_whole_patches
from .encoder_vit_embed import NORMS, QUERY_SUBSET, VitEmbedEncoder
from .initialisation_vit_embed import initialise
from .inputs_vit_embed import (
    ChecksValues,
    check_every_patch,
    check_images,
    check_pyramid_inputs,
    check_some_input,
    check_texts,
    is_on_host,
    is_traced,
)
from .losses_vit_embed import step_loss, with_stem_loss
from .masked_vit_embed import VitEmbedPatchDecoder, blanked, masked_error, patch_statistics, seen_patches
from .optimized_vit_embed import OptimizedMixin
from .options_vit_embed import OPTIONS  # noqa: F401
from .outputs_vit_embed import (
    ImageOptions,
    OutputOptions,
    VitEmbedContrastiveOutput,
    VitEmbedMaskedImageModelingOutput,
    VitEmbedModelOutput,
    VitEmbedProjectionOutput,
    VitEmbedTextProjectionOutput,
    asked_for,
    with_return_dict,
)
from .pooling_vit_embed import POOLINGS, AttentionPooling, read_texts
from .prefixes_vit_embed import prefix_tree
from .projection_vit_embed import ImageProjectionMixin, TextProjectionMixin, text_projection, visual_projection
from .saving_vit_embed import MADE, CheckpointMixin, ImageCheckpointMixin, other_parts
from .stem_layers_vit_embed import patchify, unpatchify
from .stems_vit_embed import STEMS
from .token_maps_vit_embed import TokenMapsMixin
from .tokens_vit_embed import KeptPatches, Tokens, feature_map, select_rows
from .tower_vit_embed import AutoModelMixin, ImageTowerMixin, TextTowerMixin, TowerMixin
from .zero_shot_vit_embed import VitEmbedZeroShotPipeline  # noqa: F401


class VitEmbedTower(OptimizedMixin, TowerMixin, ChecksValues, CheckpointMixin, PreTrainedModel):
    """What the image and the text side share."""

    # What the class asks of its config beyond what every config has to be.
    combinations: tuple[Combination, ...] = ()

    def __init__(self, config: VitEmbedConfig | VitEmbedTextConfig):
        config.validate_architecture()  # fields may have been set since the config was made
        check_combinations(config, self.combinations)
        super().__init__(config)
        MADE.add(self)

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)


class VitEmbedTextPreTrainedModel(TextTowerMixin, VitEmbedTower):
    """Everything with a text tower alone."""


class VitEmbedTextModel(VitEmbedTextPreTrainedModel):
    """The text tower: a transformer whose last state is normalised and read at one token; CLIP's is causal and read at
    the end-of-text token.

    Where `config.reads_padding`, what comes after a text changes its vector. Such towers were trained on rows of one
    length, so rows are padded here to `max_position_embeddings` tokens of `pad_token_id`, and so is what attention_mask
    hides: the result does not depend on how much padding the tokenizer gave.
    """

    is_tower = True

    def __init__(self, config: VitEmbedTextConfig):
        super().__init__(config)
        self.embeddings = VitEmbedTextEmbeddings(config)
        self.encoder = VitEmbedEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.token_embedding = value  # type: ignore[assignment]

    @with_return_dict
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pooled_only: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        share_prefixes: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids: (B, T) token ids, padded after the text; with pooling_type="eos" each row with its end-of-text
                token.
            attention_mask: (B, T) of the tokenizer. What comes after the end token cannot be seen before it under a
                causal mask, so there it changes nothing; it is checked, as padding in front would. Where
                `config.reads_padding`, what it hides is padding, whatever ids are there.
            position_ids: (1, T) or (B, T), which position each token has; None counts from 0.
            pooled_only: gives pooler_output alone, for less work: of the last layer the pooled rows, and on a CPU no
                token after the batch's last end of text where nothing reads the padding. Exact, as nothing else can
                reach them.
            output_attentions, output_hidden_states, return_dict: as in transformers.
            share_prefixes: whether, with pooled_only, what texts begin with in common is computed once, and equal texts
                are: exact, as a causal token sees those before it alone. The layers then compute one row (1, N, D).
                None: in evaluation on a CPU where it saves enough tokens to pay and no module has a hook. True:
                wherever it can be done, the host waiting for the ids: not in a bidirectional tower, with position_ids,
                in training mode, in a recorded graph, or with flash and flex attention.

        Returns:
            last_hidden_state (B, T, D) after the final norm, pooler_output (B, D) of the token that `pooling_type`
            names; hidden_states, one more than layers, before the final norm; attentions (B, h, T, T) a layer. Where
            `config.reads_padding`, T is `max_position_embeddings`.

        Raises:
            TypeError: an input that is no tensor.
            ValueError: more tokens than `max_position_embeddings`, another shape or dtype; and, as far as
                `input_checks` says, an id outside the vocabulary, a row without an end token that is to be pooled
                there, padding on the left.
        """
        config = self.config
        check_texts(config, input_ids, attention_mask, position_ids)
        output_attentions, output_hidden_states = asked_for(config, output_attentions, output_hidden_states)
        pooled_only = pooled_only and not (output_attentions or output_hidden_states)
        input_ids, pooled = read_texts(config, input_ids, attention_mask, self.checks_values(input_ids))
        if pooled_only and position_ids is None:
            tree = prefix_tree(self, input_ids, pooled, QUERY_SUBSET, share_prefixes)
            if tree is not None:
                states = self.embeddings(tree.input_ids, tree.position_ids)  # (1, N, D)
                states = self.final_layer_norm(self.encoder(states, tree=tree).last.states)[0]
                return BaseModelOutputWithPooling(pooler_output=states[tree.text_of_row.to(states.device)])
        if pooled_only and not config.reads_padding and is_on_host(input_ids) and not is_traced():
            num_read = int(pooled.max()) + 1
            input_ids = input_ids[:, :num_read]
            position_ids = None if position_ids is None else position_ids[:, :num_read]
        hidden_states = self.embeddings(input_ids, position_ids)  # (B, T, D)
        pooled = pooled[:, None].to(hidden_states.device)  # (B, 1)
        one_row = pooled_only and config._attn_implementation in QUERY_SUBSET
        encoded = self.encoder(
            hidden_states,
            is_causal=config.use_causal_mask,
            stages=range(config.num_hidden_layers + 1) if output_hidden_states else (),
            output_attentions=output_attentions,
            last_rows=pooled if one_row else None,
        )
        last = encoded.last.states  # (B, T, D), or (B, 1, D) of the pooled rows
        if pooled_only:
            last = self.final_layer_norm(last if one_row else select_rows(last, pooled))
            return BaseModelOutputWithPooling(pooler_output=last[:, 0])
        last = self.final_layer_norm(last)
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=select_rows(last, pooled)[:, 0],  # (B, D)
            hidden_states=encoded.hidden_states if output_hidden_states else None,
            attentions=encoded.attentions,
        )


class VitEmbedPreTrainedModel(ImageTowerMixin, ImageCheckpointMixin, VitEmbedTower):
    """Everything with an image tower."""


class VitEmbedModel(TokenMapsMixin, VitEmbedPreTrainedModel):
    """The image tower: pixels, or another encoder's patch features, -> tokens and one pooled vector."""

    is_tower = True

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = VitEmbedEmbeddings(config)
        # (sic) the name in every CLIP checkpoint
        self.pre_layrnorm = NORMS[config.norm_type if config.use_pre_layernorm else "none"](width, eps=eps)
        self.encoder = VitEmbedEncoder(config)
        self.post_layernorm = NORMS[config.resolved_final_norm_type](width, eps=eps)
        self.pooler = AttentionPooling(config) if config.pooling_type == "map" else None
        self.post_init()

    @with_return_dict
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        pooled_only: bool = False,
        stages: Collection[int] | None = None,
        kept: KeptPatches | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> VitEmbedModelOutput:
        """
        Args:
            pixel_values: (B, C, H, W), normalised; H and W any multiples of the patch, or any with `pad_to_patch`.
            patch_embeds: (B, D, gh, gw) of another encoder, in place of pixel_values.
            pixel_mask: (B, H, W) for images of different sizes: 1 in the image, which lies in the top left corner, 0 in
                the padding. Each image then gives what it gives alone; its tokens come first in its row. The sizes are
                read from the device.
            interpolate_pos_encoding: as in transformers; here positions are resampled to any grid unless this is False,
                which refuses other sizes than `image_size`.
            pooled_only: gives pooler_output alone, for less work: the last layer computes the class token only.
            stages: numbers of hidden states to give normalised, with their layouts, as `stages` in the order of their
                numbers, in place of the pooled vector: 0 is the input of layer 1, i the output of layer i.
            kept: the patches to go on with; None for all.
            output_attentions, output_hidden_states, return_dict: as in transformers.

        Returns:
            last_hidden_state (B, L, D) before the final norm, pooler_output (B, D) after it; hidden_states, one more
            than layers, the first of them the input of layer 1; attentions (B, h, L, L) a layer; feature_pyramid of a
            stem that has one. L is the prefix and one token a patch, fewer where the config reduces tokens.

        Raises:
            TypeError: an input that is no tensor.
            ValueError: not exactly one input, or one of the wrong shape or dtype.
        """
        config = self.config
        check_images(config, pixel_values, patch_embeds, pixel_mask, interpolate_pos_encoding, self.training)
        output_attentions, output_hidden_states = asked_for(config, output_attentions, output_hidden_states)
        pooled_only = pooled_only and not (output_attentions or output_hidden_states)
        states, layout, feature_pyramid, stem_loss = self.embeddings(pixel_values, patch_embeds, pixel_mask, kept)
        states = self.pre_layrnorm(states)  # (B, L, D)
        one_row = pooled_only and config.pooling_type == "cls" and config._attn_implementation in QUERY_SUBSET
        encoded = self.encoder(
            states,
            layout=layout,
            stages=range(config.num_hidden_layers + 1) if output_hidden_states else stages or (),
            output_attentions=output_attentions,
            last_rows=slice(0, 1) if one_row else None,  # the class token
        )
        pooler_output = None
        if stages is None:
            pooler_output = POOLINGS[config.pooling_type](encoded.last, config, self.post_layernorm, self.pooler)
        else:
            stages = tuple(self._normalised(encoded.stages[number]) for number in sorted(set(stages)))
        return VitEmbedModelOutput(
            last_hidden_state=None if pooled_only else encoded.last.states,
            pooler_output=pooler_output,  # (B, D)
            hidden_states=encoded.hidden_states if output_hidden_states else None,
            attentions=encoded.attentions,
            feature_pyramid=feature_pyramid,
            stem_loss=stem_loss if self.training else None,
            stages=stages,
        )

    def _normalised(self, tokens: Tokens) -> Tokens:
        return tokens._replace(states=self.post_layernorm(tokens.states))


class VitEmbedForImageClassification(VitEmbedPreTrainedModel):
    """A linear classifier on the pooled vector."""

    accepts_loss_kwargs = True

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        self.vision_model = VitEmbedModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @with_return_dict
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **options: Unpack[ImageOptions],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values, patch_embeds, pixel_mask, options: as in VitEmbedModel.
            labels: (B,) class numbers, for cross-entropy, -100 for a row to leave out. With `problem_type=
                "multi_label_classification"` (B, num_labels) in [0, 1], -100 or NaN for an entry to leave out, for
                binary cross-entropy; with "regression" numbers (B, num_labels), or (B,) for one label, for the mean
                squared error.
            num_items_in_batch: label entries of all the batches of this training step that are not -100, as Trainer
                counts them; None for those of this batch.

        Returns:
            loss if labels were given, logits (B, num_labels).

        Raises:
            TypeError: an input that is no tensor.
            ValueError: labels of the wrong shape; and, as far as `input_checks` says, class numbers outside
                [0, num_labels) or multi-label targets outside [0, 1].
        """
        images = self.vision_model(
            pixel_values, patch_embeds, pixel_mask, pooled_only=True, return_dict=True, **options
        )
        logits, loss = self.classifier(images.pooler_output), None
        if labels is not None:
            sums = classification_loss(self.config, logits, labels, self)
            loss = step_loss(*sums, num_items_in_batch, images.stem_loss)
        return ImageClassifierOutput(loss, logits, images.hidden_states, images.attentions)


class VitEmbedForDepthEstimation(VitEmbedPreTrainedModel):
    """A dense head that predicts a depth for every pixel from the patch grid of one or four layers."""

    image_processor_type = "DPTImageProcessor"
    accepts_loss_kwargs = True
    combinations = DEPTH_COMBINATIONS

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        self.vision_model = VitEmbedModel(config)
        self._freeze_pooler()
        self.depth_head = DEPTH_HEADS[config.depth_head_type](config)
        self.taps = evenly_spaced_layers(config.num_hidden_layers, self.depth_head.num_taps)
        if config.use_feature_pyramid:  # the stem's maps of strides p / 4 and p / 2 take the place of the shallow ones
            self.taps = self.taps[2:]
        self.post_init()

    @with_return_dict
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **options: Unpack[ImageOptions],
    ) -> DepthEstimatorOutput:
        """
        Args:
            pixel_values, patch_embeds, pixel_mask, options: as in VitEmbedModel.
            labels: (B, H', W') depths of any real type in the unit to be predicted; entries <= 0, beyond `max_depth`,
                NaN or infinite are left out. The prediction is resized to them for the loss, which is the mean over
                images of each image's loss.
            num_items_in_batch: label entries of all the batches of this training step that are not -100, as Trainer
                counts them; None for those of this batch.

        Returns:
            loss if labels were given; predicted_depth (B, H, W) > 0, in metres up to `max_depth`, unitless without one;
            any number with depth_activation="identity".

        Raises:
            TypeError: an input that is no tensor.
            ValueError: labels that are not one map of depths an image, or that depth_loss="silog" is to compare with
                depths that may be negative.
        """
        config = self.config
        if config.use_feature_pyramid:
            check_pyramid_inputs(patch_embeds, pixel_mask, "use_feature_pyramid=True")
        images = self.vision_model(
            pixel_values, patch_embeds, pixel_mask, stages=self.taps, return_dict=True, **options
        )
        pyramid = images.feature_pyramid[-3:-1] if config.use_feature_pyramid else ()
        maps = (*pyramid, *(feature_map(tokens, config.num_prefix_tokens) for tokens in images.stages))
        depth, loss = predict_depth(self.depth_head, config, maps, pixel_values, pixel_mask), None  # (B, H, W)
        if labels is not None:
            sums = depth_loss(config, depth, labels, pixel_mask)
            loss = step_loss(*sums, num_items_in_batch, images.stem_loss)
        return DepthEstimatorOutput(loss, depth, images.hidden_states, images.attentions)


class VitEmbedModelWithProjection(ImageProjectionMixin, VitEmbedPreTrainedModel):
    """The image tower of a dual encoder with its projection into the joint space, without the text tower."""

    _keys_to_ignore_on_load_unexpected = other_parts("text_model", "text_projection", "logit_(scale|bias)", "decoder")

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        self.vision_model = VitEmbedModel(config)
        self.visual_projection = visual_projection(config)
        self.post_init()

    @with_return_dict
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        **options: Unpack[ImageOptions],
    ) -> VitEmbedProjectionOutput:
        """Inputs as in VitEmbedModel. Returns as VitEmbedProjectionOutput says; `get_image_features` gives the same
        image_embeds for less work."""
        images = self.vision_model(pixel_values, patch_embeds, pixel_mask, return_dict=True, **options)
        image_embeds = self.visual_projection(images.pooler_output)  # (B, projection_dim)
        return VitEmbedProjectionOutput(
            image_embeds=image_embeds,
            pooler_output=image_embeds,
            last_hidden_state=images.last_hidden_state,
            hidden_states=images.hidden_states,
            attentions=images.attentions,
            stem_loss=images.stem_loss,
        )


class VitEmbedTextModelWithProjection(TextProjectionMixin, VitEmbedTextPreTrainedModel):
    """The text tower of a dual encoder with its projection into the joint space, without the image tower."""

    _keys_to_ignore_on_load_unexpected = other_parts("vision_model", "visual_projection", "logit_(scale|bias)")

    def __init__(self, config: VitEmbedTextConfig):
        super().__init__(config)
        self.text_model = VitEmbedTextModel(config)
        self.text_projection = text_projection(config, config.projection_dim)
        self.post_init()

    @with_return_dict
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **options: Unpack[OutputOptions],
    ) -> VitEmbedTextProjectionOutput:
        """Inputs as in VitEmbedTextModel. Returns as VitEmbedTextProjectionOutput says; `get_text_features` gives the
        same text_embeds for less work."""
        texts = self.text_model(input_ids, attention_mask, position_ids, return_dict=True, **options)
        return VitEmbedTextProjectionOutput(
            text_embeds=self.text_projection(texts.pooler_output),  # (B, projection_dim)
            last_hidden_state=texts.last_hidden_state,
            hidden_states=texts.hidden_states,
            attentions=texts.attentions,
        )


class VitEmbedForContrastive(ContrastiveMixin, ImageProjectionMixin, TextProjectionMixin, VitEmbedPreTrainedModel):
    """CLIP: images and texts in one space, where a cosine says how well they go together."""

    has_text_tower = True
    combinations = CONTRASTIVE_COMBINATIONS
    input_modalities = ("image", "text")  # type: ignore[assignment]
    _no_split_modules = ["VitEmbedEmbeddings", "VitEmbedTextEmbeddings", "VitEmbedLayer"]
    _keys_to_ignore_on_load_unexpected = other_parts("decoder")

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        self.vision_model = VitEmbedModel(config)
        self.text_model = VitEmbedTextModel(config.text_config)
        self.visual_projection = visual_projection(config)
        self.text_projection = text_projection(config.text_config, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        has_bias = config.contrastive_loss == "sigmoid"
        self.logit_bias = nn.Parameter(torch.tensor(SIGMOID_LOGIT_BIAS_INIT)) if has_bias else None
        self.post_init()

    @with_return_dict
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        return_loss: bool = True,
        position_ids: torch.Tensor | None = None,
        group_ids: torch.Tensor | None = None,
        gather_loss: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **options: Unpack[OutputOptions],
    ) -> VitEmbedContrastiveOutput:
        """
        Args:
            pixel_values, patch_embeds, pixel_mask, interpolate_pos_encoding, options: images, as in VitEmbedModel.
                Without images only text_embeds are returned.
            input_ids, attention_mask, position_ids: texts, as in VitEmbedTextModel. Without texts only image_embeds
                are returned.
            return_loss: whether to return the loss; there is one where image i and text i are a pair, so with
                as many images as texts.
            group_ids: (B,) int64, for batches in which several pairs say the same, as equal captions do: image i and
                text j of pairs with equal ids are not negatives of each other in the loss. Under torch.distributed
                every process gives them, or none.
            gather_loss: whether the loss is that of the joined batch of all processes of torch.distributed, for which
                every process has to make this call. None: in a training step (training mode, gradients on), and in no
                other pass. The processes tell each other the sizes of their batches, which the host waits for.

        Returns:
            as VitEmbedContrastiveOutput says.

        Raises:
            TypeError: an input that is no tensor.
            ValueError: neither images nor texts, a bad input to a tower, or group_ids of another shape or type.
        """
        check_some_input(pixel_values, patch_embeds, input_ids)
        images, texts, logits, loss = VitEmbedModelOutput(), BaseModelOutputWithPooling(), None, None
        if pixel_values is not None or patch_embeds is not None:
            image_options = {**options, "interpolate_pos_encoding": interpolate_pos_encoding}
            images = self._in_chunks(self._image_embeds, (pixel_values, patch_embeds, pixel_mask), image_options)
        if input_ids is not None:
            texts = self._in_chunks(self._text_embeds, (input_ids, attention_mask, position_ids), options)
        image_embeds, text_embeds = images.pooler_output, texts.pooler_output  # (B, projection_dim), unit length
        if image_embeds is not None and text_embeds is not None:
            scale = (self.logit_scale, self.logit_bias)
            logits = contrastive_logits(image_embeds, text_embeds, *scale)  # (images, texts)
            if return_loss and logits.shape[0] == logits.shape[1]:
                gather = self._is_training_step if gather_loss is None else gather_loss
                loss = contrastive_loss(self.config, logits, image_embeds, text_embeds, *scale, group_ids, gather)
                loss = with_stem_loss(loss, images.stem_loss)
        return VitEmbedContrastiveOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.t(),
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            hidden_states=images.hidden_states,
            attentions=images.attentions,
            text_hidden_states=texts.hidden_states,
            text_attentions=texts.attentions,
            pooler_output=image_embeds if text_embeds is None else None,
        )


class VitEmbedForMaskedImageModeling(VitEmbedPreTrainedModel):
    """Masked autoencoding: the trunk sees a few patches, a light decoder predicts the pixels of the others.

    Source: arXiv:2111.06377 section 3. Stems that mix the pixels of neighbouring patches get images with the hidden
    patches blanked, so that nothing of them leaks.
    """

    combinations = MASKED_COMBINATIONS

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        self.vision_model = VitEmbedModel(config)
        self._freeze_pooler()
        self.decoder = VitEmbedPatchDecoder(config.decoder_config(), config.hidden_size)
        self.decoder.config._attn_implementation = self.config._attn_implementation
        self.post_init()

    @with_return_dict
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        return_loss: bool = True,
        num_items_in_batch: torch.Tensor | int | None = None,
        **options: Unpack[ImageOptions],
    ) -> VitEmbedMaskedImageModelingOutput:
        """
        Args:
            pixel_values, options: as in VitEmbedModel.
            bool_masked_pos: (B, N) or (B, gh, gw) bool, True for patches to hide, at least one of each image left; None
                hides `mask_ratio` of them at random. How many are left is read from the device.
            return_loss: whether to return the loss. It needs no labels; padding of `pad_to_patch` counts as pixels of
                0.
            num_items_in_batch: hidden patches of all the batches of this training step; None for the mean over the
                images of this batch.

        Returns:
            loss: mean squared error over the values of the hidden patches, each patch less its mean and over its
                standard deviation with `norm_pix_loss`.
            reconstruction: (B, C, H, W), what the decoder predicts for every patch, in the units of pixel_values; with
                `norm_pix_loss` each patch gets the mean and deviation of the picture's own.
            mask: (B, gh, gw) bool, True for the hidden patches. hidden_states, attentions: of the trunk.

        Raises:
            TypeError: an input that is no tensor.
            ValueError: a mask of the wrong shape, or one that hides a whole image.
        """
        config, patch = self.config, self.config.patch_shape
        check_images(config, pixel_values)
        batch, _, height, width = pixel_values.shape
        grid_size, padded = config.grid_of((height, width)), in_whole_patches(config, pixel_values)
        seen = seen_patches(bool_masked_pos, batch, grid_size, config.mask_ratio, pixel_values.device)  # (B, N)
        visible = padded if STEMS[config.stem_type].is_local else blanked(padded, seen.mask, grid_size, patch)
        last = [config.num_hidden_layers]
        images = self.vision_model(visible, stages=last, kept=seen, return_dict=True, **options)
        predicted = self.decoder(images.stages[0], config.num_prefix_tokens).float()  # (B, N, C * ph * pw)
        patches, hidden = patchify(padded.float(), patch).to(predicted.device), ~seen.mask.to(predicted.device)
        mean, deviation = patch_statistics(patches) if config.norm_pix_loss else (0.0, 1.0)
        loss = None
        if return_loss:
            loss = masked_error(predicted, (patches - mean) / deviation, hidden, num_items_in_batch)
        reconstruction = unpatchify(predicted.detach() * deviation + mean, grid_size, patch)
        return VitEmbedMaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction[..., :height, :width],
            mask=hidden.reshape(batch, *grid_size),
            hidden_states=images.hidden_states,
            attentions=images.attentions,
        )


class VitEmbedBackbone(BackboneMixin, VitEmbedPreTrainedModel):
    """The trunk as a feature extractor for dense models of transformers (segmentation, detection, depth)."""

    combinations = BACKBONE_COMBINATIONS

    def __init__(self, config: VitEmbedConfig):
        super().__init__(config)
        self.vision_model = VitEmbedModel(config)
        self._freeze_pooler()
        self.post_init()

    @with_return_dict
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_embeds: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        **options: Unpack[ImageOptions],
    ) -> BackboneOutput:
        """Inputs as in VitEmbedModel. Returns feature_maps, one for each of `out_features`: (B, D, gh, gw) after the
        final norm, with `reshape_hidden_states=False` tokens (B, L, D), or the stem's (B, C_i, H_i, W_i) as it is."""
        check_every_patch(self.config, self.training)
        from_stem, from_trunk = self._stages_by_part()
        if from_stem:
            check_pyramid_inputs(patch_embeds, pixel_mask, f"out_features={self.out_features}")
        images = self.vision_model(
            pixel_values, patch_embeds, pixel_mask, stages=from_trunk, return_dict=True, **options
        )
        maps = self._feature_maps([images.feature_pyramid[index] for index in from_stem], images.stages)
        return BackboneOutput(maps, images.hidden_states, images.attentions)


class VitEmbedAutoModel(AutoModelMixin, VitEmbedPreTrainedModel):
    """What AutoModel loads: both towers where the checkpoint has a text tower, else the image tower, with its
    projection where it was saved with one."""

    @classmethod
    def class_for(cls, config: PretrainedConfig) -> type[VitEmbedPreTrainedModel]:
        """The class that a config describes."""
        if config.text_config is not None:
            return VitEmbedForContrastive
        with_projection = config.architectures == [VitEmbedModelWithProjection.__name__]
        return VitEmbedModelWithProjection if with_projection else VitEmbedModel


class VitEmbedTextAutoModel(AutoModelMixin, VitEmbedTextPreTrainedModel):
    """What AutoModel loads of a text tower's folder: the tower, with its projection where it was saved with one."""

    @classmethod
    def class_for(cls, config: PretrainedConfig) -> type[VitEmbedTextPreTrainedModel]:
        """The class that a config describes."""
        with_projection = config.architectures == [VitEmbedTextModelWithProjection.__name__]
        return VitEmbedTextModelWithProjection if with_projection else VitEmbedTextModel


VitEmbedModel.register_for_auto_class("AutoModel")
VitEmbedModelWithProjection.register_for_auto_class("AutoModel")
VitEmbedTextModel.register_for_auto_class("AutoModel")
VitEmbedTextModelWithProjection.register_for_auto_class("AutoModel")
VitEmbedForImageClassification.register_for_auto_class("AutoModelForImageClassification")
VitEmbedForDepthEstimation.register_for_auto_class("AutoModelForDepthEstimation")
VitEmbedForContrastive.register_for_auto_class("AutoModelForZeroShotImageClassification")
VitEmbedForMaskedImageModeling.register_for_auto_class("AutoModelForMaskedImageModeling")
VitEmbedBackbone.register_for_auto_class("AutoBackbone")
