"""The ladder: what a method is.

A method is a frozen dataclass: its fields are the paper's hyper-parameters, its functions the paper's mathematics on a matrix
W (*stack, out, in). It states its update on the most structured rung that is true; the rest is derived:

    1 factors(t) -> (B, A) or (B, core, A)   W' = W + B core A    W is never read and B A never built
    2 delta(t)   -> D                        W' = W + D           by default the product of the factors
    3 weight(t, W) -> W'                     any W'               by default W + delta; merging is this rung
    4 forward(t, x, base, site) -> y         anything             `base` is the frozen layer as a callable

`t` holds the tensors that `init(site)` made, by name, `t.shape` (*stack, out, in) and `t.training`. A lower rung may be added for speed.

A method that puts virtual tokens before the text or among the patches of an image acts on the body of a model, which has no matrix
(sites/block.py, sites/vision.py); it states `prompt`, `prefix` or `inserted` instead of a rung.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from loratory.methods.fields import check_fields

if TYPE_CHECKING:
    from loratory.sites.site import Site


class Declared(NamedTuple):
    """A tensor of a method and how it is treated."""

    tensor: Tensor
    trained: bool
    decay: bool = True  # weight decay applies to it
    lr: float = 1.0  # its learning rate as a multiple of the optimizer's
    rebuilt: bool = False  # a file holds its checksum in place of its numbers, which the method makes again


@dataclass
class Run:
    """Where a training run stands, and the tensors of one adapter in it."""

    layers: dict[str, Any]  # the `t` of each layer, by name
    sites: dict[str, "Site"]
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # the method's own; what it draws is drawn once a step
    steps: int | None  # of the whole run
    epoch_steps: int | None  # of one pass over the data
    step: int = 0  # optimizer steps done
    reschedule: bool = False  # the user wants to go on under another schedule than an earlier run began with
    kept: dict[str, Any] = field(default_factory=dict)  # the method's own, until the run ends or is restored
    resting: list[Tensor] = field(default_factory=list)
    held: list[tuple[Tensor, int]] = field(default_factory=list)

    @property
    def epoch(self) -> float | None:
        """Passes over the data done."""
        return None if not self.epoch_steps else self.step / self.epoch_steps

    def rest(self, tensor: Tensor) -> None:
        """The next optimizer step leaves this tensor and its state alone; called in `before_step`."""
        self.resting.append(tensor)

    def hold(self, tensor: Tensor, columns: int) -> None:
        """The next optimizer step leaves the first columns of this tensor as they are; called in `before_step`."""
        self.held.append((tensor, columns))


class Shared(NamedTuple):
    """In place of a tensor of a layer: the one that all layers share under this name."""

    name: str


def trained(tensor: Tensor, *, decay: bool = True, lr: float = 1.0) -> Declared:
    """Declare a tensor that the optimizer trains."""
    return Declared(tensor, True, decay, lr)


def frozen(tensor: Tensor, *, rebuilt: bool = False) -> Declared:
    """Declare a tensor that stays as it is made.

    rebuilt=True: it follows from the method's fields, the sites' shapes and the base's weights alone (a seed, a private generator, draws in
    float32; a decomposition), so that files need not hold it.
    """
    return Declared(tensor, False, rebuilt=rebuilt)


Factors = tuple[Tensor, Tensor] | tuple[Tensor, Tensor | float, Tensor]


class Footprint(NamedTuple):
    """What a method needs at one layer beside the tensors it makes; counts of numbers. `plan` reads it where it cannot run the layer."""

    per_token: int  # kept from the forward to the backward pass for each token, beside the layer's input and output
    kept: int = 0  # kept once
    scratch: int = 0  # for a moment, in the forward or backward pass
    workspace: int = 0  # for a moment, in `init`, inside a library where no tensor shows it (a decomposition)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What every method is; see the module's text. A method overrides `init` and at least one rung."""

    trains: ClassVar[Literal["factors", "all", "head", "nothing"]] = "factors"  # else: copies of whole modules, no rung
    full_rank: ClassVar[bool] = False  # its factors are as large as the weight, so they are no low-rank adapter
    default_rank: ClassVar[int] = 8  # where the rank is None, capped at min(in, out)
    core_form: ClassVar[Literal["matrix", "diagonal"] | None] = None  # of its factors; one of all numbers or one a rank
    acts_on: ClassVar[Literal["layers", "body", "vision"]] = "layers"  # a body reads text, a vision body images
    coefficients: ClassVar[tuple[str, ...]] = ()  # trained tensors that a file may hold rounded, `save(bits=)`

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs(self) -> frozenset[str]:
        """What `init` wants to find in `site.seen`: "gradient", the sum over batches of the weight's gradient, and others of `loratory.collect`."""
        return frozenset()

    @property
    def rows_to_collect(self) -> int | None:
        """How many training rows the paper collects that from."""
        return None

    def planned(self, *, learning_rate: float, warmup: float, steps: int) -> "Method":
        """The method for a run: warmup is a share of the steps. What the paper takes from the run is filled in where it is None."""
        return self

    def per_site(self, sites: Mapping[str, "Site"]) -> "dict[str, Method]":
        """Layers whose settings follow from all layers together, with their settings. Not asked for layers that have some of their own."""
        return {}

    def shared(self, sites: Mapping[str, "Site"]) -> dict[str, Declared]:
        """Tensors made once for the model, which each layer finds in `t` under their names."""
        return {}

    def notes(self, sites: Mapping[str, "Site"]) -> list[str]:
        """What the summary should say of these layers."""
        return []

    def figures(self, t: Any) -> dict[str, float]:
        """What the summary should say of one layer as it stands; left out where it is 0 in all layers."""
        return {}

    def init(self, site: "Site") -> Mapping[str, "Declared | Shared"]:
        """The method's tensors for one layer, at their start. `site.together`: all sites of the adapter, by name."""
        raise TypeError(f"{type(self).__name__} makes no tensors for layer '{site.name}': its init is not defined")

    def factors(self, t: Any) -> Factors:
        """Rung 1: (B, A) or (B, core, A), scale included; B (*stack, out, rank), A (*stack, rank, in).

        core (*stack, rank, rank) is a matrix; (rank) or (*stack, rank) is a diagonal; a number is a scale.
        """
        raise TypeError(f"{type(self).__name__} has no low-rank form")

    def delta(self, t: Any) -> Tensor:
        """Rung 2: the update as a matrix (*stack, out, in)."""
        B, A = two_factors(self.factors(t))
        return B @ A

    def weight(self, t: Any, W: Tensor) -> Tensor:
        """Rung 3: the adapted weight (*stack, out, in)."""
        return W + self.delta(t)

    def forward(self, t: Any, x: Tensor, base: Callable[[Tensor], Tensor], site: "Site") -> Tensor:
        """Rung 4: the adapted layer's output."""
        raise TypeError(f"{type(self).__name__} has no forward of its own")

    def entries(self, t: Any) -> tuple[Tensor, Tensor]:
        """Of an update that is 0 but for few entries: their places (*stack, K), flat in (out, in), and the update there (*stack, K).

        It states what `delta` does, so that `loratory.switch` writes nothing else.
        """
        raise TypeError(f"{type(self).__name__} changes whole weights, not a few of their entries")

    def penalty(self, t: Any) -> Tensor | None:
        """What one layer adds to the loss in training; see `loratory.penalty`."""
        return None

    def prompt(self, t: Any) -> Tensor | None:
        """On a body: rows (tokens, width) put before the input embeddings."""
        return None

    def prefix(self, t: Any, block: int) -> tuple[Tensor, Tensor] | None:
        """On a body: K and V (heads, tokens, head_dim) put before the keys and values of an attention block."""
        return None

    def inserted(self, t: Any, block: int, x: Tensor) -> Tensor | None:
        """On a vision body: rows (batch, tokens, width) put behind the class token of a block's input x; None: those there stay."""
        return None

    def before_step(self, run: "Run") -> None:
        """Before the forward pass of each optimizer step (accumulated ones: before the first), with the layers of the adapter.

        A resumed run calls it again for the step it stopped before, with the same draws: it must set values, not add to them.
        """

    def after_step(self, run: "Run") -> None:
        """After each optimizer step, while its gradients are still there."""

    def kept_in_optimizer(self, t: Any) -> int:
        """Numbers of a layer that `after_step` keeps in the optimizer's state, beside the optimizer's own."""
        return 0

    @property
    def acts_in_training(self) -> bool:
        """Whether `loratory.drive` must call it."""
        return self.states("before_step") or self.states("after_step")

    @property
    def rung(self) -> int:
        """The rung the layer runs on: the lowest one (of the four) that this class states itself."""
        stated = [n for n, name in enumerate(("factors", "delta", "weight", "forward"), 1) if self.states(name)]
        return max(stated, default=0)

    @property
    def input_dropout(self) -> float:
        """Dropout on the input of an update on rung 1 or 2: the method's field `dropout`, where it has one."""
        return float(getattr(self, "dropout", 0.0))

    def capped_rank(self, outputs: int, inputs: int) -> int:
        """The rank of a layer of this size."""
        return min(int(getattr(self, "rank", None) or self.default_rank), outputs, inputs)

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        """What a layer W (outputs, inputs) needs.

        By default: on rung 1 the narrow product, and B with a core that is a matrix; on rung 3 W' and its gradient (on rung 2 for a moment,
        unless the method has cache_delta); on rung 4 a few products and matrices as large as W. A method whose numbers differ says so.
        """
        rank = self.capped_rank(outputs, inputs)
        dropped = 2 * inputs if self.input_dropout else 0
        if self.rung == 1:
            return Footprint(rank + dropped, kept=rank * outputs if self.core_form == "matrix" else 0)
        if self.rung == 2 and not getattr(self, "cache_delta", False):
            return Footprint(dropped, scratch=3 * outputs * inputs)
        if self.rung in (2, 3):
            return Footprint(dropped, kept=2 * outputs * inputs, scratch=2 * outputs * inputs)
        return Footprint(3 * outputs + rank + dropped, scratch=3 * outputs * inputs)

    @property
    def mergeable(self) -> bool:
        return any(self.states(name) for name in ("factors", "delta", "weight"))

    def hyperparameters(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def description(cls) -> str:
        """The first line of the docstring, without the name."""
        return (cls.__doc__ or cls.__name__).strip().splitlines()[0].split(": ", 1)[-1]

    def states(self, name: str) -> bool:
        """Whether it states this rung or word itself."""
        return getattr(type(self), name) is not getattr(Method, name)


def two_factors(factors: Factors) -> tuple[Tensor, Tensor]:
    """(B, A) from (B, A) or (B, core, A): the core is folded into B."""
    B, s, A = scaled_factors(factors)
    return (B if s == 1 else s * B), A


def scaled_factors(factors: Factors) -> tuple[Tensor, float, Tensor]:
    """(B, s, A) with s B A the update: a core that is a number stays apart, another one is folded into B."""
    if len(factors) == 2:
        return factors[0], 1.0, factors[1]
    B, core, A = factors
    if not isinstance(core, Tensor):
        return B, core, A
    return (B @ core if core.dim() == B.dim() else B * core.unsqueeze(-2)), 1.0, A


def check_ids(ids: Any) -> tuple[int, ...] | None:
    """Token ids as a tuple, or None."""
    if ids is None:
        return None
    ids = tuple(ids.tolist() if isinstance(ids, Tensor) else ids)
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(
            f"ids is {ids!r:.60}; it must hold at least one token id, for example tokenizer(text).input_ids"
        )
    return ids


def check_linear(method: Method, site: "Site") -> None:
    """Refuse a layer whose update is more than one matrix times its input: embeddings, convolutions."""
    if site.kind not in ("linear", "conv1d-transposed", "parameter"):
        name = type(method).__name__
        raise ValueError(
            f"layer '{site.name}' ({site.kind}) is not linear, and {name} is defined for linear layers alone; leave it out with exclude="
        )


def new(site: "Site", *shape: int) -> Tensor:
    """An empty tensor for a site: on its device, in float32 where the layer is stored narrower."""
    dtype = torch.float64 if site.dtype == torch.float64 else torch.float32
    return torch.empty(*shape, device=site.device, dtype=dtype)
