"""Sites: any layer shown as a matrix."""

from loratory.sites.block import BlockSite, find_block
from loratory.sites.find import find_site, is_supported, known_parameters, target
from loratory.sites.parameter import Bare
from loratory.sites.site import Site
from loratory.sites.vision import VisionSite, find_vision

__all__ = [
    "Bare",
    "BlockSite",
    "Site",
    "VisionSite",
    "find_block",
    "find_site",
    "find_vision",
    "is_supported",
    "known_parameters",
    "target",
]
