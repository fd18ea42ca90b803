"""What every method is compared with: all weights, the head alone, nothing."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from loratory.methods.method import Method


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Full: every parameter of the model is trained (a copy of it, so that detaching restores the base).

    The model is unchanged at the start. Trains all numbers of the model. Differs: nothing.
    """

    trains: ClassVar[Literal["factors", "all", "head", "nothing"]] = "all"


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """HeadOnly: the output head alone is trained, in full (linear probing).

    The head is what a transformers model holds outside its `base_model`; for other models name it with also_train=.
    Trains all numbers of the head.
    Raises ValueError if the model has no head, or if the head shares its weight with the input embedding.
    """

    trains: ClassVar[Literal["factors", "all", "head", "nothing"]] = "head"


@dataclass(frozen=True, kw_only=True)
class Frozen(Method):
    """Frozen: nothing is trained; the base as it is.

    Trains nothing.
    """

    trains: ClassVar[Literal["factors", "all", "head", "nothing"]] = "nothing"
