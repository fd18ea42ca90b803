"""What the runtime promises about other people's code: fast paths, patches, wrappers, sharding, checkpointing."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import loratory as lt
from tests.laws.kinds import move, plain_state, same
from tests.runtime.models import IDS, Tiny


class Skipping(nn.Module):
    """A layer's weight is read, and its forward never called."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.skipped, self.also = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x) @ self.skipped.weight.t() @ self.also.weight.t()


def step(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(lt.param_groups(model))
    model(x).square().sum().backward()
    optimizer.step()


def test_a_layer_that_is_never_called_is_named_at_the_first_step():
    model, x = Skipping(), torch.randn(2, 4)
    lt.adapt(model, lt.LoRA(rank=2))
    before = {n: p.detach().clone() for n, p in lt.trained(model).items()}
    with pytest.raises(
        RuntimeError, match=r"layer 'also' and 1 more got no gradient in the first step.*exclude=.*allow_unused=True"
    ):
        step(model, x)
    assert same({n: p.detach() for n, p in lt.trained(model).items()}, before)
    lt.detach(model)
    lt.adapt(model, lt.LoRA(rank=2), exclude="skipped, also")
    step(model, x)


def test_gradients_that_come_inside_the_step_are_seen():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    lt.adapt(model, lt.LoRA(rank=2), where=["0", "1"])
    closed_step(model, x)  # every layer is reached: no error
    model = Skipping()
    lt.adapt(model, lt.LoRA(rank=2))
    with pytest.raises(RuntimeError, match=r"layer 'also' and 1 more got no gradient in the first step"):
        closed_step(model, x)


def closed_step(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(lt.param_groups(model))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_unused_layers_can_be_allowed():
    model = Skipping()
    lt.adapt(model, lt.LoRA(rank=2), allow_unused=True)
    step(model, torch.randn(2, 4))


def test_the_check_is_made_once_and_for_that_model_alone():
    model, other = Tiny(), nn.Linear(3, 3)
    lt.adapt(model, lt.LoRA(rank=2), "q_proj")
    torch.optim.SGD(other.parameters(), lr=0.1).step()  # another model's step
    step(model, IDS)
    torch.optim.SGD(lt.param_groups(model)).step()
    model.zero_grad()
    torch.optim.SGD(lt.param_groups(model)).step()  # a later step without gradients is nobody's mistake


def test_an_encoder_layer_in_eval_mode_counts_its_adapters():
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2))
    base, x = copy.deepcopy(model).eval(), torch.randn(2, 5, 8)
    lt.adapt(model, lt.LoRA(rank=2))
    move(model)
    with torch.no_grad():
        fast = model.eval()(x)
        assert not torch.allclose(fast, base(x), atol=1e-3)
        torch.testing.assert_close(fast, model.train()(x))
        lt.merge(model.eval(), probe=x)
        torch.testing.assert_close(model(x), fast)
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        lt.unmerge(model)
        torch.testing.assert_close(model[0](x, src_key_padding_mask=mask)[:, :3], model[0].train()(x, src_key_padding_mask=mask)[:, :3])  # fmt: skip
    lt.detach(model)
    assert model[0].use_nested_tensor == base[0].use_nested_tensor
    assert not model[0].layers[0]._forward_hooks
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), base(x))


def test_an_unknown_patch_is_refused():
    model = Tiny()
    layer = model.blocks[0].attn["q_proj"]
    layer.forward = lambda x: x
    with pytest.raises(
        RuntimeError, match=r"layer 'blocks.0.attn.q_proj' has a patched forward.*adapt the model before that patch"
    ):
        lt.adapt(model, lt.LoRA(rank=2))
    assert not hasattr(model.blocks[1].attn["q_proj"], "loratory")


def test_accelerates_hook_is_seated_again():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    add_hook_to_module(model[0], Doubling())
    base = model(x)
    lt.adapt(model, lt.LoRA(rank=2), "0")
    assert torch.equal(model(x), base)
    move(model)
    own = model[0].loratory["default"]
    torch.testing.assert_close(model(x), base + 2 * (x @ own.A.T @ own.B.T))
    lt.detach(model)
    assert torch.equal(model(x), base)
    assert type(model[0]) is nn.Linear
    assert isinstance(model[0]._hf_hook, Doubling)


def test_a_parametrized_layer_is_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(RuntimeError, match=r"layer '0' is parametrized; call torch.nn.utils.parametrize.remove"):
        lt.adapt(model, lt.LoRA(rank=2), lambda name, module: name == "0")


@pytest.fixture
def one_process(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_model_is_refused(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Tiny()
    fully_shard(model.blocks[0], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(
        RuntimeError, match=r"'blocks.0' is already sharded by fully_shard.*adapt the model first, then shard"
    ):
        lt.adapt(model, lt.LoRA(rank=2))


def test_distributed_data_parallel_is_looked_through_but_not_adapted(one_process, tmp_path):
    from torch.nn.parallel import DistributedDataParallel

    model = Tiny()
    with pytest.raises(
        RuntimeError, match=r"wrapped in DistributedDataParallel already.*adapt the model first, then wrap"
    ):
        lt.adapt(DistributedDataParallel(model), lt.LoRA(rank=2))
    lt.adapt(model, lt.LoRA(rank=2), "q_proj")
    wrapped = DistributedDataParallel(model)
    step(wrapped, IDS)
    assert list(lt.trained(wrapped)) == list(lt.trained(model))
    assert lt.summary(wrapped) == lt.summary(model)
    lt.save(wrapped, tmp_path / "out")
    lt.merge(wrapped, probe=IDS)
    lt.detach(wrapped)
    assert lt.adapters(model) == ()
    assert same(plain_state(model), Tiny().state_dict())


@pytest.mark.usefixtures("compiling")
def test_a_compiled_model_is_looked_through(tmp_path):
    model = Tiny().eval()
    compiled = torch.compile(model, backend="eager")
    lt.adapt(compiled, lt.LoRA(rank=2), "q_proj")
    assert lt.adapters(model) == ("default",)
    assert list(lt.trained(compiled)) == list(lt.trained(model))
    move(compiled)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    assert not torch.allclose(compiled(IDS), Tiny().eval()(IDS))
    lt.detach(compiled)
    assert not hasattr(model, "_loratory_state")
    torch.testing.assert_close(compiled(IDS), Tiny().eval()(IDS))


@pytest.mark.parametrize("method", [lt.LoRA(rank=2, dropout=0.3), lt.DoRA(rank=2, dropout=0.3)], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(method, reentrant):
    model = Tiny().train()
    lt.adapt(model, method)
    move(model)
    grads = []
    for checkpointed in (False, True):
        x = model.embed(IDS).detach().requires_grad_()
        torch.manual_seed(5)
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
        model.zero_grad()
        model.head(x).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in lt.trained(model).items()})
    assert same(grads[0], grads[1])


def test_gradient_checkpointing_of_transformers(stories):
    ids, grads = torch.tensor([[1, 5, 9, 12]]), []
    for checkpointed in (False, True):
        model = stories().train()
        lt.adapt(model, lt.LoRA(rank=2), seed=3)
        move(model)
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in lt.trained(model).items()})
    assert same(grads[0], grads[1])


def test_autocast_trains_float32_adapters():
    model = Tiny()
    lt.adapt(model, lt.DoRA(rank=2), "attention")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lt.trained(model).values())


def test_state_dict_goes_in_and_out():
    model = Tiny()
    lt.adapt(model, lt.DoRA(rank=2), "attention", also_train="head")
    move(model)
    again = Tiny()
    lt.adapt(again, lt.DoRA(rank=2), "attention", also_train="head")
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS), model(IDS))


def test_moving_dtype_and_device_moves_adapters():
    model = Tiny()
    lt.adapt(model, lt.DoRA(rank=2), "attention")
    move(model)
    expected = model(IDS)
    torch.testing.assert_close(model.double()(IDS).float(), expected)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
