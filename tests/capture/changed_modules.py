"""Models that are changed between two calls."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import types
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.changed_program import Part, Program, around, of_model, plain_loss, program

Phase = enum.Enum("Phase", "FIRST SECOND")


@program
def dropout_probability() -> Program:
    return of_model(nn.Dropout(0.1), lambda m: setattr(m, "p", 0.2), "model.1.p")


@program
def batch_norm_momentum() -> Program:
    return of_model(nn.BatchNorm1d(8), lambda m: setattr(m, "momentum", 0.2), "model.1.momentum")


@program
def layer_norm_epsilon() -> Program:
    return of_model(nn.LayerNorm(8), lambda m: setattr(m, "eps", 1e-3), "model.1.eps")


@program
def leaky_slope() -> Program:
    return of_model(nn.LeakyReLU(0.1), lambda m: setattr(m, "negative_slope", 0.2), "model.1.negative_slope")


@program
def gelu_approximation() -> Program:
    return of_model(nn.GELU(), lambda m: setattr(m, "approximate", "tanh"), "model.1.approximate")


@program
def training_flag() -> Program:
    return of_model(nn.Dropout(0.1), lambda m: m.eval(), "model.1.training")


@program
def users_attribute() -> Program:
    part = Part(lambda self, x: x * self.scale, scale=1.0)
    return of_model(part, lambda m: setattr(m, "scale", 2.0), "model.1.scale")


@program
def attribute_read_in_the_loss() -> Program:
    model = around(nn.Tanh())
    model[2].scale = 1.0  # type: ignore[assignment]
    loss = lambda model, x, y: F.mse_loss(model(x) * model[2].scale, y)  # noqa: E731
    return Program(loss, lambda: setattr(model[2], "scale", 2.0), "model.2.scale", model)


@program
def attribute_that_is_new() -> Program:
    part = Part(lambda self, x: x * getattr(self, "gain", 1.0))
    return of_model(part, lambda m: setattr(m, "gain", 2.0), "model.1.gain")


@program
def attribute_with_a_computed_name() -> Program:
    part = Part(lambda self, x: x * sum(getattr(self, f"a{i}") for i in range(2)), a0=1.0, a1=1.0)
    return of_model(part, lambda m: setattr(m, "a1", 2.0), "model.1.a1")


@program
def attribute_that_is_gone() -> Program:
    part = Part(lambda self, x: x * 2 if hasattr(self, "double") else x, double=True)
    return of_model(part, lambda m: delattr(m, "double"), "model.1.double")


@program
def attribute_over_a_class_attribute() -> Program:
    part = Part(lambda self, x: x * self.factor)
    return of_model(part, lambda m: setattr(m, "factor", 2.0), "model.1.factor")


@program
def list_in_a_module() -> Program:
    part = Part(lambda self, x: x * self.scales[0], scales=[1.0])
    return of_model(part, lambda m: m.scales.__setitem__(0, 2.0), "model.1.scales[0]")


@program
def dictionary_in_a_module() -> Program:
    part = Part(lambda self, x: x * self.scales["a"], scales={"a": 1.0})
    return of_model(part, lambda m: m.scales.update(a=2.0), "model.1.scales['a']")


@program
def set_in_a_module() -> Program:
    part = Part(lambda self, x: x.tanh() if 3 in self.active else x, active={1})
    return of_model(part, lambda m: m.active.add(3), "model.1.active")


@program
def deque_in_a_module() -> Program:
    part = Part(lambda self, x: x * self.recent[0], recent=collections.deque([1.0]))
    return of_model(part, lambda m: m.recent.appendleft(2.0), "model.1.recent[0]")


@program
def dictionary_in_a_tuple() -> Program:
    part = Part(lambda self, x: x * self.parts[0]["a"], parts=({"a": 1.0},))
    return of_model(part, lambda m: m.parts[0].update(a=2.0), "model.1.parts[0]['a']")


@program
def fourth_level() -> Program:
    part = Part(lambda self, x: x * self.a["b"][0]["c"][0], a={"b": [{"c": [1.0]}]})
    return of_model(part, lambda m: m.a["b"][0]["c"].__setitem__(0, 2.0), "model.1.a['b'][0]['c'][0]")


@program
def array_in_a_module() -> Program:
    part = Part(lambda self, x: x * float(self.scale[0]), scale=np.ones(2))
    return of_model(part, lambda m: m.scale.__setitem__(0, 2.0), "model.1.scale")


@program
def array_replaced() -> Program:
    part = Part(lambda self, x: x * float(self.scale[0]), scale=np.ones(2))
    return of_model(part, lambda m: setattr(m, "scale", np.zeros(2)), "model.1.scale")


@program
def object_with_slots() -> Program:
    @dataclasses.dataclass(slots=True)
    class Configuration:
        scale: float = 1.0

    part = Part(lambda self, x: x * self.configuration.scale, configuration=Configuration())
    return of_model(part, lambda m: setattr(m.configuration, "scale", 2.0), "model.1.configuration.scale")


@program
def dataclass_in_a_module() -> Program:
    @dataclasses.dataclass
    class Configuration:
        scale: float = 1.0

    part = Part(lambda self, x: x * self.configuration.scale, configuration=Configuration())
    return of_model(part, lambda m: setattr(m.configuration, "scale", 2.0), "model.1.configuration.scale")


@program
def objects_in_a_list() -> Program:
    def forward(self: Any, x: Tensor) -> Tensor:
        for each in self.each:
            x = x * each.scale
        return x

    part = Part(forward, each=[types.SimpleNamespace(scale=1.0), types.SimpleNamespace(scale=1.0)])
    return of_model(part, lambda m: setattr(m.each[0], "scale", 2.0), "model.1.each[0].scale")


@program
def enumeration() -> Program:
    part = Part(lambda self, x: x if self.phase is Phase.FIRST else x.tanh(), phase=Phase.FIRST)
    return of_model(part, lambda m: setattr(m, "phase", Phase.SECOND), "model.1.phase")


@program
def activation_function_replaced() -> Program:
    part = Part(lambda self, x: self.activation(x), activation=torch.tanh)
    return of_model(part, lambda m: setattr(m, "activation", torch.sigmoid), "model.1.activation")


@program
def partial_replaced() -> Program:
    part = Part(lambda self, x: self.activation(x), activation=functools.partial(F.leaky_relu, negative_slope=0.1))
    changed = functools.partial(F.leaky_relu, negative_slope=0.2)
    return of_model(part, lambda m: setattr(m, "activation", changed), "model.1.activation")


@program
def forward_of_an_instance() -> Program:
    return of_model(nn.Tanh(), lambda m: setattr(m, "forward", torch.sigmoid), "model.1.forward")


@program
def forward_of_a_class() -> Program:
    class Patched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    label = f"{Patched.__qualname__}.forward"
    return of_model(Patched(), lambda m: setattr(Patched, "forward", lambda self, x: x.sigmoid()), label)


@program
def method_of_a_class() -> Program:
    class Patched(nn.Module):
        def activation(self, x: Tensor) -> Tensor:
            return x.tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(x)

    label = f"{Patched.__qualname__}.activation"
    return of_model(Patched(), lambda m: setattr(Patched, "activation", lambda self, x: x.sigmoid()), label)


@program
def class_attribute() -> Program:
    class Scaled(nn.Module):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    return of_model(Scaled(), lambda m: setattr(Scaled, "scale", 2.0), f"{Scaled.__qualname__}.scale")


@program
def attribute_behind_a_property() -> Program:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept = 1.0

        @property
        def scale(self) -> float:
            return self.kept

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    return of_model(Scaled(), lambda m: setattr(m, "kept", 2.0), "model.1.kept")


@program
def child_replaced() -> Program:
    model = around(nn.Tanh())
    return Program(plain_loss, lambda: model.__setitem__(1, nn.ReLU()), "model.1", model)


@program
def child_added() -> Program:
    model = around(nn.Tanh())
    return Program(plain_loss, lambda: model.append(nn.ReLU()), "model.3", model)


@program
def parameter_replaced() -> Program:
    model = around(nn.Tanh())
    return Program(plain_loss, lambda: setattr(model[0], "bias", nn.Parameter(torch.ones(8))), "model.0.bias", model)


@program
def parameter_replaced_by_an_equal_one() -> Program:
    part = Part(lambda self, x: x * self.scale, scale=nn.Parameter(torch.ones(())))
    return of_model(part, lambda m: setattr(m, "scale", nn.Parameter(torch.ones(()))), "model.1.scale")


@program
def buffer_replaced() -> Program:
    part = nn.BatchNorm1d(8)
    return of_model(part, lambda m: setattr(m, "running_mean", torch.ones(8)), "model.1.running_mean")


@program
def parameter_frozen() -> Program:
    model = around(nn.Tanh())
    return Program(plain_loss, lambda: model[0].requires_grad_(False), "model.0.weight.requires_grad", model)


@program
def model_cast() -> Program:
    model = around(nn.Tanh())
    return Program(plain_loss, lambda: model.double(), "model.0.weight.dtype", model)


@program
def tensor_reshaped_in_place() -> Program:
    part = Part(lambda self, x: x * self.scale.sum(), scale=torch.ones(2))
    return of_model(part, lambda m: setattr(m.scale, "data", torch.ones(3)), "model.1.scale.shape")


# Hooks


@program
def forward_hook() -> Program:
    hook = lambda module, given, out: out * 2  # noqa: E731
    return of_model(nn.Tanh(), lambda m: m.register_forward_hook(hook), "model.1's forward hook")


@program
def forward_pre_hook() -> Program:
    hook = lambda module, given: (given[0] * 2,)  # noqa: E731
    return of_model(nn.Tanh(), lambda m: m.register_forward_pre_hook(hook), "model.1's forward pre-hook")


@program
def backward_hook() -> Program:
    hook = lambda module, given, out: (given[0] * 2,)  # noqa: E731
    return of_model(nn.Tanh(), lambda m: m.register_full_backward_hook(hook), "model.1's backward hook")


@program
def backward_pre_hook() -> Program:
    hook = lambda module, out: (out[0] * 2,)  # noqa: E731
    return of_model(nn.Tanh(), lambda m: m.register_full_backward_pre_hook(hook), "model.1's backward pre-hook")


@program
def hook_removed() -> Program:
    part = nn.Tanh()
    handle = part.register_forward_hook(lambda module, given, out: out * 2)
    return of_model(part, lambda m: handle.remove(), "model.1's forward hook")


@program
def value_in_a_hooks_closure() -> Program:
    scales = [1.0]
    part = nn.Tanh()
    part.register_forward_hook(lambda module, given, out: out * scales[0])
    return of_model(part, lambda m: scales.__setitem__(0, 2.0), "scales[0]")


@program
def hook_on_a_parameter() -> Program:
    model = around(nn.Tanh())
    weight = model.get_parameter("0.weight")
    return Program(plain_loss, lambda: weight.register_hook(lambda g: g * 2), "model.0.weight's gradient hook", model)


@program
def tag_on_a_parameter() -> Program:
    model = around(nn.Tanh())

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        decayed = [p.square().sum() for p in model.parameters() if getattr(p, "decay", False)]
        return plain_loss(model, x, y) + sum(decayed)

    return Program(loss, lambda: setattr(model[0].weight, "decay", True), "model.0.weight.decay", model)
