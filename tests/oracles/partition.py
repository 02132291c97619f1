"""Several twins side by side, each on its own names: Schedule-Free over Muon on matrices, AdamW on the rest."""

from collections.abc import Callable, Collection, Sequence

from tests.oracles.protocol import Given, Oracle, Tensors, float64_copies

Part = tuple[Collection[str], Callable[[Tensors], Oracle]]


class Partition:
    """`Partition(params, [(("w",), lambda p: ScheduleFree(p, ...)), (("b",), AdamW)])`; `lr` is the first part's."""

    def __init__(self, params: Given, parts: Sequence[Part]) -> None:
        every = float64_copies(params)
        named = [name for names, _ in parts for name in names]
        if sorted(named) != sorted(every):
            raise ValueError(f"each tensor needs exactly one part; got parts for {named}, tensors {list(every)}")
        self.names = tuple(every)
        self.parts = [(tuple(names), build({n: every[n] for n in names})) for names, build in parts]

    @property
    def lr(self) -> float:
        return self.parts[0][1].lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.parts[0][1].lr = value

    def gradient_point(self) -> Tensors:
        return self._in_order([oracle.gradient_point() for _, oracle in self.parts])

    def weights(self) -> Tensors:
        return self._in_order([oracle.weights() for _, oracle in self.parts])

    def step(self, grads: Given) -> None:
        for names, oracle in self.parts:
            oracle.step({name: grads[name] for name in names})

    def _in_order(self, answers: list[Tensors]) -> Tensors:
        return {name: next(a[name] for a in answers if name in a) for name in self.names}
