"""The registry: one dict from name to class, and the entry point through which other packages add to it."""

from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import NamedTuple

from loratory.methods.baselines import Frozen, Full, HeadOnly
from loratory.methods.convlora import ConvLoRA
from loratory.methods.dora import DoRA
from loratory.methods.lamda import LaMDA
from loratory.methods.loca import LoCA
from loratory.methods.loldu import LoLDU
from loratory.methods.lora import LoRA
from loratory.methods.lora_sb import LoRASB
from loratory.methods.lora_xs import LoRAXS
from loratory.methods.merged_lora import MergedLoRA
from loratory.methods.method import Method
from loratory.methods.mos import MoS
from loratory.methods.nola import NOLA
from loratory.methods.prefix_tuning import PrefixTuning
from loratory.methods.prompt_tuning import PromptTuning
from loratory.methods.randlora import RandLoRA
from loratory.methods.salt import SALT
from loratory.methods.shira import SHiRA
from loratory.methods.snella import SNELLA
from loratory.methods.svfit import SVFit
from loratory.methods.tlora import TLoRA
from loratory.methods.vpt import VPT
from loratory.methods.wara import WaRA

METHODS: dict[str, type[Method]] = {
    "convlora": ConvLoRA,
    "dora": DoRA,
    "frozen": Frozen,
    "full": Full,
    "head-only": HeadOnly,
    "lamda": LaMDA,
    "loca": LoCA,
    "loldu": LoLDU,
    "lora": LoRA,
    "lora-sb": LoRASB,
    "lora-xs": LoRAXS,
    "merged-lora": MergedLoRA,
    "mos": MoS,
    "nola": NOLA,
    "prefix-tuning": PrefixTuning,
    "prompt-tuning": PromptTuning,
    "randlora": RandLoRA,
    "salt": SALT,
    "shira": SHiRA,
    "snella": SNELLA,
    "svfit": SVFit,
    "tlora": TLoRA,
    "vpt": VPT,
    "wara": WaRA,
}


class MethodRow(NamedTuple):
    name: str
    method: str
    description: str
    package: str


def registered() -> dict[str, type[Method]]:
    """All methods by name: ours, and those that installed packages offer in the entry-point group `loratory.methods`."""
    found = dict(METHODS)
    for entry in entry_points(group="loratory.methods"):
        if entry.name in found:
            raise ValueError(
                f"method name '{entry.name}' of {entry.value} is taken by {found[entry.name].__module__}; rename the entry point"
            )
        cls = entry.load()
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise TypeError(
                f"entry point '{entry.name}' ({entry.value}) is no loratory Method; it must name a subclass of loratory.Method"
            )
        found[entry.name] = cls
    return found


def method_class(name: str) -> type[Method]:
    """The class registered under a name (case, `_` and `-` do not matter)."""
    known = registered()
    wanted = name.lower().replace("_", "-")
    if wanted in known:
        return known[wanted]
    near = get_close_matches(wanted, known, n=3, cutoff=0.0)
    raise ValueError(f"there is no method '{name}'; nearest names: {', '.join(near)}; all: {', '.join(sorted(known))}")


def method_name(method: Method | type[Method]) -> str:
    """The name a method is registered under."""
    cls = method if isinstance(method, type) else type(method)
    for name, known in registered().items():
        if known is cls:
            return name
    raise ValueError(
        f"{cls.__name__} is not registered, so a file could not name it; add it to METHODS, or to the entry-point group "
        "'loratory.methods' of your package"
    )


def methods() -> list[MethodRow]:
    """One row for each registered method."""
    return [
        MethodRow(name, cls.__name__, cls.description(), cls.__module__.split(".")[0])
        for name, cls in sorted(registered().items())
    ]
