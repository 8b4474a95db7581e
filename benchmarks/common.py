# SPDX-License-Identifier: Apache-2.0
"""What the benchmark scripts share: paired timing, the environment, and the JSON they end with."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Versions and machine, for the JSON."""
    versions = {}
    for name in ("kvlib", "torch", "numpy", "zstandard", "xxhash", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average_1m": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def interleave(
    cases: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each case, run in turn so that a drifting machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(warmup + repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            elapsed = time.perf_counter() - start
            if i >= warmup:
                times[name].append(elapsed)
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(a: list[float], b: list[float]) -> dict[str, float]:
    """Summary of a / b, pair by pair."""
    return summary([x / y for x, y in zip(a, b, strict=True)])


def parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The arguments every script takes."""
    out = argparse.ArgumentParser(description=description)
    out.add_argument("--repeats", type=int, default=repeats)
    out.add_argument("--json", type=Path, default=None, help="also write the result here")
    return out


def finish(name: str, result: dict[str, Any], path: Path | None) -> None:
    """Print the result as the last line, and write it where asked."""
    result = {"benchmark": name, "environment": environment(), **result}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")
