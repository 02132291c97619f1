"""The building block of optimizers: a pair of pure functions, and what others may know about it.

A `Transform` maps gradients to updates that are *added* to the parameters. It sees banks
(``fusion_compile._state.banks``): ``{"spectral/384x1536": [K, m, n], "scalar": [N]}``. It is written for matrices
``[..., m, n]`` or for any shape, and cannot tell a bank from one tensor. `chain` runs transforms one after another,
`partition` gives each role a transform of its own (``_combine``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, prod
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._ranges import refuse_given
from fusion_compile.optim._schedules import Schedule

State: TypeAlias = Any
"""A NamedTuple (or tuple, or dictionary) of tensors and of dictionaries keyed like the parameters; each transform
defines its own."""

ELEMENTWISE = "scalar"
"""Role of parameters that are updated entry by entry (flat banks)."""
SPECTRAL = "spectral"
"""Role of matrices on the spectral path (stacked banks ``[K, m, n]``)."""
MATRIX = "matrix"
"""Role of every parameter of two or more axes, whatever its size, that is not on the spectral path: stacked banks, for
transforms that need rows and columns (factored second moments, centred gradients)."""


class Named(NamedTuple):
    """A hyperparameter with a name of its own, for two parts of an optimizer that need different values.

    Example:
        >>> from fusion_compile import optim
        >>> optim.adamw(lr=optim.Named("head_lr", 3e-4)).hyperparameters["head_lr"]
        0.0003
    """

    name: str
    value: float | Schedule


Number: TypeAlias = float | Schedule | Named
"""What a factory accepts for a hyperparameter: a number, a schedule, or either under a name of its own."""

First = TypeVar("First")
Second = TypeVar("Second")


class Context(NamedTuple):
    """What a transform may know of one step besides gradients and parameters.

    `hyperparameters`: 0-dim tensors by name, on the parameters' device. `loss`: 0-dim, the loss at the gradient point,
    or None where no loss exists. `due`: whether `Extras.period` selects this step; a Python bool, so each of the two
    kinds of step is a program of its own. `finite`: whether an entry of the state that would become infinite or nan
    must stay what it was (``skip_nonfinite``); the step sees to it, except inside of what a transform encodes itself.
    `present`: by bank, which entries of a flat bank and which matrices of a stacked one move in this step; the rest
    stays, whatever the transform returns for it. None: all.
    """

    hyperparameters: Mapping[str, Tensor]
    loss: Tensor | None = None
    due: bool = False
    finite: bool = False
    present: Mapping[str, Tensor] | None = None


class Place(NamedTuple):
    """Where one parameter lies in its bank: index `at` of a stacked bank, offset `at` of a flat one.

    `order`: its axes in the order of memory where that is another than theirs (``channels_last``: 0, 2, 3, 1); empty
    otherwise.
    """

    name: str
    shape: tuple[int, ...]
    at: int
    order: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Number of entries."""
        return prod(self.shape)


class Blocks(NamedTuple):
    """Sizes of the blocks into which every matrix of a bank is cut: along its rows (`axis` -2) or columns (-1)."""

    sizes: tuple[int, ...]
    axis: int = -2


class BankInfo(NamedTuple):
    """What a transform may know of a bank besides its tensors: its parameters, and how its matrices are cut.

    `names`: int64, what stands for the parameters' names where one program serves many banks of this form, one after
    another; None where the names count.
    """

    places: tuple[Place, ...]
    blocks: Blocks | None = None
    names: Tensor | None = None


BankInfos: TypeAlias = Mapping[str, BankInfo]
"""By bank key."""


class Periodic(NamedTuple):
    """Work on the state that is too expensive for every step: a second program, run after steps 1, 1 + `every`,
    1 + 2 `every`, … (the official codes of SOAP and KL-Shampoo count like this).

    ``update(state, params, context) -> state`` is pure; it is compiled separately and without a CUDA graph. `first`
    replaces it, uncompiled, after the very first step (it may use what cannot be captured).
    """

    name: str
    every: int
    update: Callable[[State, Tensors, Context], State]
    first: Callable[[State, Tensors, Context], State] | None = None

    def is_due(self, steps: int) -> bool:
        """Say whether the work runs after a step.

        Args:
            steps: Steps taken, that one included.

        Returns:
            Whether it runs.
        """
        return (steps - 1) % self.every == 0


class EmptyState(NamedTuple):
    """The state of a transform that keeps nothing."""


class Extras(NamedTuple):
    """Everything about a transform except its two functions. All fields have defaults.

    Attributes:
        name: Shown in messages.
        hyperparameters: Default numbers or schedules by name; every one is live.
        roles: Roles that the transform wants parameters to have; empty if any parameter will do.
        gradient_point: ``(params, state, context) -> params``: the weights at which the loss is differentiated, if they
            are not the parameters themselves (Schedule-Free's y). Entry by entry, a straight line in `params`.
        diagnostics: ``state -> {name: 0-dim tensor}``: reads what `update` left in the state for people to see.
        periodic: Work every K steps; see `Periodic`.
        period: Every `period`-th step, including the first, runs with ``context.due``; 0 means never.
        bind: ``infos -> Transform``: the same transform once the contents of the banks are known. The form of its state
            may depend on them, so it is called before `init`.
        descends: Whether the updates go downhill, that is, whether the transform already multiplies by a negative
            learning rate. A transform without a step is refused as an optimizer.
        after_step: Whether the transform may follow a part that takes a step, because it takes updates as well as
            directions (a factor on each, a bound on their norm). Anything else behind a step is refused.
        notes: ``device type -> sentence``: what the transform chooses by the device, for `explain`.
        second_moments: Fields of the state by whose root updates are divided; `stored` refuses codecs that would turn
            small ones into zero.
        alignment: Every parameter starts at a multiple of so many entries in its flat bank.
        stored: Codec by field of the state, of fields that `stored` keeps in fewer bytes.
        max_aspect: Matrices that are more than so many times as long as wide are not wanted on the spectral path.
        pools: What the update of one parameter needs of all others, as the subject of a sentence; empty where each
            parameter's depends on itself alone. Such an update cannot be taken as soon as a gradient arrives.
        leaves_unread: Whether every parameter has numbers of its own, so that a step may leave some alone.
    """

    name: str = "transform"
    hyperparameters: Mapping[str, float | Schedule] = {}
    roles: tuple[str, ...] = ()
    gradient_point: Callable[[Tensors, State, Context], Tensors] | None = None
    diagnostics: Callable[[State], Mapping[str, Tensor]] | None = None
    periodic: tuple[Periodic, ...] = ()
    period: int = 0
    bind: Callable[[BankInfos], Transform] | None = None
    descends: bool = False
    after_step: bool = False
    notes: tuple[Callable[[str], str], ...] = ()
    second_moments: tuple[str, ...] = ()
    alignment: int = 1
    stored: Mapping[str, str] = {}
    max_aspect: float = inf
    pools: str = ""
    leaves_unread: bool = False


class Transform(NamedTuple):
    """Two pure functions, and `extras` about them. Neither function changes its arguments.

    Attributes:
        init: ``params -> state``.
        update: ``(updates, state, params, context) -> (updates, state)``. Gradients come in, or what the part before
            made of them.
        extras: Name, hyperparameters, roles and the rest; see `Extras`. Each can be read as an attribute of the
            transform: ``transform.roles``.

    Example:
        >>> from fusion_compile import optim
        >>> def sign(updates, state, params, context):
        ...     return {key: u.sign() for key, u in updates.items()}, state
        >>> scale_by_sign = optim.Transform(lambda params: optim.EmptyState(), sign, optim.Extras(name="scale_by_sign"))
        >>> sign_sgd = optim.chain(scale_by_sign, optim.scale_by_learning_rate(1e-3))
        >>> scale_by_sign.descends, sign_sgd.descends
        (False, True)
    """

    init: Callable[[Tensors], State]
    update: Callable[[Tensors, State, Tensors, Context], tuple[Tensors, State]]
    extras: Extras = Extras()

    @property
    def name(self) -> str:
        return self.extras.name

    @property
    def hyperparameters(self) -> Mapping[str, float | Schedule]:
        return self.extras.hyperparameters

    @property
    def roles(self) -> tuple[str, ...]:
        return self.extras.roles

    @property
    def gradient_point(self) -> Callable[[Tensors, State, Context], Tensors] | None:
        return self.extras.gradient_point

    @property
    def diagnostics(self) -> Callable[[State], Mapping[str, Tensor]] | None:
        return self.extras.diagnostics

    @property
    def periodic(self) -> tuple[Periodic, ...]:
        return self.extras.periodic

    @property
    def period(self) -> int:
        return self.extras.period

    @property
    def bind(self) -> Callable[[BankInfos], Transform] | None:
        return self.extras.bind

    @property
    def descends(self) -> bool:
        return self.extras.descends

    @property
    def after_step(self) -> bool:
        return self.extras.after_step

    @property
    def notes(self) -> tuple[Callable[[str], str], ...]:
        return self.extras.notes

    def __copy__(self) -> Transform:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Transform:
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            f"{self.name} is a Transform, made of functions, and cannot be pickled; pickle a recipe's name or a "
            f"callable that makes it, functools.partial(optim.adamw, lr=1e-3) for example."
        )

    def with_extras(self, **changes: Any) -> Transform:
        """Copy the transform with some of its `extras` replaced: ``transform.with_extras(name="mine")``.

        Args:
            **changes: Fields of `Extras` and their new values.

        Returns:
            The new transform; this one stays as it is.

        Raises:
            ValueError: New `hyperparameters` lack one of the old, which `update` reads.
        """
        numbers = changes.get("hyperparameters", self.hyperparameters)
        if lacking := [name for name in self.hyperparameters if name not in numbers]:
            raise ValueError(
                f"with_extras(hyperparameters=…) lacks {lacking[0]!r}, which {self.name} reads; give all of its "
                f"numbers: {{**transform.hyperparameters, {lacking[0]!r}: 0.1}}."
            )
        return self._replace(extras=self.extras._replace(**changes))


def check_transform(where: str, given: object) -> None:
    """TypeError if `given`, the argument named by `where`, is not a transform."""
    if not isinstance(given, Transform):
        called = f"; call it: {given.__name__}(…)" if callable(given) and hasattr(given, "__name__") else ""
        raise TypeError(f"{where} was given a {type(given).__name__}, not a Transform{called}.")


def bound(transform: Transform, infos: BankInfos) -> Transform:
    """`transform` with the contents of its banks known; itself if it does not ask for them."""
    return transform if transform.bind is None else transform.bind(infos)


def declare(default_name: str, value: Number) -> Named:
    """`value` with its name: its own if it is `Named`, else `default_name`.

    ValueError for a number outside of the range of either name.
    """
    named = value if isinstance(value, Named) else Named(default_name, value)
    for name in dict.fromkeys((default_name, named.name)):
        refuse_given(name, named.value, named.name)
    return named


def declare_betas(betas: tuple[Number, Number]) -> tuple[Named, Named]:
    """Both numbers of `betas` with their names, ``beta1`` and ``beta2`` by default. TypeError if it is not a pair."""
    first, second = pair_of(betas)
    return declare("beta1", first), declare("beta2", second)


def pair_of(betas: tuple[First, Second], option: str = "betas") -> tuple[First, Second]:
    """Both numbers of `betas`. TypeError if it is not a pair."""
    if isinstance(betas, Named) or not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"{option}={betas!r} is not a pair; give two numbers, (0.9, 0.999) for example.")
    return betas[0], betas[1]


def by_name(*numbers: Named) -> dict[str, float | Schedule]:
    """Hyperparameters as `Extras` holds them. One name with two values is a ValueError."""
    return merge_hyperparameters(*({number.name: number.value} for number in numbers))


def merge_hyperparameters(*declared: Mapping[str, float | Schedule]) -> dict[str, float | Schedule]:
    """The union of declared hyperparameters. One name is one number, so two different values are a ValueError."""
    merged: dict[str, float | Schedule] = {}
    for hyperparameters in declared:
        for name, value in hyperparameters.items():
            if name in merged and merged[name] != value:
                raise ValueError(
                    f"hyperparameter {name!r} is declared twice with different values ({merged[name]} and {value}); "
                    f"give both the same value, or one of them a name of its own: Named('scalar_{name}', {value})."
                )
            merged[name] = value
    return merged


def stateless(
    update: Callable[[Tensors, Tensors, Context], Tensors],
    hyperparameters: Mapping[str, float | Schedule],
    name: str,
    *,
    descends: bool = False,
) -> Transform:
    """A transform from a function of ``(updates, params, context)`` alone."""

    def init(params: Tensors) -> EmptyState:
        return EmptyState()

    def update_fn(updates: Tensors, state: State, params: Tensors, context: Context) -> tuple[Tensors, State]:
        return update(updates, params, context), state

    return Transform(init, update_fn, Extras(name, hyperparameters, descends=descends))
