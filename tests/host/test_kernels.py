"""What takes the place of fused kernels while gradients are taken."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from comfyui_elrond.nodes.host.kernels import plain_kernels

PLAIN = """
from functools import reduce
def rms_rope(x, scale): return x * scale
def rms_rope_(x, scale): return x.mul_(scale)
def _helper(x): return x
"""


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(context: object, x: torch.Tensor, scale: float) -> torch.Tensor:
        return x * scale


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package laid out as `comfy_kitchen` is, whose function has no derivative."""
    names = ("comfy_kitchen", "comfy_kitchen.backends", "comfy_kitchen.backends.eager")
    for name in (*names, "comfy_kitchen.backends.eager.rope"):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    exec(PLAIN, module.__dict__)
    monkeypatch.delitem(sys.modules, "comfy_kitchen.backends.eager.adaln", raising=False)
    made = sys.modules["comfy_kitchen"]
    made.rms_rope = lambda x, scale: _Fused.apply(x, scale)
    made._helper = "the package's own"
    return made


def test_a_fused_kernel_has_a_derivative_for_the_time_being(package: ModuleType) -> None:
    x, fused = torch.ones(3, requires_grad=True), package.rms_rope
    with pytest.raises(ValueError, match="stop here"), plain_kernels():
        (found,) = torch.autograd.grad(package.rms_rope(x, 2.0).sum(), x)
        # What the package does not offer stays away, and what is no function of it stays as it is.
        assert not hasattr(package, "rms_rope_") and not hasattr(package, "reduce")
        raise ValueError("stop here")
    assert torch.equal(found, torch.full((3,), 2.0))
    assert package.rms_rope is fused and package._helper == "the package's own"
    with pytest.raises(NotImplementedError):
        torch.autograd.grad(package.rms_rope(x, 2.0).sum(), x)


def test_a_host_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    with plain_kernels():
        assert sys.modules["comfy_kitchen"] is None


@pytest.mark.skipif(importlib.util.find_spec("comfy_kitchen") is None, reason="this host has no comfy_kitchen")
def test_every_rotation_and_modulation_of_the_package_is_plain() -> None:
    package = importlib.import_module("comfy_kitchen")
    names = [name for name in vars(package) if name.startswith(("apply_rope", "rms_rope", "adaln", "rms_adaln"))]
    before = {name: getattr(package, name) for name in names}
    with plain_kernels():
        assert len(names) >= 4
        for name in names:
            assert ".eager." in getattr(package, name).__module__, name
    assert all(getattr(package, name) is function for name, function in before.items())
