# SPDX-License-Identifier: Apache-2.0
"""How long `import kvlib` takes beside `import torch`, each in a fresh interpreter, in turn."""

import subprocess
import sys
import time

from common import finish, parser, ratios, summary

CASES = {
    "python": "pass",
    "torch": "import torch",
    "kvlib": "import kvlib",
    "kvlib_names": "import kvlib; kvlib.KVStore, kvlib.KVBlock",
}


def main() -> None:
    arguments = parser(__doc__, repeats=9).parse_args()
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for i in range(arguments.repeats + 1):
        for name, code in CASES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            if i:
                times[name].append(time.perf_counter() - start)
    finish(
        "import",
        {
            "seconds": {name: summary(t) for name, t in times.items()},
            "kvlib_over_torch": ratios(times["kvlib"], times["torch"]),
            "kvlib_names_over_torch": ratios(times["kvlib_names"], times["torch"]),
            "raw_seconds": times,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
