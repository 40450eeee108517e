"""How weights start: CLIP's initialisation, as in its reference code (arXiv:2103.00020 section 2.4)."""

from typing import Any

from torch import nn


def fill(parameter: Any, initialise, **options) -> None:
    """Initialises a parameter, or a norm's statistic, where there is one.

    `initialise` is a function of `torch.nn.init`: those are what transformers 5 keeps from touching a loaded weight.
    """
    if parameter is not None:
        initialise(parameter, **options)


def linear(width_in: int, width_out: int, std: float, bias: bool = True) -> nn.Linear:
    """A linear layer that knows the standard deviation its weight starts with, as any layer may, in `init_std`.

    It has to know it itself: transformers 5 calls `_init_weights` of custom code only for modules that own parameters,
    so an attention block is never asked to initialise its projections.
    """
    layer = nn.Linear(width_in, width_out, bias=bias)
    layer.init_std = std  # type: ignore[assignment]
    return layer


def _norm(module: nn.Module, config: Any) -> None:
    fill(module.weight, nn.init.ones_)
    fill(getattr(module, "bias", None), nn.init.zeros_)


def _batch_norm(module: nn.BatchNorm2d, config: Any) -> None:
    _norm(module, config)
    fill(module.running_mean, nn.init.zeros_)
    fill(module.running_var, nn.init.ones_)
    fill(module.num_batches_tracked, nn.init.zeros_)


def _linear(module: nn.Linear, config: Any) -> None:
    std = getattr(module, "init_std", config.hidden_size**-0.5 * config.initializer_factor)
    fill(module.weight, nn.init.normal_, std=std)
    fill(module.bias, nn.init.zeros_)


def _convolution(module: nn.Conv2d | nn.ConvTranspose2d, config: Any) -> None:
    if hasattr(module, "init_std"):
        fill(module.weight, nn.init.normal_, std=module.init_std)
    else:
        fill(module.weight, nn.init.kaiming_normal_, nonlinearity="relu")
    fill(module.bias, nn.init.zeros_)


def _embedding(module: nn.Embedding, config: Any) -> None:
    fill(module.weight, nn.init.normal_, std=config.initializer_range * config.initializer_factor)


LAYERS = {
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
    nn.BatchNorm2d: _batch_norm,
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _convolution,
    nn.Embedding: _embedding,
}


def initialise(module: nn.Module, config: Any) -> None:
    """Starts the parameters that a module owns: as it says itself by `init_parameters(config)`, or as its kind does.

    Args:
        config: of the model that the module is part of.
    """
    if hasattr(module, "init_parameters"):
        module.init_parameters(config)
        return
    for kind, start in LAYERS.items():
        if isinstance(module, kind):
            start(module, config)
            return
