"""torch.compile: one graph, and no recompilation when switching among known adapters or changing mixing weights."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import loratory as lt
from tests.laws.kinds import KINDS, Case, move
from tests.laws.table import TABLE
from tests.runtime.models import IDS, Tiny
from tests.runtime.moe import IDS as TOKENS
from tests.runtime.moe import moe

pytestmark = pytest.mark.usefixtures("compiling")


def compiled(model: nn.Module) -> tuple[Any, CompileCounter]:
    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(model, backend=counter, fullgraph=True), counter


def check(model: nn.Module, fast: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["Linear", "Conv2d grouped", "experts transposed", "MultiheadAttention", "bare parameter"]
)
@pytest.mark.parametrize("method", [lt.LoRA(rank=2, alpha=3), lt.DoRA(rank=2)], ids=["lora", "dora"])
def test_a_graph_for_each_form_not_for_each_adapter(kind: str, method: lt.Method):
    case = Case(KINDS[kind], method, TABLE["lora"])
    model, x = case.plain(), case.inputs()
    for i, name in enumerate("abc"):
        case.attach(model, name)
        move(model, i)
    fast, counter = compiled(model)
    seen = []
    for names, mix in [
        (("a",), None), (("b",), None), (("c",), None), ((), None), (("a",), None),
        (("a", "b"), (0.7, 0.3)), (("a", "b"), (0.1, -2.0)), (("c", "b"), (0.5, 0.5)), (("b", "c"), None),
        ((), None), (("c",), None), (("a", "c"), (0.4, 0.9)),
    ]:  # fmt: skip
        lt.use(model, *names, mix=mix)
        check(model, fast, x)
        seen.append(counter.frame_count)
    assert seen == [1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3]  # one adapter; the base; two mixed


def test_adapters_that_differ():
    """The scale becomes an input of the graph at the second alpha; a parameter's shape is a constant, so each rank has its graph."""
    model, x = Tiny(blocks=1), IDS
    for alpha in (3, 5, 7.5, 11):
        lt.adapt(model, lt.LoRA(rank=2, alpha=alpha), "q_proj, v_proj", name=f"alpha{alpha}".replace(".", "-"))
        move(model, int(alpha))
    for rank in (3, 4):
        lt.adapt(model, lt.LoRA(rank=rank, alpha=5), "q_proj, v_proj", name=f"rank{rank}")
        move(model, rank)
    fast, counter = compiled(model)
    seen = []
    for name in lt.adapters(model) * 2:
        lt.use(model, name)
        check(model, fast, x)
        seen.append(counter.frame_count)
    assert seen == [1, 2, 2, 2, 3, 4, *[4] * 6]


def test_training_compiled_steps_through_two_adapters():
    case = Case(KINDS["experts transposed"], lt.LoRA(rank=2), TABLE["lora"])
    model, x = case.plain(), case.inputs()
    for name in "ab":
        case.attach(model, name)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, backend=counter, fullgraph=True)
    for name in "abab":
        lt.use(model, name)
        optimizer = torch.optim.SGD(lt.param_groups(model), lr=0.1)
        fast(x).square().sum().backward()
        grads = {n: p.grad.clone() for n, p in lt.trained(model).items()}
        model.zero_grad()
        model(x).square().sum().backward()
        for n, p in lt.trained(model).items():
            torch.testing.assert_close(p.grad, grads[n])
        optimizer.step()
        model.zero_grad()
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_experts_with_a_kernel_that_compiles(family: str):
    model = moe(family, "grouped_mm")
    for name in "ab":
        lt.adapt(model, lt.LoRA(rank=2), ["experts", "q_proj"], name=name)
        move(model, ord(name))
    fast, counter = compiled(model)
    for name in "abab":
        lt.use(model, name)
        with torch.no_grad():
            torch.testing.assert_close(fast(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
