"""`as_torch_optimizer`: any recipe as a ``torch.optim.Optimizer``, for training loops that own forward and backward."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fusion_compile._state.half_precision import check_form
from fusion_compile._state.kept_average import KeptAverage, averages_of
from fusion_compile._state.routing import Route, check_list
from fusion_compile._torch_optim.group_numbers import as_float, as_shown, check_numbers
from fusion_compile._torch_optim.group_record import GroupRecord, names_in
from fusion_compile._torch_optim.grouped_update import GroupedUpdate
from fusion_compile._torch_optim.named_groups import (
    STEPS,
    check_patterns,
    refuse_other_kinds,
    refuse_the_wrong_way_round,
)
from fusion_compile._torch_optim.portable import Averaging, portable, restored, with_averages
from fusion_compile._torch_optim.released_gradients import ReleasedGradients, refuse_scaler
from fusion_compile._torch_optim.saved_state import load_saved
from fusion_compile._torch_optim.several_ranks import asks_for_form, measured_in, refuse_copies, stored_state
from fusion_compile._torch_optim.torch_words import BETAS, MAXIMIZE, gradient_belongs
from fusion_compile._torch_optim.update_program import UpdatePrograms
from fusion_compile.ema import EMA
from fusion_compile.optim._resolve import OptimizerChoice, resolve_optimizer, with_rate
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import Transform

Parameters: TypeAlias = "nn.Module | Iterable[Any]"
Method = TypeVar("Method", bound=Callable[..., Any])


def as_torch_optimizer(
    params: Parameters,
    optimizer: OptimizerChoice = "sf_normuon",
    *,
    lr: float | Schedule | None = None,
    mode: str | None = None,
    backend: str = "inductor",
    force_scalar: Sequence[str] = (),
    force_spectral: Sequence[str] = (),
    model: nn.Module | None = None,
    maximize: bool = False,
    half_precision: str = "master",
    ema: EMA | Sequence[EMA] = (),
    release_gradients: bool = False,
) -> TorchOptimizer:
    """Make a ``torch.optim.Optimizer`` whose step is one compiled program, for Lightning, accelerate or your own loop.

    Every hyperparameter is a float in ``param_groups`` under its declared name. A value written there counts from the
    next step, and nothing recompiles; it may be a tensor of one number, or a schedule, which stays in force until its
    number is written. torch's schedulers write ``lr`` only: with a recipe of two rates give ``scalar_lr`` a schedule of
    its own. A group's ``betas`` is torch's pair: the recipe's own argument of that name.

    A parameter without a gradient is left untouched, weights and moments, as in torch.optim. Such steps are another
    program, one for all choices of missing parameters. Deviation: the step count by which Adam corrects its bias is its
    group's, not its own. What a transform pools over all parameters it pools over a group. Frozen parameters take no
    memory; one joins, at the price of a compile, when it first has a gradient. At the first step parameters become
    views into banks: until then they may be converted and moved to another device; later ``p.data = …`` is a write.
    Parameters of ``fully_shard`` and other DTensors: docs/howto/fully-shard.md.

    With Schedule-Free, parameters hold the gradient point y while training. ``optimizer.eval()`` puts the average x
    there and ``optimizer.train()`` puts y back. A transform that needs the loss takes it from ``step(closure)`` or
    ``set_loss(loss)``. Nothing is clipped or skipped here: gradients are the loop's or a GradScaler's responsibility.

    Memory: the recipe's; an fp32 master for half-precision parameters; with Schedule-Free x, 4 bytes a parameter more
    than in a training step. On a CPU gradients are read where they lie if every entry is updated alone (``adamw``,
    ``lion``, ``sf_adamw``); else there are banks of them, where a large one lies itself from the second step on.

    Args:
        params: The model, which routes as in `compile_training_step`; ``model.named_parameters()``; a list of groups
            ``{"params": <named parameters>, "lr": 3e-4, "weight_decay": 0.0}``; or plain parameters. Without the model
            an embedding is known by its name only (``embed``, ``wte``, …), the last layer by names such as ``lm_head``,
            and convolutions are elementwise; `force_scalar` and `force_spectral` override. Of plain parameters a recipe
            for matrices sees the shapes alone, and warns.
        optimizer: A recipe's name, a `Transform`, or a callable that makes one (``partial(optim.adamw, eps=1e-6)``). An
            optimizer made of a name or a callable can be pickled.
        lr: Replaces the recipe's learning rate, a number or a schedule; its unit is the recipe's.
        mode: One of torch.compile's modes or ``"eager"``, as in `compile_training_step`.
        backend: A torch.compile backend.
        force_scalar: Regular expressions over full parameter names that are updated entry by entry.
        force_spectral: Regular expressions over full parameter names that are updated as matrices.
        model: The model that plain parameters or groups belong to; it gives them their names and routes.
        maximize: Go uphill, as in torch.optim; also a group's key.
        half_precision: How bf16 and fp16 parameters are updated; see docs/training.md.
        ema: Moving averages of the deployed weights, updated in the same program: `EMA`, or several with different
            names. A step that a GradScaler leaves out leaves them too.
        release_gradients: ``backward()`` updates each parameter as soon as its gradient is complete, and frees the
            gradient; ``step()`` only ends the step. Nothing can be clipped, scaled or accumulated then.

    Returns:
        The optimizer. Nothing is compiled before its first step.

    Raises:
        TypeError: The arguments are the wrong way round, an entry of `params` is no parameter, or `optimizer` is of the
            wrong kind.
        ValueError: A recipe, number or option is unknown; a parameter is given twice; a pattern matches nothing.

    Example:
        >>> import torch, fusion_compile as fc
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fc.optim.as_torch_optimizer(model, "adamw", lr=1e-2, mode="eager")
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["lr"]
        0.01
    """
    refuse_the_wrong_way_round(params, optimizer)
    made = TorchOptimizer(
        params,
        Averaging(optimizer, averages_of(ema)),
        lr=lr,
        mode=mode,
        backend=backend,
        force_scalar=force_scalar,
        force_spectral=force_spectral,
        model=model,
    )
    made._keep_weights_as(half_precision)
    if maximize:
        made._go_uphill()
    made._release_gradients(release_gradients)
    return made


def _uncaptured(method: Method) -> Method:
    """`method`, which a torch.compile of the user's loop calls as it is: Dynamo cannot read it, and need not."""
    disable: Callable[..., Any] = torch.compiler.disable  # torch gives it no types
    called: Method = disable(method, reason="the optimizer's update is a compiled program of its own")
    return called


class TorchOptimizer(torch.optim.Optimizer):
    """A recipe as a ``torch.optim.Optimizer``; made by `as_torch_optimizer`.

    Attributes:
        param_groups: Options of each group; every hyperparameter is a float there, and ``steps`` counts its steps.
        state: From the first step on, views of all state by parameter. Clearing it starts the optimizer fresh.
        routes: Which parameter goes where, and why.
        diagnostics: What the optimizer's parts measured in the last step.

    Example:
        >>> import torch, fusion_compile as fc
        >>> optimizer = fc.optim.as_torch_optimizer(torch.nn.Linear(4, 2), "sf_adamw", mode="eager")
        >>> isinstance(optimizer, torch.optim.Optimizer)
        True
        >>> optimizer.eval()  # the average x, to evaluate or save the model
    """

    def __init__(
        self,
        params: Parameters,
        optimizer: OptimizerChoice | Averaging,
        *,
        lr: float | Schedule | None,
        mode: str | None,
        backend: str,
        force_scalar: Sequence[str],
        force_spectral: Sequence[str],
        model: nn.Module | None = None,
    ) -> None:
        optimizer, averages = optimizer if isinstance(optimizer, Averaging) else (optimizer, ())
        made = with_averages(resolve_optimizer(optimizer), averages)
        numbers = with_rate(made, lr)
        if reserved := next((n for n in (STEPS, BETAS, MAXIMIZE) if n in numbers), None):
            raise ValueError(f"{made.name} has a hyperparameter {reserved!r}, which the optimizer needs; rename it.")
        check_numbers(numbers)
        refuse_other_kinds(params)
        model = params if isinstance(params, nn.Module) else model
        groups = list(params.named_parameters() if isinstance(params, nn.Module) else params)
        if not groups:
            raise ValueError("the optimizer was given no parameters; give the model or model.named_parameters().")
        check_list("force_scalar", force_scalar)
        check_list("force_spectral", force_spectral)
        programs, patterns = UpdatePrograms(mode, backend), (tuple(force_scalar), tuple(force_spectral))
        for kept in averages:
            kept.wait_for(model)
        self._inside = GroupedUpdate(optimizer, made, numbers, programs, *patterns, model, averages=averages)
        defaults = {**{n: as_shown(v) for n, v in numbers.items()}, STEPS: 0}
        if betas := self._inside.betas:
            defaults[BETAS] = tuple(as_float(defaults[n]) for n in betas)
        super().__init__(groups, defaults)
        check_patterns(names_in(self._inside.records, self.param_groups), made, force_scalar, force_spectral)
        if lr is not None:
            self._inside.refuse_unread_rate(self.param_groups)

    def _keep_weights_as(self, half_precision: str) -> None:
        """Say how half-precision parameters are updated. ValueError for a form that is not known."""
        check_form(half_precision)
        self._inside.half_precision = half_precision

    def _release_gradients(self, asked: bool) -> None:
        """Update inside backward(), if `asked`. ValueError for what needs all gradients."""
        self._inside.released = ReleasedGradients(self, self._inside) if asked else None

    @property
    def _step_supports_amp_scaling(self) -> bool:  # a GradScaler asks before each step
        return False if self._inside.released is None else refuse_scaler()

    def _go_uphill(self) -> None:
        """Maximize in all groups that do not say otherwise, those that join later too."""
        self.defaults[MAXIMIZE] = True
        for options in self.param_groups:
            options.setdefault(MAXIMIZE, True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim; it starts with a step count of its own.

        Args:
            param_group: ``params``, as tensors or as pairs of name and tensor, and the group's own numbers (``lr``, …).

        Raises:
            TypeError: An entry is no tensor, or a number is none.
            ValueError: A parameter is in a group already, a number is not known or out of its range.
        """
        inside, at = self._inside, len(self.param_groups)
        names: list[str] = []
        schedules = {n: v for n, v in inside.numbers.items() if callable(v)}
        if isinstance(param_group, dict) and "params" not in param_group:  # torch.optim refuses what is no group
            raise ValueError(f"parameter group {at} lacks 'params'; it has {', '.join(map(str, param_group))}.")
        if isinstance(param_group, dict) and not isinstance(param_group.get("params", set()), set):
            param_group, names = inside.read_group(param_group, self.param_groups)
            for name in inside.numbers.keys() & param_group.keys():
                schedules.pop(name, None)
                if callable(param_group[name]):
                    schedules[name] = param_group[name]
                param_group[name] = as_shown(param_group[name])
        super().add_param_group(param_group)
        options = self.param_groups[-1]
        if inside.betas:
            options[BETAS] = tuple(as_float(options[n]) for n in inside.betas)
        numbers = {n: as_float(options[n]) for n in inside.numbers}
        inside.records.append(GroupRecord(names, schedules, numbers))

    # ------------------------------------------------------------------ the step

    @_uncaptured
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Nothing waits for the device.

        Args:
            closure: Computes the loss and its gradients again and returns the loss. It runs with gradients enabled.

        Returns:
            What `closure` returned; None without one.

        Raises:
            RuntimeError: The optimizer is in eval mode, a parameter has another shape, dtype or device than in the
                first step, a gradient is sparse or of another dtype or device, or the recipe needs a loss and has none.
        """
        inside = self._inside
        if torch.is_inference_mode_enabled():
            raise RuntimeError("an optimizer step was asked for inside torch.inference_mode(); call it outside.")
        if inside.moves and inside.evaluating and not asks_for_form(inside, self.param_groups):
            raise RuntimeError(f"the optimizer is in eval mode: {gradient_belongs(inside.transform)}")
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        loss, inside.loss = inside.loss if result is None else result, None
        with torch.no_grad():
            inside.update(self.param_groups, self.state, loss)
        return result

    @_uncaptured
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, as in torch.optim.

        Args:
            set_to_none: False keeps them as zeros.
        """
        self._inside.guards.settle()
        super().zero_grad(set_to_none)

    def set_loss(self, loss: Tensor | float) -> None:
        """Set the loss of the next step, for recipes that need it and loops that give ``step`` no closure.

        Args:
            loss: Of the batch whose gradients the next ``step`` applies; one number.
        """
        self._inside.loss = loss.detach() if isinstance(loss, Tensor) else loss

    @_uncaptured
    def train(self, mode: bool = True) -> None:
        """Put the gradient point into the parameters. Does nothing for recipes whose gradient point is the weights.

        Args:
            mode: False is ``eval()``, as in `torch.nn.Module.train`.
        """
        self._inside.show(self.param_groups, not mode)

    def eval(self) -> None:
        """Put the average x into the parameters, to evaluate or save the model. Call ``train()`` before the next
        step."""
        self.train(False)

    @property
    def training(self) -> bool:
        """Whether the optimizer is in train mode. False: the parameters hold what is deployed, and no step may be
        taken."""
        return not (self._inside.moves and self._inside.evaluating)

    @property
    def routes(self) -> tuple[Route, ...]:
        """Which parameter goes where and why, for groups that have taken a step."""
        return tuple(r for group in self._inside.groups() for r in group.routes)

    @property
    def averages(self) -> tuple[KeptAverage, ...]:
        """The moving averages that it keeps (``ema=``); a copy of the optimizer has its own."""
        return self._inside.averages

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """What parts measured in the last step, of several groups under ``<index>/``; nothing of released gradients,
        nor of DTensor parameters."""
        return measured_in(self._inside, several=len(self.param_groups) > 1)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as in torch.optim.

        Returns:
            ``state`` by parameter index (live tensors, not copies) and ``param_groups``.
        """
        inside = self._inside
        if inside.released is not None:
            inside.released.close()
        if inside.guards.on and not inside.guards.saves_averages:
            inside.guards.saved("optimizer.state_dict() was taken")
        with stored_state(self, inside):
            return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave. The model's weights may be loaded before or after.

        Parameters that were moved since the first step are taken up where they are.

        Args:
            state_dict: What `state_dict` gave for an optimizer with the same groups.

        Raises:
            TypeError: A hyperparameter is no number.
            ValueError: Groups, names or shapes differ, or a number is out of its range. Everything is checked first,
                and nothing is loaded.
        """
        saved: Any = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, saved)
            saved = saved if changed is None else changed
        load_saved(self._inside, self.param_groups, self.state, saved)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # ------------------------------------------------------------------ copies

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchOptimizer:
        inside = self._inside
        refuse_copies(inside, "copied")
        memo |= {id(code): code for code in (inside.transform, inside.source)}
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy({**self._portable(), "transform": inside.transform}, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        refuse_copies(self._inside, "pickled")
        if isinstance(self._inside.source, Transform):
            raise TypeError(
                f"an optimizer made of a Transform ({self._inside.transform.name}) cannot be pickled: it is code. Give "
                f"as_torch_optimizer a recipe's name or a callable that makes the transform "
                f"(functools.partial(optim.adamw, lr=1e-3)), or save optimizer.state_dict()."
            )
        return self._portable()

    def _portable(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "state": {p: kept for p, kept in self.state.items() if kept},
            "routes": self.routes,
            **portable(self._inside),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._inside = restored(state)
        super().__setstate__({k: state[k] for k in ("defaults", "param_groups")})
        self.state = defaultdict(dict, state["state"])
        for at, options in enumerate(self.param_groups):
            if any(p in self.state and p.requires_grad for p in options["params"]):
                self._inside.build(at, options, self.state)
        self._release_gradients(bool(state.get("released")))
