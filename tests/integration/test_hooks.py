"""Hooks of accelerate, and gradient checkpointing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import loratory as lt
from tests.oracle.pairs import randomised

from .loops import adapted, batch


def test_hooks_of_accelerate_stay_in_their_place() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Doubling(ModelHook):
        def __init__(self) -> None:
            self.calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return tuple(2 * a for a in args), kwargs

    base, x, hook = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4), Doubling()
    plain = copy.deepcopy(base)
    add_hook_to_module(base[0], hook)
    lt.adapt(base, lt.LoRA(rank=2), ["0"], seed=1)
    lt.adapt(plain, lt.LoRA(rank=2), ["0"], seed=1)
    for model in (base, plain):
        randomised(model)
    assert base[0]._hf_hook is hook
    with torch.no_grad():
        assert torch.equal(base(x), plain(2 * x))  # the hook acts before the adapter, and once
        assert hook.calls == 1
        lt.detach(base)
        lt.detach(plain)
        assert torch.equal(base(x), plain(2 * x))
    assert type(base[0]) is nn.Linear
    assert base[0]._hf_hook is hook
    remove_hook_from_module(base[0])
    assert torch.equal(base(x), plain(x))
    lt.adapt(base, lt.LoRA(rank=2), ["0"], seed=1)  # accelerate left the class's own method on the instance
    lt.adapt(plain, lt.LoRA(rank=2), ["0"], seed=1)
    randomised(base)
    randomised(plain)
    assert torch.equal(base(x), plain(x))


@pytest.mark.parametrize("hooked", [True, False])
def test_a_forward_patched_by_another_library_is_refused(hooked: bool) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = nn.Sequential(nn.Linear(4, 3))
    model[0].forward = lambda x: x[..., :3]
    if hooked:
        add_hook_to_module(model[0], ModelHook())
    with pytest.raises(
        RuntimeError, match=r"layer '0' has a patched forward \(set on the instance by another library\)"
    ):
        lt.adapt(model, lt.LoRA(rank=2), ["0"])


def test_a_layer_offloaded_by_accelerate_is_refused(stories: Callable[[], Any]) -> None:
    from accelerate import cpu_offload

    model = stories()
    x = batch(model.tokenizer)["input_ids"]
    wanted = model(x).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        RuntimeError,
        match=r"layer 'model.layers.0.self_attn.q_proj' is offloaded by accelerate, .* load the base without offloading",
    ):
        lt.adapt(model, lt.LoRA(rank=2), ["q_proj"])
    assert torch.equal(model(x).logits, wanted)


@pytest.mark.parametrize("method", [lt.LoRA(rank=4, dropout=0.2), lt.DoRA(rank=4)])
def test_gradient_checkpointing_changes_no_gradient(method: Any, stories: Callable[[], Any]) -> None:
    gradients: list[dict[str, torch.Tensor]] = []
    for options in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        model = adapted(stories, method=method, seed=1)
        randomised(model)
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model.train()(**batch(model.tokenizer)).loss.backward()
        gradients.append({n: p.grad for n, p in lt.trained(model).items() if p.grad is not None})
    assert len(gradients[0]) == len(lt.trained(model))
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        assert all(torch.equal(other[n], g) for n, g in gradients[0].items())
