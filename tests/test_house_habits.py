"""The habits: what runs before a change is accepted is said once, and the hooks and the hosted CI follow it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
TARGETS = ("lint", "docs", "wheel", "test", "trainers", "battery", "exhaustive")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    match = re.search(rf"^{target}: \$\(INSTALLED\).*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)
    assert match, f"the Makefile has no target {target}"
    return [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in match[1].splitlines()]


def hooks() -> list[dict[str, Any]]:
    config = yaml.safe_load(read(".pre-commit-config.yaml"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"], "a hook from elsewhere needs a network"
    found: list[dict[str, Any]] = config["repos"][0]["hooks"]
    return found


def test_ci_runs_every_target() -> None:
    assert re.findall(r"^make (\w+)$", read(".ci/run"), re.MULTILINE) == list(TARGETS)
    assert all(recipe(target) for target in TARGETS)
    assert "FUSION_COMPILE_REQUIRE_BROWSER=1" in read(".ci/run")


def test_the_hosted_ci_calls_ours_and_keeps_what_it_builds() -> None:
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    ours, triton, codegen = (step["run"] for step in steps if "run" in step)
    assert (ours, codegen) == (".ci/run", "make cuda-codegen")
    # Where the pinned Triton cannot be had, there is nothing to write a program with: said, and not a failure.
    assert triton.startswith("make triton && echo here=yes") and "::warning::" in triton
    kept = {step["with"]["path"] for step in steps if step.get("uses", "").startswith("actions/upload-artifact@")}
    assert kept == {"dist/", "site/"}


def test_the_hooks_run_what_lint_runs() -> None:
    tools = {" ".join(command.split()[:2]) for command in recipe("lint")}
    ours = {" ".join(hook["entry"].split()[:2]) for hook in hooks()}
    assert ours == tools
    assert all(hook["language"] == "system" for hook in hooks())


def test_the_changelog_has_the_version_first() -> None:
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    headings = re.findall(r"^## (\S+)", read("docs/changelog.md"), re.MULTILINE)
    assert headings[0] == re.sub(r"\.dev\d+$", "", version)
    assert len(headings) == len(set(headings))


def test_no_address_is_invented() -> None:
    """The project has no published one yet: none stands in the metadata or the site's configuration."""
    assert "urls" not in tomllib.loads(read("pyproject.toml"))["project"]
    assert re.findall(r"^(?:site_url|repo_url):", read("mkdocs.yml"), re.MULTILINE) == []
