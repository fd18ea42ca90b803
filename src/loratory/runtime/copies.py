"""Tensors that an adapter trains in full: copies of the base's, in each place where they are used."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn

from loratory.runtime.layer import BASE, COPIES, Copies, Copy, is_ours
from loratory.runtime.state import Adaptation
from loratory.runtime.ties import tied_places
from loratory.sites.quantized import quantized_site_class


def whole_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of all parameters and buffers in the named modules (or the named parameters)."""
    names = list(names)
    if not names:
        return []
    tensors = [
        n
        for n in [
            *dict(model.named_parameters(remove_duplicate=False)),
            *dict(model.named_buffers(remove_duplicate=False)),
        ]
        if not is_ours(n)
    ]
    persistent = set(model.state_dict(keep_vars=True))
    quantized = {n for n, m in model.named_modules() if quantized_site_class(m)}
    out: list[str] = []
    for key in names:
        found = [
            n for n in tensors if n in persistent and (key == "" or re.search(rf"(^|\.){re.escape(key)}(\.|$)", n))
        ]
        if not found:
            near = get_close_matches(
                key,
                {n.rpartition(".")[0].split(".")[-1] for n in tensors} | {n.rpartition(".")[0] for n in tensors},
                n=3,
                cutoff=0.0,
            )
            raise ValueError(
                f"also_train names '{key}', which no module with parameters is called; nearest names: {', '.join(near)}"
            )
        for n in found:
            if n.rpartition(".")[0] in quantized and not n.endswith(".bias"):
                raise ValueError(
                    f"layer '{n.rpartition('.')[0]}' is quantised, so it cannot be trained in full; adapt it with a low-rank method, or leave "
                    "it out when quantising (loratory.quantize(..., exclude=))"
                )
        out += found
    return list(dict.fromkeys(out))


def with_tied(model: nn.Module, copied: list[str], notes: list[str]) -> list[str]:
    """The tensors, and every other place of a tied one: the tie stays."""
    if not copied:
        return []
    places = tied_places(model)
    by_name = dict(model.named_parameters(remove_duplicate=False))
    out = list(copied)
    for name in copied:
        partners = [n for n in places.get(id(by_name.get(name)), []) if n not in out]
        notes += [f"{name} and {n} are one tied weight; its trained copy serves both" for n in partners]
        out += partners
    return out


def refuse_tied(model: nn.Module, copied: list[str]) -> None:
    """Refuse to train one place of a tied weight and not the other."""
    for names in tied_places(model).values():
        if set(names) & set(copied) and not set(names) <= set(copied):
            raise ValueError(
                f"the head's weight '{next(n for n in names if n in copied)}' is also '{next(n for n in names if n not in copied)}', so HeadOnly would "
                "train the input embedding too; untie them first (model.config.tie_word_embeddings = False and a cloned weight), or use another method"
            )


def install_copies(model: nn.Module, name: str, adaptation: Adaptation, trainable: bool) -> None:
    """Give the model an adapter's copies of the tensors that it trains in full."""
    by_owner: dict[str, list[str]] = {}
    for key in adaptation.copied:
        owner, _, leaf = key.rpartition(".")
        by_owner.setdefault(owner, []).append(leaf)
    shared: dict[object, nn.Parameter] = {}  # a tied weight has one copy, in all its places, unless it is to be parted
    for owner, leaves in by_owner.items():
        module = model.get_submodule(owner)
        copies = module._modules.get(COPIES)
        if copies is None:
            copies = Copies({BASE: Copy({})})
            module.add_module(COPIES, copies)
        assert isinstance(copies, Copies)
        base, own = copies[BASE], {}
        for leaf in leaves:
            if not hasattr(base, leaf):
                original = module._parameters.get(leaf)
                if original is not None:
                    base.register_parameter(leaf, original)
                else:
                    base.register_buffer(leaf, module._buffers[leaf])
            source = getattr(base, leaf)
            if isinstance(source, nn.Parameter):
                full = f"{owner}.{leaf}" if owner else leaf
                place: object = full if adaptation.untied else id(source)
                if place not in shared:
                    learns = trainable and source.is_floating_point() and full not in adaptation.kept
                    shared[place] = nn.Parameter(source.detach().clone(), requires_grad=learns)
                own[leaf] = shared[place]
            else:
                own[leaf] = source.detach().clone()
        copies[name] = Copy(own)
