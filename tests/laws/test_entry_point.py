"""Another package registers a method through the entry point `loratory.methods`."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import loratory as lt

MODULE = '''
from dataclasses import dataclass
import torch
import loratory as lt
from loratory.methods import trained

@dataclass(frozen=True, kw_only=True)
class RowScale(lt.Method):
    """RowScale: each output row is multiplied by a trained number."""

    start: float = 1.0

    def init(self, site):
        return {"g": trained(torch.full((site.outputs,), self.start), decay=False)}

    def weight(self, t, W):
        return t.g.unsqueeze(-1) * W
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    def install(points: str, name: str = "rowscale") -> None:
        (tmp_path / f"{name}_methods.py").write_text(MODULE)
        info = tmp_path / f"{name}_methods-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-methods\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[loratory.methods]\n{points}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_a_method_of_another_package_is_like_our_own(package, tmp_path):
    package("row-scale = rowscale_methods:RowScale")
    row = next(row for row in lt.methods() if row.name == "row-scale")
    assert row == ("row-scale", "RowScale", "each output row is multiplied by a trained number.", "rowscale_methods")

    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    before = model(x)
    lt.adapt(model, "row-scale", where="0")
    assert torch.equal(model(x), before)
    optimizer = torch.optim.SGD(lt.param_groups(model, lr=0.1, weight_decay=0.5))
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    model(x).square().sum().backward()
    optimizer.step()
    after = model(x)
    assert not torch.allclose(after, before)
    g = model[0].loratory["default"].g
    torch.testing.assert_close(after, x @ (g[:, None] * base["0.weight"]).T + base["0.bias"])

    lt.save(model, tmp_path / "out")
    assert lt.inspect(tmp_path / "out").method == "row-scale"
    again = nn.Sequential(nn.Linear(4, 3))
    again.load_state_dict(base)
    lt.load(again, tmp_path / "out")
    assert torch.equal(again(x), after)
    lt.merge(again, probe=x)
    torch.testing.assert_close(again(x), after)


def test_a_taken_name_is_refused(package):
    package("lora = rowscale_methods:RowScale", "taken")
    with pytest.raises(ValueError, match=r"method name 'lora' of rowscale_methods:RowScale is taken by loratory"):
        lt.methods()


def test_what_is_no_method_is_refused(package):
    package("odd = odd_methods:dataclass", "odd")
    with pytest.raises(TypeError, match=r"entry point 'odd' \(odd_methods:dataclass\) is no loratory Method"):
        lt.methods()


def test_a_method_that_is_not_registered_cannot_be_saved(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Private(lt.LoRA):
        """Private: not registered."""

    model = nn.Sequential(nn.Linear(4, 3))
    lt.adapt(model, Private(rank=2), where="0")
    with pytest.raises(ValueError, match=r"Private is not registered.*entry-point group 'loratory.methods'"):
        lt.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
