"""A run that begins in the middle gives what a whole run gives, whatever the code between the modules does."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from conftest import ConvNet, randomise_
from torch import Tensor, nn

from normsurgeon.graph.skeleton import tensors_in
from normsurgeon.selection.replay import NotRepeatableError, replaying


class InPlace(nn.Module):
    """Everything is overwritten: by a module, by ``+=``, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.a(x))
        z = self.b(y)
        z += y
        z.flatten(1).mul_(0.5)
        u = self.c(z)
        u += z
        y.add_(u)
        return (y + u).mean((2, 3))


class Shared(nn.Module):
    """One module called three times, and one that gives a dict of a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.pair = Pair()
        self.last = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.block(self.block(x))
        pair = self.pair(x)
        return {"out": (self.last(self.block(pair["both"][0]) + pair["both"][1]), x)}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {"both": (self.norm(x), x * 2)}


class Moody(nn.Module):
    """Calls its parts in another order every time."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)])
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        order = self.parts if self.calls % 2 else reversed(self.parts)
        for part in order:
            x = part(x)
        return x


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {"in place": InPlace(), "shared": Shared(), "branches": ConvNet()}
    found |= {name: timm.create_model(name) for name in ("test_resnet", "test_efficientnet", "test_byobnet")}
    return {name: randomise_(network).eval() for name, network in found.items()}


def same(a: Any, b: Any) -> bool:
    pairs = list(zip(tensors_in(a), tensors_in(b), strict=True))
    return bool(pairs) and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", networks())
@torch.no_grad()
def test_a_run_from_any_module_equals_the_whole_run_bit_for_bit(name: str) -> None:
    model = networks()[name]
    x = torch.randn(2, 3, 32, 32)
    whole = model(x)
    modules = [m for m in model.modules() if m is not model]
    changed: set[int] = set()
    with replaying(model, changed) as replay:
        assert same(replay.record(x), whole)
        cuts = sorted({c for m in modules if (c := replay.first_call(m)) is not None})
        assert len(cuts) >= 3
        for cut in cuts:
            assert same(replay.find_changed(cut), whole)
        second = torch.randn(4, 3, 32, 32)  # another batch, another size: what is overwritten is known by now
        expected = replay.record(second)
        for cut in cuts:
            replay.advance(cut)
            for _ in range(3):
                assert same(replay.run(), expected)
    assert same(model(x), whole)
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_what_lies_before_the_cut_is_not_computed_again() -> None:
    model = networks()["test_resnet"]
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o, name=name: calls.append(name))
    with replaying(model) as replay:
        replay.record(torch.randn(1, 3, 32, 32))
        replay.advance(replay.first_call(model.layer3))
        calls.clear()
        replay.run()
    # Hooks run around a module that hands out what it remembers; of finished blocks nothing inside is called.
    assert not [name for name in calls if name.startswith(("layer1", "layer2"))]
    assert [name for name in calls if name.startswith(("layer3", "layer4"))]


@torch.no_grad()
def test_little_is_remembered_of_what_is_finished() -> None:
    model = networks()["test_resnet"]
    with replaying(model) as replay:
        replay.record(torch.randn(1, 3, 32, 32))
        for block in (model.layer2, model.layer3, model.layer4):
            replay.advance(replay.first_call(block))
        assert len(replay._known) <= len(list(model.children()))


@torch.no_grad()
def test_a_network_that_calls_its_parts_in_another_order_is_noticed() -> None:
    model = Moody().eval()
    with replaying(model) as replay:
        replay.record(torch.randn(1, 3, 4, 4))
        with pytest.raises(NotRepeatableError, match="of another module"):
            replay.advance(replay.first_call(model.parts[2]))
