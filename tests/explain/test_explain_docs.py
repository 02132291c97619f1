"""docs/explain.md: its programs and commands run, and their results are those on the page."""

from __future__ import annotations

import functools
import importlib
import json
import linecache
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo

import fusion_compile as fc
from examples import explain_a_slow_step as example
from fusion_compile import cli
from fusion_compile.explain import _facts
from fusion_compile.explain._graph.roofline import ROOFLINES
from fusion_compile.passes import Finding
from tests.explain import broken

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explain.md"
TEXT = PAGE.read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
PRINTED = re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^    fusion-compile (.*)$", TEXT, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with the files of the page's first program and of its commands, run in their order. Inductor is left
    out, because no claim that is checked here is about kernels."""
    path = tmp_path_factory.mktemp("explain")
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(trace_autograd_ops=False):
        patch.chdir(path)
        patch.syspath_prepend(str(ROOT))
        eager = functools.partial(fc.explain, backend="eager")
        patch.setattr(cli, "explain", eager)
        patch.setattr(fc, "explain", eager)
        exec(PYTHON[1], {})
        (path / "slow.json").rename(path / "from_python.json")
        (path / "slow.html").unlink()
        for command in COMMANDS:
            if "explain_a_slow_step" in command or command.startswith("diff slow"):
                assert cli.main(shlex.split(command)) == 0, command
        yield path


def read(path: Path) -> fc.Explanation:
    return fc.Explanation.from_json(path)


def findings_told() -> list[tuple[str, ...]]:
    return re.findall(r"^  (explain_a_slow_step\.py:\d+): (.+?) \((\w+)\): (.*)$", PRINTED[0], re.MULTILINE)


def shortened(text: str) -> str:
    return text.replace(f"{Path(example.__file__).parent}/", "")


def test_the_slow_step_has_the_findings_that_are_told_at_their_lines(folder: Path) -> None:
    found = read(folder / "slow.json").findings
    assert [(shortened(f.where), f.op, f.kind, f"{f.why} {f.remedy}") for f in found] == findings_told()
    assert len(found) == 6


def test_python_finds_the_same_as_the_command(folder: Path) -> None:
    assert read(folder / "from_python.json").findings == read(folder / "slow.json").findings


TWELVE_STEPS = """
import torch._dynamo, fusion_compile as fc
from examples import explain_a_slow_step as example
with torch._dynamo.config.patch(trace_autograd_ops=False):
    step, batch = example.slow()
    fc.explain(step, batch, calls=[batch] * 11, backend="eager").to_json("twelve.json")
"""


def test_at_the_twelfth_step_dynamo_has_given_up(tmp_path: Path) -> None:
    """In a process of its own, as the command: Dynamo counts the compilations of a process."""
    paths = os.pathsep.join([str(ROOT), *sys.path])
    env = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", TWELVE_STEPS], check=True, cwd=tmp_path, env=env, capture_output=True)
    told = [(f.kind, f.why) for f in read(tmp_path / "twelve.json").findings]
    (why,) = re.findall(r"""`--steps 12`.*"(It was compiled.*?)"\)""", TEXT.replace("\n", " "))
    assert ("recompile", why) in told and len(told) == 7, told


@pytest.mark.parametrize(("at", "name"), [(0, "slow"), (1, "repaired")])
def test_what_is_printed_is_what_they_print(folder: Path, at: int, name: str) -> None:
    said = shortened(str(read(folder / f"{name}.json"))).splitlines()
    assert [line for line in PRINTED[at].splitlines() if line not in said] == []


def test_the_listing_is_the_step_at_the_lines_that_it_names() -> None:
    head, *listing = PYTHON[0].splitlines()
    first, last = map(int, re.findall(r"\d+", head))
    source = [linecache.getline(str(example.__file__), n).rstrip("\n") for n in range(first, last + 1)]
    assert [line.removeprefix("    ") for line in source] == listing


def test_the_table_of_repairs_has_a_row_for_each_finding_and_quotes_the_repaired_step() -> None:
    source = Path(str(example.__file__)).read_text(encoding="utf-8").partition("class Trainer")[2]
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.*) \|$", TEXT, re.MULTILINE)
    assert sorted((line, kind) for line, kind, _ in rows) == sorted(
        (where.rpartition(":")[2], kind) for where, _, kind, _ in findings_told()
    )
    quoted = [code for *_, repair in rows for code in re.findall(r"`([^`]+)`", repair) if "(" in code or " = " in code]
    assert len(quoted) >= 6
    assert [code for code in quoted if code not in source] == []


def test_the_comparison_says_what_is_told(folder: Path) -> None:
    difference = read(folder / "slow.json").diff(read(folder / "repaired.json"))
    said = {" ".join(line.split()) for line in str(difference).splitlines()}
    told = [" ".join(line.split()) for line in PRINTED[2].splitlines() if line.strip()]
    events = [line for line in told if line.startswith(("graph breaks", "recompiles"))]
    assert len(events) == 2 and {"Costs", "before after ratio", "6 findings gone:", *events} <= said
    costs = {cost.name for cost in difference.costs}
    assert all(any(line.startswith(f"{name} ") for name in costs) for line in told[2:-1])  # the numbers are a torch's
    assert (folder / "diff.html").exists()


def test_the_other_way_round_fails(folder: Path) -> None:
    assert cli.main(["diff", str(folder / "repaired.json"), str(folder / "slow.json")]) == 1


def test_the_gate_of_the_page_stops_the_slow_step_and_lets_the_repaired_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (gate,) = (command for command in COMMANDS if "--fail-on" in command)
    for name, status in (("slow", 1), ("repaired", 0)):
        seen = read(folder / f"{name}.json")
        monkeypatch.setattr(cli, "explain", lambda *_, seen=seen, **__: seen)
        words = shlex.split(gate.replace("train:make_step", f"examples.explain_a_slow_step:{name}"))
        with torch._dynamo.config.patch(trace_autograd_ops=False):
            assert cli.main(words) == status
    assert "failed on graph_break, host_sync, recompile:" in capsys.readouterr().err


def test_what_cannot_be_done_is_two(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (["explain", "no_such_module:f"], ["explain", "examples.explain_a_slow_step:none"], ["diff", "no", "file"])
    assert [cli.main(words) for words in asked] == [2, 2, 2]
    assert cli.main(["explain", "examples.explain_a_slow_step:slow", "--device", "abacus"]) == 2
    capsys.readouterr()


def kinds_told() -> dict[str, str]:
    """The table of kinds: kind and severity."""
    table = TEXT.partition("| kind | meaning |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \| [^|]*\|$", table, re.MULTILINE))


def test_every_kind_has_a_row() -> None:
    sources = [*(ROOT / "fusion_compile" / "explain").rglob("*.py"), ROOT / "passes" / "find_host_syncs.py"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    made = set(re.findall(r'\b(?:Finding|Words)\(\s*"(\w+)"', code))
    made |= {
        importlib.import_module(f"{broken.__name__}.{m.name}").EXPECTED["kind"]
        for m in pkgutil.iter_modules(broken.__path__)
    }
    assert set(kinds_told()) >= made
    assert all(f'"{kind}"' in code for kind in kinds_told())


def test_the_severities_are_those_of_the_findings(folder: Path) -> None:
    told = kinds_told()
    found: tuple[Finding, ...] = read(folder / "slow.json").findings
    assert all(told[f.kind].startswith(f.severity) for f in found)


def test_the_story_of_a_weight_is_what_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(PYTHON[2], {"fc": fc})
    said = capsys.readouterr().out.splitlines()
    assert PRINTED[3].splitlines() and [line for line in PRINTED[3].splitlines() if line not in said] == []


def test_the_table_of_the_json_is_its_form(folder: Path) -> None:
    section = TEXT.partition("| object | fields |")[2]
    rows = {
        name: set(re.findall(r"`(\w+)`", cells))
        for name, cells in re.findall(r"^\| (\S+) \| (.*) \|$", section, re.MULTILINE)
    }
    data = json.loads((folder / "slow.json").read_text(encoding="utf-8"))
    assert rows.pop("top") == set(data)

    def named(*types: Any) -> set[str]:
        return {field.name for each in types for field in fields(each)}

    assert {name.strip("`"): told for name, told in rows.items()} == {
        "environment": named(_facts.Environment),
        "summary": named(_facts.SummaryLine),
        "findings": named(Finding) | {"id"},
        "sections": named(_facts.Section),
        "graphs": named(_facts.GraphFacts),
        "graphs.regions": named(_facts.RegionFacts),
        "graphs.nodes": named(_facts.NodeFacts),
        "graphs.memory": named(_facts.Memory, _facts.Alive),
        "peaks": named(_facts.CompiledPeak),
        "passes": named(_facts.PassFacts),
        "runtime": named(_facts.RuntimeFacts, _facts.CudaGraphs),
        "hoisting.values": named(_facts.HoistedValue),
    }


def test_the_devices_are_those_of_the_table() -> None:
    (told,) = re.findall(r"`--device` takes (.*)\.", TEXT)
    assert re.findall(r"`(\w+)`", told) == list(ROOFLINES)


def test_links_and_pictures_are_there_and_small() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT)
    pictures = [PAGE.parent / link for link in links if link.endswith(".png")]
    assert all((PAGE.parent / link).exists() for link in links)
    assert 3 <= len(pictures) <= 5 and all(picture.stat().st_size <= 250_000 for picture in pictures)
    assert sorted(pictures) == sorted((PAGE.parent / "images").glob("explain-*.png"))
