"""Lines of the user's own code at which a value is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile.explain._run import use_sites
from fusion_compile.explain._run.use_sites import (
    as_the_callee_names_it,
    callee_of,
    counts_itself,
    first_read,
    is_own,
    is_read,
    makes_without_device,
    read_near,
    starred,
)
from tests.explain.run.lines import line_of


def wrapping(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def inner(*args: Any, **kwargs: Any) -> Any:  # inner
        return fn(*args, **kwargs)

    return inner


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.uses = 0
        self.never_looked_at = 0

    @wrapping
    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        self.uses += 1  # counted
        self.never_looked_at += 1  # counted, too
        if self.uses > 2:
            return images
        return images * scale


class Rule:
    groups: list[dict[str, Any]]

    def step(self) -> None:
        for group in self.groups:  # the groups
            rate = group["lr"]  # the rate
            print(rate)


def test_the_callee_is_found_below_wrappers_and_gives_its_names() -> None:
    callee = callee_of(Model())
    assert callee is not None and callee.parameters == ("self", "images", "scale") and callee.file == __file__
    own = {"args[0]": f"{__name__}.Model"}
    assert as_the_callee_names_it("args[1]", callee, own) == "images"
    assert as_the_callee_names_it("args[0]", callee, {"args[0]": "torch.Tensor"}) == "images"
    assert as_the_callee_names_it("args[1][0]['x']", callee, own) == "images[0]['x']"
    assert as_the_callee_names_it("kwargs['scale']", callee, own) == "scale"
    assert as_the_callee_names_it("args[7]", callee, own) == as_the_callee_names_it("x", callee, own) == ""
    assert callee_of(torch.sin) is None
    stacked = callee_of(nn.Sequential())
    assert stacked is not None and stacked.where == ""  # torch's own lines are not told


def test_the_first_line_that_reads_a_name_is_found() -> None:
    callee = callee_of(Model())
    assert callee is not None
    first = first_read(callee.file, callee.line, "images")
    assert int(first.rpartition(":")[2]) == int(line_of(__file__, "counted, too").rpartition(":")[2]) + 2
    assert first_read(callee.file, callee.line, "absent") == first_read("no file", 1, "x") == ""


def test_a_value_of_a_method_is_named_by_self_and_told_where_it_is_read() -> None:
    found = read_near(line_of(__file__, "the groups"), "args[0].groups[0]['lr']")
    assert found == ("self.groups[0]['lr']", line_of(__file__, "the rate"))
    assert read_near("no file:3", "x") == ("x", "no file:3")


def test_what_stands_for_all_arguments_is_known() -> None:
    file, _, line = line_of(__file__, "inner").rpartition(":")
    assert starred(file, int(line) - 1, "args[0]") and starred(file, int(line) - 1, "kwargs['x']")
    assert not starred(file, int(line) - 1, "fn")


def test_a_number_that_is_only_counted_on_is_told_from_one_that_is_read() -> None:
    counted, never = line_of(__file__, "counted"), line_of(__file__, "counted, too")
    assert counts_itself(counted, "self.uses") and counts_itself(never, "model.never_looked_at")
    assert not counts_itself(counted, "self.other")
    assert is_read(counted, "self.uses") and not is_read(never, "self.never_looked_at")


def made(x: Tensor) -> tuple[Tensor, ...]:
    return (
        torch.zeros(3),  # nowhere
        torch.zeros(3, device=x.device),  # on the device
        torch.ones(3, device="cpu"),  # on the CPU
        torch.linspace(
            0,
            1,  # inside
            steps=3,
        ),
        torch.zeros_like(x),  # like another
    )


def test_a_tensor_made_without_a_device_is_told_from_the_source() -> None:
    found = {
        text: makes_without_device(line_of(__file__, text), name)
        for text, name in (
            ("nowhere", "zeros"),
            ("on the device", "zeros"),
            ("on the CPU", "ones"),
            ("inside", "linspace"),
            ("like another", "zeros"),
        )
    }
    assert [text for text, without in found.items() if without] == ["nowhere", "on the CPU", "inside"]
    assert not makes_without_device("", "zeros")


def test_a_librarys_file_is_not_the_users_own() -> None:
    import jinja2

    assert is_own(__file__)
    assert not any(map(is_own, (torch.__file__, use_sites.__file__, functools.__file__, str(jinja2.__file__))))
