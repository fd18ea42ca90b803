"""Switching sparse adapters in the base's own weights: `switch`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loratory.runtime.layer import Layer, layers_of
from loratory.runtime.low_rank import refuse_broken
from loratory.runtime.merge import put_back, refuse_shared, unmerge
from loratory.runtime.route import check_names, rest, use
from loratory.runtime.shards import refuse_sharded
from loratory.runtime.state import require_adapter, state_of, unwrap


def switch(model: nn.Module, *names: str, mix: Sequence[float] | None = None) -> None:
    """Write these adapters into the base's weights in the place of what is merged into them; without names the base alone.

        W[i] = W0[i] + sum m D[i]     i: the places at which an adapter's update D is not 0;  m = 1 without `mix`

    Nothing else is written, and W0[i] is kept, so that the base's own bits return with the next switch, `unmerge` or `detach`,
    whatever was switched before. The model runs at the base's speed; where places coincide, values add. Gives what `merge` does, for adapters whose
    method states its entries (SHiRA), without a probe. An error leaves everything as it was; an interrupted switch leaves the base's
    weights, with the adapters beside them.
    Raises ValueError for a method without entries, a layer that is quantised or shares its weight, an unknown or repeated name, or
    NaN in an adapter; RuntimeError inside `rows` or where the model is sharded.
    Source: arXiv 2406.13175 (rapid switching). Differs: several adapters at once, on any layer the method serves.
    """
    model = unwrap(model)
    state = state_of(model)
    check_names(model, names, mix)
    refuse_sharded(
        model,
        "no process holds a whole weight to write into",
        "run the adapters beside the weights with loratory.use, or merge in one process",
    )
    for name in names:
        if not (adaptation := require_adapter(model, name)).layers or not adaptation.method.states("entries"):
            raise ValueError(
                f"adapter '{name}' ({type(adaptation.method).__name__}) does not change a few entries of weights, so it cannot be switched by "
                "writing them; run it beside the weights with loratory.use, or merge it with loratory.merge"
            )
    layers = {name: layer for name, layer in layers_of(model).items() if any(each in layer for each in names)}
    for name, layer in layers.items():
        if layer.site.rounds:
            raise ValueError(
                f"layer '{name}' is quantised, so single entries of it cannot be written; run the adapters beside the weights with loratory.use"
            )
    refuse_shared(model, layers, untie=False)
    changes = {name: _change(layer, names, mix) for name, layer in layers.items()}
    if state.merged:
        unmerge(model)
    use(model, *names, mix=mix)
    state.merged = names
    try:
        for name, (places, D) in changes.items():
            layer = layers[name]
            kept = layer.site.numbers(places)
            layer.unmerged_at = places
            layer.unmerged = kept
            layer.site.put(places, (kept.to(D.dtype) + D).to(kept.dtype))
            rest(layer)
    except BaseException:
        put_back(model, state, layers)
        state.merged = ()
        raise


@torch.no_grad()
def _change(layer: Layer, names: Sequence[str], mix: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """The places in the layer's weight, flat in (*stack, out, in), where these adapters change it, and how: each place once."""
    matrix = layer.site.outputs * layer.site.inputs
    found = []
    for name, m in zip(names, mix or [1.0] * len(names), strict=True):
        if name in layer:
            t = layer[name]
            refuse_broken(layer, t)  # type: ignore[arg-type]
            places, D = t.method.entries(t)  # type: ignore[union-attr, operator]
            if layer.site.stack:
                places = places + matrix * torch.arange(D[..., 0].numel(), device=D.device).view(*D.shape[:-1], 1)
            found.append((places.flatten(), (D if m == 1 else m * D).flatten()))
    if len(found) == 1:
        return found[0]
    places, which = torch.cat([places for places, _ in found]).unique(return_inverse=True)
    D = torch.cat([D for _, D in found])
    return places, D.new_zeros(len(places)).index_add_(0, which, D)
