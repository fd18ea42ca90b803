"""Loratory: every low-rank training method, one interface, every claim checked."""

from loratory.methods.baselines import Frozen, Full, HeadOnly
from loratory.methods.dora import DoRA
from loratory.methods.lora import LoRA
from loratory.methods.merged_lora import MergedLoRA
from loratory.methods.method import Method
from loratory.methods.registry import methods
from loratory.runtime.attach import adapt, detach
from loratory.runtime.merge import merge, unmerge
from loratory.runtime.route import active, adapters, disabled, use
from loratory.runtime.summary import param_groups, summary, trained
from loratory.store.export import export
from loratory.store.gguf_base import load_gguf
from loratory.store.load import inspect, load
from loratory.store.native import save
from loratory.transforms.quantize import quantize
from loratory.version import __version__

__all__ = [
    "DoRA",
    "Frozen",
    "Full",
    "HeadOnly",
    "LoRA",
    "MergedLoRA",
    "Method",
    "__version__",
    "active",
    "adapt",
    "adapters",
    "detach",
    "disabled",
    "export",
    "inspect",
    "load",
    "load_gguf",
    "merge",
    "methods",
    "param_groups",
    "quantize",
    "save",
    "summary",
    "trained",
    "unmerge",
    "use",
]
