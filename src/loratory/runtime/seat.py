"""Putting the layer of a site into its module, and taking it out: the one place that changes classes of adapted layers."""

from typing import Any

from loratory.runtime import block, parameter, vision
from loratory.runtime.layer import LAYER, Layer, adapted_class, restore_class, swap_class
from loratory.sites import Site
from loratory.sites.block import BlockSite
from loratory.sites.parameter import ParameterSite
from loratory.sites.vision import VisionSite


def seat(site: Site) -> Layer:
    """The layer of a site, made where there is none yet."""
    if isinstance(site, ParameterSite):
        layer = parameter.seat(site)
    elif isinstance(site, BlockSite):
        layer = block.seat(site)
    elif isinstance(site, VisionSite):
        layer = vision.seat(site)
    else:
        module: Any = site.module
        if LAYER not in module._modules:
            swap_class(module, adapted_class(module.__class__))
            module.add_module(LAYER, Layer(site))
        layer = module._modules[LAYER]
    site.generator = None  # only init draws
    return layer.train(site.module.training)


def unseat(layer: Layer) -> None:
    """Take a layer out; a module without any is of its own class again."""
    if isinstance(layer.site, ParameterSite):
        parameter.unseat(layer)
        return
    if isinstance(layer.site, BlockSite):
        block.unseat(layer)
        return
    if isinstance(layer.site, VisionSite):
        vision.unseat(layer)
        return
    module = layer.site.module
    del module._modules[LAYER]
    restore_class(module)
