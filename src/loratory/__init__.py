"""Loratory: every low-rank training method, one interface, every claim checked."""

import sys
from types import ModuleType
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Python binds each imported part of a package to its name; where a verb has the same one (methods), the verb keeps it."""
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
