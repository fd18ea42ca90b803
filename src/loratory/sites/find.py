"""Which layers have a site, and why others have none."""

import torch
from torch import nn

from loratory.sites.conv import ConvSite
from loratory.sites.embedding import EmbeddingSite
from loratory.sites.linear import Conv1DSite, LinearSite
from loratory.sites.quantized import quantized_site_class
from loratory.sites.site import Site

SITES: dict[type[nn.Module], type[Site]] = {
    nn.Conv1d: ConvSite,
    nn.Conv2d: ConvSite,
    nn.Conv3d: ConvSite,
    nn.Embedding: EmbeddingSite,
    nn.Linear: LinearSite,
}


def site_class(module: nn.Module) -> type[Site] | None:
    """The site class of a layer, by its class; None for modules that are not layers with a matrix."""
    quantized = quantized_site_class(module)
    if quantized is not None:
        return quantized
    for cls in type(module).__mro__:
        if cls in SITES and not isinstance(module, nn.modules.conv._ConvTransposeNd):
            return SITES[cls]
        if (
            cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        ):  # not imported for its name alone
            return Conv1DSite
    return None


def is_supported(module: nn.Module) -> bool:
    return site_class(module) is not None


def find_site(name: str, module: nn.Module, generator: torch.Generator | None = None) -> Site:
    """The site of a layer, or an error that says why it has none."""
    found = site_class(module)
    if found is None:
        raise TypeError(
            f"layer '{name}' is a {type(module).__name__}, which has no matrix to adapt; allowed are Linear, Conv1D (transformers), "
            "Embedding, Conv1d, Conv2d, Conv3d; leave it out with exclude=, or train it in full with also_train="
        )
    if found.rounds:
        return found(name, module, generator)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        stored = getattr(weight, "dtype", type(weight).__name__)
        raise TypeError(
            f"layer '{name}' ({type(module).__name__}) stores its weight as {stored}; allowed are float64, float32, bfloat16 "
            "and float16, and the quantised layers of loratory.quantize, bitsandbytes and torchao: load the base in one of them"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(
            f"layer '{name}' is an Embedding with max_norm={module.max_norm}, which rewrites its rows at every look-up, so the base "
            "would not stay frozen; set max_norm=None or leave the layer out with exclude="
        )
    return found(name, module, generator)
