"""Methods: the mathematics of the papers, one file each."""

from loratory.methods.method import Declared, Method, frozen, trained
from loratory.methods.registry import METHODS, method_class, method_name, methods

__all__ = ["METHODS", "Declared", "Method", "frozen", "method_class", "method_name", "methods", "trained"]
