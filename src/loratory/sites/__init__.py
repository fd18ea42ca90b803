"""Sites: any layer shown as a matrix."""

from loratory.sites.find import find_site, is_supported
from loratory.sites.site import Site

__all__ = ["Site", "find_site", "is_supported"]
