"""Batch norms of a frozen base: their running statistics must not move, whatever mode the model is in."""

import copy
import pickle

import pytest
import torch
from torch import nn

import loratory as lt


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 3)
        self.own = nn.InstanceNorm2d(2, track_running_stats=True)
        self.plain = nn.InstanceNorm2d(2)

    def forward(self, x):
        return self.plain(self.own(self.last(torch.relu(self.norm(self.conv(x)))))).mean((2, 3))


@pytest.fixture
def net():
    model = Net()
    for _ in range(3):
        model.train()(torch.randn(4, 3, 9, 9) + 1)
    return model


def base(model):
    return {n: t.clone() for n, t in model.state_dict().items() if "loratory" not in n}


def steps(model, count=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(count):
        model.train()
        (model(torch.randn(4, 3, 9, 9)) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("method", [lt.LoRA(rank=2), lt.DoRA(rank=2)])
def test_the_base_stays_bit_for_bit_through_training_mode(net, method):
    before = base(net)
    lt.adapt(net, method, "conv", allow_unused=True)
    assert "2 normalisation layers keep the base's running statistics" in str(lt.summary(net))
    steps(net)
    assert same(base(net), before)
    assert isinstance(net.norm, nn.BatchNorm2d)
    assert net.training
    assert not net.norm.training
    lt.detach(net)
    assert type(net.norm) is nn.BatchNorm2d
    assert net.norm.training
    assert same(net.state_dict(), before)


def test_training_sees_the_function_that_evaluation_sees(net):
    lt.adapt(net, lt.LoRA(rank=2), "conv")
    x = torch.randn(4, 3, 9, 9)
    net.plain = nn.Identity()
    assert torch.equal(net.train()(x), net.eval()(x))


def test_detach_gives_the_mode_that_was_asked_for(net):
    net.train()
    net.norm.eval()  # as people do who freeze it themselves
    lt.adapt(net, lt.LoRA(rank=2), "conv")
    lt.detach(net)
    assert not net.norm.training
    lt.adapt(net, lt.LoRA(rank=2), "conv")
    net.eval()
    lt.detach(net)
    assert not net.norm.training


@pytest.mark.parametrize("how", ["full", "also_train"])
def test_a_copy_of_the_statistics_moves_and_the_base_does_not(net, how):
    before = base(net)
    if how == "full":
        lt.adapt(net, lt.Full())
    else:
        lt.adapt(net, lt.LoRA(rank=2), "conv", also_train=["norm"])
    steps(net)
    assert net.norm.training
    assert net.norm.num_batches_tracked == before["norm.num_batches_tracked"] + 2
    assert not torch.equal(net.norm.running_mean, before["norm.running_mean"])
    with lt.disabled(net):
        assert not net.norm.training
        assert torch.equal(net.norm.running_mean, before["norm.running_mean"])
    assert net.norm.training
    lt.detach(net)
    assert same(net.state_dict(), before)


def test_a_trained_bias_alone_leaves_the_statistics(net):
    before = base(net)
    lt.adapt(net, lt.LoRA(rank=2), "conv", bias="all", allow_unused=True)
    steps(net)
    assert torch.equal(net.norm.running_mean, before["norm.running_mean"])
    assert not torch.equal(net.norm.bias, before["norm.bias"])


def test_held_norms_are_copied_pickled_and_merged(net):
    lt.adapt(net, lt.LoRA(rank=2), "conv")
    twin = copy.deepcopy(net).train()
    assert not twin.norm.training
    again = pickle.loads(pickle.dumps(net.norm)).train()
    assert isinstance(again, nn.BatchNorm2d)
    assert not again.training
    lt.merge(net, keep_base=False)
    assert type(net.norm) is nn.BatchNorm2d
    assert type(twin.norm) is not nn.BatchNorm2d
