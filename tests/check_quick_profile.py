# SPDX-License-Identifier: Apache-2.0
"""Whether a run of `kvlib eval --profile quick` tells good methods from bad ones.

python tests/check_quick_profile.py eval-report/results.json
"""

import json
import sys
from pathlib import Path

GOOD = ("full", "full | exact", "full | int4:group=32", "snapkv:budget=0.5")
BAD = ("streaming:budget=0.25", "h2o:budget=0.25")


def main(path: Path) -> None:
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    wrong = []
    for task in ("table", "records"):
        found = {}
        for row in rows:
            if row["task"].startswith(f"{task}:"):
                policy, bar, codec = row["method"].partition(" | ")
                found[policy.partition(",")[0] + bar + codec] = row
        for method, row in found.items():
            assert row["score"]["low"] is not None, f"{task}, {method}: no interval"
        if found["full"]["score"]["mean"] < 0.8:
            wrong.append(f"{task}: the full cache scores {found['full']['score']['mean']:.2f}")
        for good in GOOD:
            for bad in BAD:
                low, high = found[good]["score"]["low"], found[bad]["score"]["high"]
                if low <= high:
                    wrong.append(f"{task}: {good} from {low:.2f}, {bad} to {high:.2f}")
        if found["full | exact"]["scores"]["kl"] != 0:
            wrong.append(f"{task}: full | exact is not exact")
        for method, share in (("snapkv:budget=0.25", 0.26), ("full | int4:group=32", 0.17)):
            if found[method]["held_share"] > share:
                wrong.append(f"{task}: {method} holds {found[method]['held_share']:.3f}")
    if wrong:
        sys.exit("\n".join(wrong))
    print("quick profile: good and bad methods are apart on table and records")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
