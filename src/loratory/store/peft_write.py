"""Writing PEFT's adapter folders: whatever is a low-rank update of its layers, or DoRA."""

import dataclasses
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from loratory.methods.dora import DoRA
from loratory.methods.lora import LoRA, scale
from loratory.methods.method import two_factors
from loratory.runtime.layer import copies_of, is_ours, layers_of, original_class
from loratory.runtime.low_rank import Nearest
from loratory.runtime.state import Adaptation, one_name, require_adapter, transforms_of
from loratory.runtime.ties import tied_places
from loratory.runtime.where import head_names
from loratory.sites.quantized import quantized_sites
from loratory.store import atomic
from loratory.store.peft_config import CONFIG, PREFIX, WEIGHTS, saved_modules, targets
from loratory.store.peft_layer import check_conv, file_rank, to_peft
from loratory.store.peft_parameter import parameter_targets

_MERGED = "; write the merged model instead: loratory.export(model, folder, to='merged')"
_NEAREST = _MERGED + ", or the nearest LoRA of a rank, with its error: to='peft', rank="
_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
_HEAD_TASKS = {  # PEFT adds the head to modules_to_save by itself, so the adapter must hold it
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def save_peft(model: nn.Module, folder: Path, *, name: str | None, nearest: Nearest | None = None) -> None:
    """Write one adapter (the active one) as adapter_config.json and adapter_model.safetensors.

    LoRA and DoRA as they are; any other method that states a low-rank form (rung 1) as the LoRA that it equals; with `nearest`
    that one. Raises ValueError for what PEFT's format cannot hold.
    """
    name = one_name(model, name)
    adaptation = require_adapter(model, name)
    method = adaptation.method
    _check_base(model, name)
    if nearest is None:
        _check_method(name, adaptation)
    dora, plain = isinstance(method, DoRA) and nearest is None, type(method) is LoRA and nearest is None
    rslora = bool(getattr(method, "rslora", False)) and (dora or plain)
    tensors: dict[str, Tensor] = {}
    begins = _parameters(model, name)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    layers = layers_of(model)
    sites = nearest.sites if nearest is not None else {n: layer.site for n, layer in layers.items() if name in layer}
    for layer_name, site in sites.items():
        check_conv(site, dora)
        t: Any = layers[layer_name][name] if nearest is None else None
        s = 1.0
        if nearest is not None:
            B, A, *_ = nearest.factors[layer_name]
        elif dora or plain:
            A, B, s = t.A, t.B, scale(t.method.alpha, t.A.shape[-2], t.method.rslora)
        else:
            B, A = two_factors(t.method.factors(t))
        rank = file_rank(site, A)
        ranks[layer_name], alphas[layer_name] = rank, s * (math.sqrt(rank) if rslora else rank)
        own = to_peft(site, A, B, t.m if dora else None)
        tensors |= {begins.get(layer_name, f"{layer_name}.") + key: value for key, value in own.items()}
    taken = set() if nearest is None else nearest.taken
    copies = {n: t for n, t in _copies(model, name).items() if n not in taken}
    if method.trains == "all":  # the biases of a whole model, which are no modules of their own
        adaptation = dataclasses.replace(adaptation, bias="all")
    whole = _whole(model, adaptation, copies, list(ranks))
    tied = {n for names in tied_places(model).values() for n in names}
    beside = copies | {n: p for n, p in _resized_vocabulary(model).items() if n not in copies}
    for n, value in beside.items():
        owner, _, leaf = n.rpartition(".")
        tensors[f"{owner}.base_layer.{leaf}" if owner in ranks else n] = value.detach().cpu().contiguous().clone()
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"tensor '{key}' of adapter '{name}' holds NaN or infinity, so it was not written; go back to the last good checkpoint"
            )
    common_rank, common_alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        **_task(model, whole),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": int(common_rank),
        "lora_alpha": _number(common_alpha),
        "lora_dropout": _dropout(adaptation, model),
        "target_modules": _spelled(model, [n for n in ranks if n not in begins], whole),
        "target_parameters": list(begins) or None,
        "rank_pattern": {_exact(n): r for n, r in ranks.items() if r != common_rank},
        "alpha_pattern": {_exact(n): _number(a) for n, a in alphas.items() if a != common_alpha},
        "modules_to_save": whole or None,
        "ensure_weight_tying": not adaptation.untied and any(n in tied for n in copies if n not in adaptation.kept),
        "bias": {"adapted": "lora_only"}.get(adaptation.bias, adaptation.bias),
        "use_rslora": rslora,
        "use_dora": dora,
        "fan_in_fan_out": any(site.kind == "conv1d-transposed" for site in sites.values()),
        "init_lora_weights": "gaussian" if getattr(method, "start", "") == "gaussian" and nearest is None else True,
    }
    data = safetensors.torch.save({PREFIX + key: value for key, value in tensors.items()}, metadata={"format": "pt"})
    atomic.write_files(folder, {WEIGHTS: data, CONFIG: atomic.to_json(config)})


def _parameters(model: nn.Module, name: str) -> dict[str, str]:
    """The adapter's bare parameters, each with the beginning of its keys in the file."""
    layers = {n: layer for n, layer in layers_of(model).items() if name in layer}
    bare = [n for n, layer in layers.items() if not layer.site.called]
    if bare and any(layer.site.kind == "conv1d-transposed" for layer in layers.values()):
        raise ValueError(
            f"adapter '{name}' adapts both transposed layers and the bare parameter '{bare[0]}', which PEFT cannot do in one{_MERGED}"
        )
    begins = parameter_targets(model, [n for n in bare if not layers[n].site.is_whole])  # type: ignore[attr-defined]
    if others := [n for n in begins if n not in bare]:
        raise ValueError(
            f"under the name of one of adapter '{name}''s bare parameters PEFT would also take '{others[0]}'{_MERGED}"
        )
    return begins


def _check_base(model: nn.Module, name: str) -> None:
    if changed := [t for t in transforms_of(model) if not t.startswith("quantize")]:
        raise ValueError(
            f"adapter '{name}' belongs to a base changed by {changed}, which PEFT could not repeat{_MERGED}"
        )
    if packings := sorted({site.packing for site in quantized_sites(model).values()}):
        warnings.warn(
            f"adapter '{name}' was trained on a quantised base ({', '.join(packings)}), which the file does not say: on the base in full "
            "precision it gives slightly other outputs",
            stacklevel=4,
        )


def _check_method(name: str, adaptation: Adaptation) -> None:
    method, kind = adaptation.method, type(adaptation.method).__name__
    if method.trains != "factors" or not adaptation.layers:
        raise ValueError(f"adapter '{name}' ({kind}) has no low-rank layer, and PEFT's format needs one{_NEAREST}")
    if method.acts_on != "layers":
        raise ValueError(
            f"adapter '{name}' ({kind}) holds virtual tokens, which are not written in PEFT's format; keep it with loratory.save"
        )
    if method.full_rank:
        raise ValueError(
            f"{type(method).__name__}'s update has rank min(out, in), so it is no low-rank adapter; merge it instead, or say with rank= "
            "which rank its nearest LoRA is to have"
        )
    if not method.mergeable:
        raise ValueError(
            f"adapter '{name}': {kind} changes more than weights, which PEFT's format has no place for; keep it with loratory.save"
        )
    if not isinstance(method, DoRA) and not method.states("factors"):
        raise ValueError(
            f"adapter '{name}': PEFT's format has no place for {kind}, whose update is not of low rank{_NEAREST}"
        )


def _copies(model: nn.Module, name: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for owner, copies in copies_of(model).items():
        if name in copies:
            own = dict(copies[name].named_parameters(remove_duplicate=False)) | dict(copies[name].named_buffers())
            out |= {f"{owner}.{leaf}" if owner else leaf: t for leaf, t in own.items()}
    return out


def _whole(model: nn.Module, adaptation: Adaptation, copies: dict[str, Tensor], layers: list[str]) -> list[str]:
    """The modules that are trained in full, as modules_to_save names them; PEFT saves whole modules and biases only."""
    learned = {n for n in copies if n not in adaptation.kept}
    biases = {n for n in learned if n.split(".")[-1] == "bias"} if adaptation.bias != "none" else set()
    own = [n for n in model.state_dict() if not is_ours(n)]
    whole: list[str] = []
    for module, _ in model.named_modules(remove_duplicate=False):
        inside = {n for n in own if n.startswith(module + ".")} if module and not is_ours(module) else set()
        if inside and inside <= learned and not inside <= biases and not any(module.startswith(w + ".") for w in whole):
            whole.append(module)
    covered = {n for n in own if any(n.startswith(w + ".") for w in whole)}
    if left := sorted(learned - covered - biases):
        raise ValueError(
            f"'{left[0]}' is trained in full, but not the whole module it belongs to, and PEFT saves whole modules only{_MERGED}"
        )
    for w in whole:
        hit = [n for n in saved_modules(model, [w]) if n != w]
        if hit:
            raise ValueError(
                f"the module '{w}' is trained in full, but under that name PEFT would also take '{hit[0]}'{_MERGED}"
            )
        if any(n.startswith(w + ".") or n == w for n in layers):
            raise ValueError(f"the module '{w}' is trained in full and adapted, which PEFT cannot do{_MERGED}")
    return whole


def _spelled(model: nn.Module, layers: list[str], whole: list[str]) -> list[str] | str:
    """target_modules that mean these layers and no others: ends of names, whole names, or an expression."""
    if not layers:
        return []
    for names in (sorted({n.split(".")[-1] for n in layers}), layers):
        if set(targets(model, {"target_modules": names, "modules_to_save": whole})) == set(layers):
            return names
    return "|".join(_exact(n)[1:] for n in layers)


def _exact(name: str) -> str:
    return "^" + name.replace(".", r"\.")


def _resized_vocabulary(model: Any) -> dict[str, Tensor]:
    """Input and output embeddings where the vocabulary is not the stored base's: another process could not make their new rows."""
    config = getattr(model, "config", None)
    if config is None or not config._name_or_path or not hasattr(model, "get_input_embeddings"):
        return {}
    from transformers import AutoConfig

    try:
        stored = AutoConfig.from_pretrained(config._name_or_path, local_files_only=True)
    except (OSError, ValueError):  # a base that is not stored on this machine
        return {}
    if getattr(stored, "vocab_size", None) == getattr(config, "vocab_size", None):
        return {}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {
        f"{n}.{leaf}": p
        for n, m in model.named_modules()
        if any(m is e for e in ends)
        for leaf, p in m.named_parameters(recurse=False)
    }


def _task(model: nn.Module, whole: list[str]) -> dict[str, Any]:
    cls = original_class(model)
    held = all(any(h == w or h.startswith(w + ".") for w in whole) for h in head_names(model))
    tasks = _TASKS | (_HEAD_TASKS if whole and held else {})
    task = next((value for end, value in tasks.items() if cls.__name__.endswith(end)), None)
    mapping = None if task else {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return {"task_type": task, "auto_mapping": mapping}


def _dropout(adaptation: Adaptation, model: nn.Module) -> float:
    p = adaptation.method.input_dropout
    layers = layers_of(model)
    if not all(layers[n].site.called for n in adaptation.layers):
        p = 0.0  # PEFT refuses any other beside target_parameters
    other = [n for n, m in adaptation.layers.items() if m.input_dropout != p and layers[n].site.can_drop]
    if other:
        warnings.warn(
            f"PEFT has one dropout for all layers: {p} was written, while layer '{other[0]}' has {adaptation.layers[other[0]].input_dropout}; "
            "this matters only if the adapter is trained further",
            stacklevel=3,
        )
    return p


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
