"""Sites: any layer shown as a matrix."""

from loratory.sites.find import find_site, is_supported, known_parameters, target
from loratory.sites.parameter import Bare
from loratory.sites.site import Site

__all__ = ["Bare", "Site", "find_site", "is_supported", "known_parameters", "target"]
