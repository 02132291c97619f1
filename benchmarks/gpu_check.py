"""Settles what only a GPU can: capture, waits, equality, memory and speed. One command, at most ten minutes.

    python benchmarks/gpu_check.py [--only recipe-adamw,train-speed] [--mode reduce-overhead] [--minutes 9]
    python benchmarks/gpu_check.py --dry-run --in-process      # on a CPU, tiny models: every check's code runs

Each group of checks is a process of its own, so that a crash or a hang of one is one row; groups that time nothing run
several at a time, first. The table comes last; the JSON, and the groups' output beside it, go to ``$OUT`` or to the
current folder. Exit code 1 if a row failed. What a "not run: time" row left out, ``--only`` gets in another run;
Inductor's cache on disk is kept between the two.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent / "examples", HERE.parent):
    sys.path.insert(0, str(folder))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(HERE.parent / ".cache" / "inductor"))

import _rows  # noqa: E402
from _rows import FAILED, NOT_RUN, UNVERIFIED, Row, Rows  # noqa: E402

GRACE = 20.0
"""Seconds a group has after its checks' time is up, before it is killed."""
ALONE = ("train-speed", "sampler-speed")
"""Groups that time something: nothing else runs beside them."""
RECIPES = ("sf_normuon", "adamw", "muon", "normuon", "sf_adamw", "full_fusion", "lion")
GROUPS = (
    "recipe-sf_normuon",
    "detectors",
    *(f"recipe-{name}" for name in RECIPES if name != "sf_normuon"),
    "noise",
    "facade",
    "sampler",
    "modes-sampler",
    "float32-newton-schulz",
    "train-speed",
    "sampler-speed",
    *(f"autotune-{name}" for name in RECIPES),
)
"""In the order in which they begin: important first, the default recipe before all, and cheap next."""


def main() -> int:
    arguments = parse()
    if arguments.group is not None:
        run_group(arguments.group, arguments, _rows.append_to(arguments.rows), arguments.seconds)
        return 0
    began = time.monotonic()
    until = began + 60 * arguments.minutes
    chosen = arguments.only.split(",") if arguments.only else list(GROUPS)
    if unknown := sorted(set(chosen) - set(GROUPS)):
        print(f"no group is named {', '.join(unknown)}; there are {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT", "."))
    rows = run_here(chosen, arguments, until) if arguments.in_process else run_apart(chosen, arguments, until, out)
    show(rows, time.monotonic() - began)
    write(out / "gpu_check.json", rows, arguments)
    return int(any(row.verdict == FAILED for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {', '.join(GROUPS)}; several with commas")
    parser.add_argument("--mode", default="reduce-overhead", help="of the capture checks; autotune-* take max-autotune")
    parser.add_argument("--minutes", type=float, default=9.0, help="after these no check begins")
    parser.add_argument("--jobs", type=int, default=3, help="groups at a time that time nothing")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny models")
    parser.add_argument("--in-process", action="store_true", help="all groups in this process")
    for hidden in ("--group", "--rows", "--seconds"):
        kind = {"--rows": Path, "--seconds": float}.get(hidden, str)
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_group(name: str, arguments: argparse.Namespace, sink: Callable[[Row], None], seconds: float) -> None:
    """All checks of one group in this process; what keeps them from even beginning is a row too."""
    until = time.monotonic() + seconds
    try:
        import torch

        if arguments.dry_run:
            device = torch.device("cpu")
            torch.set_num_threads(1)  # tiny tensors: a second thread only waits for the first
        elif torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        else:
            sink(Row(name, "begin", FAILED, "there is no GPU here; --dry-run runs the checks' code on a CPU"))
            return
        import _gpu_facade
        import _gpu_features
        import _gpu_recipes
        import _gpu_sampler
        import _gpu_speed
        from _gpu_setting import Setting

        setting = Setting(device, arguments.dry_run, arguments.mode)
        kind, _, recipe = name.partition("-")
        group: Callable[[Rows, Setting], None] = {
            "detectors": lambda: _gpu_features.detectors,
            "recipe": lambda: _gpu_recipes.recipe_group(recipe),
            "noise": lambda: _gpu_features.noise,
            "facade": lambda: _gpu_facade.facade,
            "float32": lambda: _gpu_recipes.float32_newton_schulz,
            "sampler": lambda: _gpu_speed.sampler_speed if recipe else _gpu_sampler.sampler,
            "modes": lambda: _gpu_sampler.sampler_modes,
            "train": lambda: _gpu_speed.train_speed,
            "autotune": lambda: _gpu_recipes.autotuned(recipe),
        }[kind]()
        group(Rows(name, until, setting.on_gpu, sink, GRACE / 2), setting)
    except Exception as error:
        sink(Row(name, "begin", FAILED, _rows.one_line(f"{type(error).__name__}: {error}")))


def run_here(chosen: list[str], arguments: argparse.Namespace, until: float) -> list[Row]:
    import _cuda_graph_probe

    rows: list[Row] = []
    for name in chosen:
        run_group(name, arguments, rows.append, until - time.monotonic())
        _cuda_graph_probe.forget_everything()
    return rows


def run_apart(chosen: list[str], arguments: argparse.Namespace, until: float, out: Path) -> list[Row]:
    """Every group in a process; the rows in the order of `chosen`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open(out / "gpu_check.log", "wb") as log:

        def run(name: str) -> list[Row]:
            rows = _run_process(name, arguments, until, Path(folder))
            for row in rows:
                print(line(row), flush=True)
            log.write(f"==== {name}\n".encode() + (Path(folder) / f"{name}.log").read_bytes())
            log.flush()
            return rows

        done: dict[str, list[Row]] = {}
        for beside in _waves(chosen):
            with ThreadPoolExecutor(1 if beside[0] in ALONE else arguments.jobs) as pool:
                done |= zip(beside, pool.map(run, beside), strict=True)
    return [row for name in chosen for row in done[name]]


def _waves(chosen: list[str]) -> list[list[str]]:
    """Groups that may run beside each other, in order; one that times something is alone."""
    waves: list[list[str]] = []
    for name in chosen:
        if name in ALONE or not waves or waves[-1][0] in ALONE:
            waves.append([name])
        else:
            waves[-1].append(name)
    return waves


def _run_process(name: str, arguments: argparse.Namespace, until: float, folder: Path) -> list[Row]:
    rows_file, log_file = folder / f"{name}.jsonl", folder / f"{name}.log"
    left = until - time.monotonic()
    if left <= 5:
        log_file.touch()
        return [Row(name, "all", NOT_RUN, "time")]
    command = [
        sys.executable,
        str(HERE / "gpu_check.py"),
        "--group",
        name,
        "--rows",
        str(rows_file),
        "--seconds",
        f"{left:.1f}",
    ]
    command += ["--mode", arguments.mode, *(["--dry-run"] if arguments.dry_run else [])]
    began = time.monotonic()
    # cuBLAS asks for it before it repeats itself under torch.use_deterministic_algorithms, which that group tries.
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if name == "noise" else {}
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **environment}
        )
        try:
            code = process.wait(timeout=left + GRACE)
            ended = f"the group's process ended with code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code, ended = process.wait(), f"the group's process was stopped after {time.monotonic() - began:.0f} s"
    rows = _rows.read_rows(rows_file)
    if code != 0:
        words = log_file.read_text(errors="replace").strip().splitlines()[-3:]
        rows.append(Row(name, "process", FAILED, _rows.one_line(f"{ended}: {' | '.join(words)}")))
    return rows


def line(row: Row) -> str:
    return f"{row.verdict:<20} {row.group:<18} {row.check:<52} {row.seconds:6.1f}  {row.detail}"


def show(rows: list[Row], seconds: float) -> None:
    """One line a row, cut to what fits; the whole text is in the JSON."""
    print(f"\n{'verdict':<20} {'group':<18} {'check':<52} {'s':>6}  what was seen")
    for row in rows:
        print(_rows.one_line_of_table(line(row)))
    counts = Counter(row.verdict for row in rows)
    print(f"\n{', '.join(f'{n} {verdict}' for verdict, n in counts.items())}; {seconds:.0f} s")
    if counts[UNVERIFIED]:
        print("unverified on a GPU: the check's code ran on a CPU, its claim about the GPU was not tested")


def write(path: Path, rows: list[Row], arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from _measure import write_json

    write_json(
        path,
        {"arguments": {k: v for k, v in vars(arguments).items() if v is not None}, "rows": list(map(asdict, rows))},
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    sys.exit(main())
