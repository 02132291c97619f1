"""Programs that people run, through each door: models, trainers, wrappers, shapes, containers.

    PYTHONPATH=.:examples python -m tests.real_programs [--only NAME ...] [--kind KIND ...] [--door DOOR ...]
        [--missing] [--render]

Runs every row against the ordinary program, keeps what it finds in docs/benchmarks/real_programs.json, and writes the
tables of docs/real-programs.md from it. All rows took half an hour on two busy cores. Ends with status 1 if anything
differs or crashes. Lightning's and ignite's rows are left as they are where these are not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.real_programs import PROGRAMS
from tests.real_programs.doors import run_door
from tests.real_programs.page import put_into, section
from tests.real_programs.program import DOORS, KINDS

ROOT = Path(__file__).parents[2]
JSON, PAGE = ROOT / "docs/benchmarks/real_programs.json", ROOT / "docs/real-programs.md"


def main() -> int:
    """Run what is asked for, write both files, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME")
    parser.add_argument("--kind", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--door", nargs="+", default=[*DOORS], choices=[*DOORS])
    parser.add_argument("--missing", action="store_true", help="only what the JSON file does not have")
    parser.add_argument("--render", action="store_true", help="write the page alone")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(JSON.read_text()) if JSON.exists() else {"found": {}, "minutes": 0}
    faults, begun = [], time.perf_counter()
    for kind in () if asked.render else asked.kind:
        kept = results["found"].setdefault(kind, {})
        for name, program in PROGRAMS[kind].items():
            if asked.only and name not in asked.only:
                continue
            if program.needs and importlib.util.find_spec(program.needs) is None:
                print(f"{kind} {name}: needs {program.needs}, see make trainers", flush=True)
                continue
            row = kept.setdefault(name, {})
            for door in asked.door:
                if asked.missing and door in row:
                    continue
                at = time.perf_counter()
                outcome = run_door(program, door)
                row[door] = None if outcome is None else outcome._asdict()
                if outcome is not None:
                    took = f"{time.perf_counter() - at:.1f} s"
                    said = f"{kind} {name}, {door}: {outcome.verdict} {outcome.difference} {outcome.said}"
                    print(f"{said[:300]} ({took})", flush=True)
                    if outcome.verdict in ("differs", "crashes"):
                        faults.append(said)
            _write(results)
    if not (asked.render or asked.only or asked.missing) and len(asked.door) == len(DOORS):
        results["minutes"] = round((time.perf_counter() - begun) / 60)
    _write(results)
    PAGE.write_text(put_into(PAGE.read_text(), section(results, {kind: [*rows] for kind, rows in PROGRAMS.items()})))
    print("\n".join(faults))
    return 1 if faults else 0


def _write(results: dict[str, Any]) -> None:
    sys.path[:0] = [str(ROOT / "benchmarks")]
    from _measure import machine, write_json  # type: ignore[import-not-found]

    results["machine"] = machine(torch.device("cpu"))
    for kind, rows in results["found"].items():
        for name in [name for name in rows if name not in PROGRAMS[kind]]:
            del rows[name]
    write_json(JSON, results)
    del sys.path[0]


if __name__ == "__main__":
    sys.exit(main())
