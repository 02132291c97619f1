"""`as_torch_optimizer`: any recipe as a ``torch.optim.Optimizer``, for loops that are not ours."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fusion_compile._state.routing import Route
from fusion_compile._torch_optim.grouped_update import GroupedUpdate, Host, Source, as_float, names_in, refuse
from fusion_compile._torch_optim.named_groups import STEPS, check_options, check_parameters, check_patterns, names_of
from fusion_compile._torch_optim.parameter_group import Parts
from fusion_compile._torch_optim.update_program import UpdatePrograms
from fusion_compile.optim._resolve import resolve_optimizer
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import Transform

Parameters: TypeAlias = "nn.Module | Iterable[Any]"


def as_torch_optimizer(
    transform: Source,
    params: Parameters,
    *,
    mode: str | None = None,
    backend: str = "inductor",
    force_scalar: Sequence[str] = (),
    force_spectral: Sequence[str] = (),
    lr: float | Schedule | None = None,
) -> TorchOptimizer:
    """A ``torch.optim.Optimizer`` whose step is one compiled program, for Lightning, accelerate or a loop of your own.

    `transform`: a `Transform`, a recipe's name, or a callable that makes one (``partial(optim.adamw, eps=1e-6)``); with
    the latter two the optimizer can be pickled. `params`: the model, which routes as in `compile_training_step`;
    ``model.named_parameters()``; a list of groups ``{"params": <named parameters>, "lr": 3e-4, "weight_decay": 0.0}``;
    or, for an elementwise recipe, plain parameters. Without the model an embedding is known by its name only
    (``embed``, ``wte``, …), the last layer by names such as ``lm_head``, and convolutions are elementwise:
    `force_scalar` and `force_spectral` override. `mode`, `backend`, `lr`: as in `compile_training_step`.

    Every hyperparameter is a float in ``param_groups`` under its declared name; what is written there counts from the
    next step and nothing recompiles. A schedule of this package stays in force until somebody else writes its number.
    torch's schedulers write ``lr`` only: with a recipe of two rates give ``scalar_lr`` a schedule of its own.

    A parameter without a gradient is left untouched, weights and moments, as in torch.optim (such steps are another
    program, one for whichever parameters are missing); but the step count by which Adam corrects its bias is its
    group's, not its own. What a transform pools over all parameters it pools over a group. Frozen parameters take no
    memory and join, at the price of a compile, when they first have a gradient. At the first step parameters become
    views into banks; until then they may be moved, from then on copy into them.

    With Schedule-Free, parameters hold the gradient point y while training; ``optimizer.eval()`` puts the average x
    there and ``optimizer.train()`` puts y back. A transform that needs the loss takes it from ``step(closure)`` or
    ``set_loss(loss)``. Nothing is clipped or skipped here: gradients are the loop's, or a GradScaler's, affair.

    Memory: the recipe's; an fp32 master for half-precision parameters; with Schedule-Free x, 4 bytes a parameter more
    than in a training step; and during a step one copy of the gradients.
    """
    return TorchOptimizer(
        transform, params, mode=mode, backend=backend, force_scalar=force_scalar, force_spectral=force_spectral, lr=lr
    )


class TorchOptimizer(torch.optim.Optimizer):
    """See `as_torch_optimizer`, which makes it.

    ``state`` holds, from the first step on, views of all state by parameter; clearing it starts the optimizer anew.
    """

    def __init__(
        self,
        transform: Source,
        params: Parameters,
        *,
        mode: str | None,
        backend: str,
        force_scalar: Sequence[str],
        force_spectral: Sequence[str],
        lr: float | Schedule | None,
    ) -> None:
        made = _resolve(transform)
        numbers = dict(made.hyperparameters)
        if lr is not None and "lr" not in numbers:
            raise ValueError(f"lr was given, but {made.name} has no hyperparameter 'lr'; it has {', '.join(numbers)}.")
        if STEPS in numbers:
            raise ValueError(f"{made.name} has a hyperparameter {STEPS!r}, a name that the optimizer needs; rename it.")
        if lr is not None:
            numbers["lr"] = lr
        model = params if isinstance(params, nn.Module) else None
        groups = list(params.named_parameters() if isinstance(params, nn.Module) else params)
        if not groups:
            raise ValueError("the optimizer was given no parameters; give the model or model.named_parameters().")
        made, programs = made.with_extras(hyperparameters=numbers), UpdatePrograms(mode, backend)
        self._inside = GroupedUpdate(transform, made, programs, (), (), model)
        super().__init__(groups, {**{n: as_float(v) for n, v in numbers.items()}, STEPS: 0})
        check_patterns(names_in(self._inside.hosts, self.param_groups), made, force_scalar, force_spectral)
        self._inside.force_scalar, self._inside.force_spectral = tuple(force_scalar), tuple(force_spectral)
        if model is not None and self._inside.moves:
            model.register_forward_pre_hook(_EvaluatedAtY(self._inside))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim; it starts with a step count of its own."""
        inside, at = self._inside, len(self.param_groups)
        names, schedules = [], {n: v for n, v in inside.transform.hyperparameters.items() if callable(v)}
        # What is no group at all, torch.optim refuses in its own words.
        if isinstance(param_group, dict) and not isinstance(param_group.get("params", set()), set):
            given = param_group["params"]
            param_group = {**param_group, "params": [given] if isinstance(given, Tensor) else list(given)}
            taken = {id(p): n for n, p in names_in(inside.hosts, self.param_groups).items()}
            check_parameters(param_group["params"], at, inside.transform, taken)
            check_options(param_group, at, inside.transform)
            names = names_of(param_group["params"], at)
            for name in inside.transform.hyperparameters.keys() & param_group.keys():
                value = param_group[name]
                schedules.pop(name, None)
                if callable(value):
                    schedules[name] = value
                param_group[name] = as_float(value)
        super().add_param_group(param_group)
        numbers = {n: self.param_groups[-1][n] for n in inside.transform.hyperparameters}
        inside.hosts.append(Host(names, schedules, numbers))

    # ------------------------------------------------------------------ the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns what `closure` returned."""
        inside = self._inside
        if torch.is_inference_mode_enabled():
            raise RuntimeError("an optimizer step was asked for inside torch.inference_mode(); call it outside.")
        if inside.moves and inside.evaluating:
            raise RuntimeError(
                "the optimizer is in eval mode: the parameters hold x, but the gradient belongs at y. Call "
                "optimizer.train() before the forward pass."
            )
        if name := next((n for group in inside.groups() if (n := group.written())), None):
            inside.warn_once(
                "written",
                f"{name} was written to while the parameters hold Schedule-Free's y; this step overwrites it. Call "
                f"optimizer.eval() first, write, then call optimizer.train().",
            )
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        loss, inside.loss = inside.loss if result is None else result, None
        with torch.no_grad():
            inside.update(self.param_groups, self.state, loss)
        return result

    def set_loss(self, loss: Tensor | float) -> None:
        """The loss of the next step, for transforms that need it and loops that give ``step`` no closure."""
        self._inside.loss = loss.detach() if isinstance(loss, Tensor) else loss

    def train(self, mode: bool = True) -> None:
        """Parameters hold the point at which gradients are taken. Does nothing for recipes without such a point."""
        self._inside.show(self.param_groups, not mode)

    def eval(self) -> None:
        """Parameters hold the average x: evaluate and save the model now. ``train()`` before the next step."""
        self.train(False)

    @property
    def routes(self) -> tuple[Route, ...]:
        """Which parameter goes where and why; of groups that have taken a step."""
        return tuple(r for group in self._inside.groups() for r in group.routes)

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """What the optimizer's parts tell of the last step, on the device; of several groups under ``<group>/``."""
        told: dict[str, Tensor] = {}
        for group in self._inside.groups():
            if (tells := group.transform.diagnostics) is not None:
                prefix = f"{group.at}/" if len(self.param_groups) > 1 else ""
                told |= {prefix + n: value.clone() for n, value in tells(group.optimizer(group.state)).items()}
        return told

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim: ``state`` by parameter index (live tensors, not copies) and ``param_groups``."""
        inside = self._inside
        if inside.moves and not inside.evaluating and any(inside.groups()):
            inside.warn_once(
                "state_dict",
                "optimizer.state_dict() in train mode: the model's weights are Schedule-Free's y, not the average x. "
                "Call optimizer.eval() before saving the model, and optimizer.train() to go on.",
            )
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave. Everything is checked first: on a mismatch a ValueError, and nothing is loaded.

        Load the model's weights before. Parameters that were moved since the first step are taken up where they are.
        """
        inside, own = self._inside, self.param_groups
        saved: Any = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, saved)
            saved = saved if changed is None else changed
        if lacking := [k for k in ("state", "param_groups") if k not in saved]:
            raise ValueError(f"this is no optimizer's state_dict(): it lacks {', '.join(lacking)}.")
        theirs, sizes = saved["param_groups"], [len(options["params"]) for options in own]
        if [len(options["params"]) for options in theirs] != sizes:
            raise ValueError(
                f"the checkpoint has parameter groups of {[len(options['params']) for options in theirs]} parameters, "
                f"this optimizer of {sizes}; nothing was loaded. Build it with the groups that saved it."
            )
        parts: list[dict[str, Parts]] = []
        for host, options in zip(inside.hosts, theirs, strict=True):
            named = {n: saved["state"].get(i) for n, i in zip(host.names, options["params"], strict=True)}
            parts.append({n: kept for n, kept in named.items() if kept})
        targets = {}
        for at, host in enumerate(inside.hosts):
            if host.group is not None and not host.group.in_place:
                host.group = None
            if host.group is not None or (parts[at] and any(p.requires_grad for p in own[at]["params"])):
                targets[at] = host.group or inside.new_group(at, own[at])
        refuse([p for at, group in targets.items() for p in group.problems(parts[at])])

        for at, (host, options) in enumerate(zip(inside.hosts, own, strict=True)):
            options.update({k: copy.deepcopy(v) for k, v in theirs[at].items() if k not in ("params", "param_names")})
            host.seen = {n: options[n] for n in host.seen}
            for name, p in zip(host.names, options["params"], strict=True):
                self.state.pop(p, None)
                if name in parts[at]:
                    self.state[p] = dict(parts[at][name])  # a frozen parameter's, until it joins
        for at, group in targets.items():
            with torch.no_grad():
                group.load(parts[at])
            inside.adopt(group, own[at], self.state)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # ------------------------------------------------------------------ copies

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchOptimizer:
        inside = self._inside
        memo |= {id(code): code for code in (inside.transform, inside.source)}
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy({**self._portable(), "transform": inside.transform}, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self._inside.source, Transform):
            raise TypeError(
                f"an optimizer made of a Transform ({self._inside.transform.name}) cannot be pickled: it is code. Give "
                f"as_torch_optimizer a recipe's name or a callable that makes the transform "
                f"(functools.partial(optim.adamw, lr=1e-3)), or save optimizer.state_dict()."
            )
        return self._portable()

    def _portable(self) -> dict[str, Any]:
        inside = self._inside
        programs = (inside.programs.mode, inside.programs.backend)
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "state": {p: kept for p, kept in self.state.items() if kept},
            "inside": (inside.source, programs, inside.force_scalar, inside.force_spectral, inside.evaluating),
            "hosts": [(host.names, host.schedules, host.seen) for host in inside.hosts],
            "routes": self.routes,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        source, programs, off, on, evaluating = state["inside"]
        made = state["transform"] if "transform" in state else _resolve(source)
        routes = {r.name: r for r in state["routes"]}
        hosts = [Host(*host) for host in state["hosts"]]
        self._inside = GroupedUpdate(source, made, UpdatePrograms(*programs), off, on, None, routes, hosts, evaluating)
        super().__setstate__({k: state[k] for k in ("defaults", "param_groups")})
        self.state = defaultdict(dict, state["state"])
        for at, options in enumerate(self.param_groups):
            if any(p in self.state and p.requires_grad for p in options["params"]):
                self._inside.build(at, options, self.state)


class _EvaluatedAtY:
    """A hook before the model's forward: warns when the model is evaluated while its parameters hold y."""

    def __init__(self, inside: GroupedUpdate) -> None:
        self._inside: weakref.ref[GroupedUpdate] | None = weakref.ref(inside)

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or model.training or self._inside is None:
            return
        inside = self._inside()
        if inside is not None and not inside.evaluating and any(inside.groups()):
            inside.warn_once(
                "eval",
                "the model is evaluated (model.training is False) while the optimizer is in train mode: the weights "
                "are Schedule-Free's y, not x. Call optimizer.eval() before, and optimizer.train() to go on.",
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"_inside": None}  # a copy of the model, or a pickled one, has no optimizer


def _resolve(transform: Source) -> Transform:
    return resolve_optimizer(transform)
