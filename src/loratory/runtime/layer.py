"""What an adapted module carries: adapters beside its untouched weight, and the class it is swapped to.

An adapted layer stays the user's object: its class becomes a generated subclass of its own, with the same name, whose forward
asks the layer's route. `module.loratory` holds one `Adapter` for each adapter name, `module.loratory_copies` the trained copies
of parameters that are trained in full. The model's root holds as `loratory_shared` what the layers of an adapter share. For bare parameters `module.loratory` holds such a layer for each of them.
"""

import copyreg
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loratory.methods.method import Declared, Method, Shared
from loratory.runtime.shards import spread_like
from loratory.sites.site import Site

LAYER, COPIES, SHARED = "loratory", "loratory_copies", "loratory_shared"
BASE, MIXED = "<base>", "<mixed>"  # entries of Copies that no adapter can be named after

Route = Callable[..., Tensor]  # of a called layer (layer, base, x) -> y; of a bare parameter (layer) -> W'


class Tag(NamedTuple):
    """How a tensor is treated."""

    trained: bool
    decay: bool
    lr: float
    rebuilt: bool = False


class Tensors(nn.Module):
    """Tensors that a method declared: trained ones are parameters, frozen ones buffers."""

    def __init__(self, declared: Mapping[str, Declared], method: str) -> None:
        super().__init__()
        self.tags: dict[str, Tag] = {}
        for name, d in declared.items():
            if hasattr(self, name):
                raise ValueError(f"{method} names a tensor '{name}', a name that is taken; rename it in its init")
            if d.trained:
                self.register_parameter(name, nn.Parameter(d.tensor))
            else:
                self.register_buffer(name, d.tensor)
            self.tags[name] = Tag(d.trained, d.decay, d.lr, d.rebuilt)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.tags}


class Pools(nn.ModuleDict):
    """At the root, for each adapter name the tensors that its layers share. A Sequential root runs it as one more layer."""

    def forward(self, x: Any) -> Any:
        return x


class Adapter(Tensors):
    """One method's tensors for one layer; a method sees this as its `t`.

    Shared tensors are found through the module that holds them at the root: fully_shard exchanges the tensors themselves.
    """

    shape: tuple[int, ...]

    def __init__(
        self,
        method: Method,
        declared: Mapping[str, Declared | Shared],
        shape: tuple[int, ...] = (),
        pool: Tensors | None = None,
    ) -> None:
        own = {name: d for name, d in declared.items() if isinstance(d, Declared)}
        super().__init__(own, type(method).__name__)
        self.method, self.shape = method, shape
        named = {name: d.name for name, d in declared.items() if isinstance(d, Shared)}
        self.links = named or ({} if pool is None else {name: name for name in pool.tags})
        self.__dict__["pool"] = pool  # not registered: it would be saved and moved once for each layer

    def __getattr__(self, name: str) -> Any:
        links = self.__dict__.get("links")
        if links is not None and name in links:
            return getattr(self.pool, links[name])
        return super().__getattr__(name)

    def every_tensor(self) -> dict[str, Tensor]:
        """Those of this layer and those it shares."""
        return self.tensors() | {name: getattr(self, name) for name in self.links}

    def trained(self) -> dict[str, nn.Parameter]:
        """Every trained one."""
        return {name: t for name, t in self.every_tensor().items() if isinstance(t, nn.Parameter)}

    def extra_repr(self) -> str:
        return ", ".join([repr(self.method), *(f"{name} {tuple(t.shape)}" for name, t in self.tensors().items())])


class Holding:
    """An adapter with other tensors in the place of some of its own."""

    def __init__(self, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
        self.adapter, self.tensors = adapter, tensors

    def __getattr__(self, name: str) -> Any:
        return self.tensors[name] if name in self.tensors else getattr(self.adapter, name)


class Layer(nn.ModuleDict):
    """The adapters of one module. `route` is chosen when the user switches adapters, not at each call."""

    mix: Tensor
    unmerged: Tensor | None
    unmerged_at: Tensor | None

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.active: tuple[Adapter, ...] = ()
        self.route: Route
        self.register_buffer("mix", torch.ones(0), persistent=False)
        self.register_buffer("unmerged", None, persistent=False)  # the base weight while a merged one is in its place
        self.register_buffer(
            "unmerged_at", None, persistent=False
        )  # places of what unmerged holds, where it is not all

    def adapters(self) -> list[Adapter]:
        return [adapter for adapter in self.values() if isinstance(adapter, Adapter)]

    def extra_repr(self) -> str:
        return f"active={[name for name, adapter in self.items() if any(adapter is a for a in self.active)]}, merged={self.merged}"

    @property
    def merged(self) -> bool:
        return self.unmerged is not None

    def base(self) -> Tensor:
        """The base's weight (*stack, out, in), whatever is merged into it."""
        if self.unmerged is None:
            return self.site.read().detach()
        if self.unmerged_at is None:
            return self.site.read_snapshot(self.unmerged).detach()
        W = self.site.read().detach()
        return W.flatten().scatter(0, self.unmerged_at, self.unmerged).view(W.shape)

    def restore(self) -> None:
        """Put the base's weight back. It may be done again where it was interrupted."""
        if self.unmerged is not None and self.unmerged_at is None:
            self.site.restore(self.unmerged)
        elif self.unmerged is not None and self.unmerged_at is not None:
            self.site.put(self.unmerged_at, self.unmerged)
        self.unmerged = None
        self.unmerged_at = None

    def _replicate_for_data_parallel(self) -> Any:
        """Called by nn.DataParallel for each GPU. A replica's site and active adapters would be those of the first GPU."""
        raise RuntimeError(
            "an adapted model cannot be copied by nn.DataParallel, which transformers' Trainer uses where one process sees several GPUs; "
            "start a process for each GPU (torchrun or accelerate launch), or let it see one (CUDA_VISIBLE_DEVICES=0)"
        )


class Parameters(nn.Module):
    """The layers of one module's bare parameters, by parameter name."""


class Copies(nn.ModuleDict):
    """Trained copies of a module's own parameters: one entry for each adapter, and `<base>` with the originals."""


class Copy(nn.Module):
    """Parameters and buffers of one module, as one adapter has them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


@cache
def adapted_class(cls: Any) -> type[nn.Module]:
    """A subclass of a layer's class, with its name, whose forward asks the layer's route."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.loratory
        base = (
            partial(cls.forward, self, *args, **kwargs) if not args else lambda u: cls.forward(self, u, *args, **kwargs)
        )
        return layer.route(layer, base, x)

    return subclass(cls, {"forward": forward}, adapted_class)


def subclass(cls: Any, body: dict[str, Any], maker: Callable[..., type], *args: Any) -> type[nn.Module]:
    """A subclass with its parent's name. It cannot be imported by that name, so its objects are pickled with `maker(cls, *args)`."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        plain = original_class(self)
        made = plain.__reduce_ex__(self, protocol)
        if made[0] is not copyreg.__newobj__ or made[1] != (type(self),):  # type: ignore[attr-defined]
            raise TypeError(
                f"a {plain.__name__} is copied by code of its own, which would lose its adapters; detach them first"
            )
        steps = [c.__dict__["_loratory_made_by"] for c in type(self).__mro__ if "_loratory_swapped" in c.__dict__]
        return (_new, (plain, steps), *made[2:])

    own = {"__module__": cls.__module__, "_loratory_swapped": True, "_loratory_made_by": (maker, args)}
    return type(cls.__name__, (cls,), body | own | {"__reduce_ex__": __reduce_ex__})


def _new(cls: Any, steps: list[tuple[Callable[..., type], tuple[Any, ...]]]) -> Any:
    """An empty object of a generated class; the outermost step stands first."""
    for maker, args in reversed(steps):
        cls = maker(cls, *args)
    return cls.__new__(cls)


def original_class(module: nn.Module) -> Any:
    """The user's class of a module, whatever it was swapped to."""
    return next(c for c in type(module).__mro__ if "_loratory_swapped" not in c.__dict__)


def is_swapped(module: nn.Module) -> bool:
    return "_loratory_swapped" in type(module).__dict__


def has_patched_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's; under accelerate's hook, whether it had one before."""
    own = module.__dict__.get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, taking accelerate's forward hook off and on again around the change."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(module)
    if not has_patched_forward(module):
        module.__dict__.pop("forward", None)  # accelerate leaves the old class's method on the instance
    module.__class__ = cls
    if hook is not None:
        add_hook_to_module(module, hook)


def restore_class(module: nn.Module) -> None:
    if is_swapped(module):
        swap_class(module, type(module).__mro__[1])


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """The adapted layers by name: that of the module (the empty name is the model itself), or of the bare parameter."""
    return {
        ".".join(part for part in name.split(".") if part != LAYER): m
        for name, m in model.named_modules()
        if isinstance(m, Layer)
    }


def pools_of(model: nn.Module) -> dict[str, Tensors]:
    """What the layers of each adapter share, by adapter name."""
    pools = model._modules.get(SHARED)
    return dict(pools.items()) if isinstance(pools, Pools) else {}  # type: ignore[arg-type]


def drop_pools(model: nn.Module, names: Iterable[str]) -> None:
    """Take the shared tensors of these adapters out of the root."""
    pools = model._modules.get(SHARED)
    for name in names:
        if isinstance(pools, Pools) and name in pools:
            del pools[name]
    if isinstance(pools, Pools) and not len(pools):
        del model._modules[SHARED]


def is_ours(name: str) -> bool:
    """Whether a tensor of this name was put into the model by us."""
    return bool({LAYER, COPIES, SHARED} & set(name.split(".")))


def copies_of(model: nn.Module) -> dict[str, Copies]:
    """The modules with trained copies by module name (the empty name is the model itself)."""
    return {name[: -len(COPIES)].removesuffix("."): m for name, m in model.named_modules() if isinstance(m, Copies)}


def fill_copies(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Put stored values into an adapter's trained copies."""
    copies = copies_of(model)
    with torch.no_grad():
        for key, value in tensors.items():
            owner, _, leaf = key.rpartition(".")
            target = getattr(copies[owner][name], leaf)
            target.copy_(spread_like(target, value))
