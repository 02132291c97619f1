"""What the torch optimizer hears of Dynamo."""

from __future__ import annotations

import torch

from fusion_compile._torch_optim._compat import OnCompile


def test_it_hears_of_each_compilation_until_it_is_removed() -> None:
    heard: list[int] = []
    numbers = iter(range(2, 9))  # each is another program
    listener = OnCompile(lambda: heard.append(1))

    def compile_once() -> None:
        compiled = torch.compile(lambda x, n: x + n, backend="eager", dynamic=False)
        compiled(torch.ones(2), next(numbers))

    compile_once()
    assert heard == [1]
    torch.compiler.reset()  # forgets callbacks
    compile_once()
    assert heard == [1]
    listener.listen()
    listener.listen()
    compile_once()
    assert heard == [1, 1]
    listener.remove()
    listener.remove()
    compile_once()
    assert heard == [1, 1]
