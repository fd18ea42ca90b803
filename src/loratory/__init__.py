"""Loratory: every low-rank training method, one interface, every claim checked."""

from loratory.methods.baselines import Frozen, Full, HeadOnly
from loratory.methods.dora import DoRA
from loratory.methods.lora import LoRA
from loratory.methods.merged_lora import MergedLoRA
from loratory.methods.method import Method
from loratory.methods.prefix_tuning import PrefixTuning
from loratory.methods.prompt_tuning import PromptTuning
from loratory.methods.registry import methods
from loratory.runtime.attach import adapt, detach
from loratory.runtime.combine import change_rank, combine
from loratory.runtime.merge import merge, unmerge
from loratory.runtime.route import active, adapters, disabled, use
from loratory.runtime.rows import rows
from loratory.runtime.summary import param_groups, summary, trained
from loratory.store.export import export
from loratory.store.gguf_base import load_gguf
from loratory.store.load import inspect, load
from loratory.store.native import save
from loratory.store.push import push_to_hub
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
    "PrefixTuning",
    "PromptTuning",
    "__version__",
    "active",
    "adapt",
    "adapters",
    "change_rank",
    "combine",
    "detach",
    "disabled",
    "export",
    "inspect",
    "load",
    "load_gguf",
    "merge",
    "methods",
    "param_groups",
    "push_to_hub",
    "quantize",
    "rows",
    "save",
    "summary",
    "trained",
    "unmerge",
    "use",
]
