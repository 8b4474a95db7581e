# SPDX-License-Identifier: Apache-2.0
"""A process that scores units: JSON lines in (options, then units) and out (records, then done).

It ends when nothing more comes in, and at once when its parent is gone.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, TextIO

__all__ = ["main"]


def _lines() -> Iterator[dict[str, Any]]:
    """Messages, read beside the work: the end of input means that the parent is gone."""
    queue: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            queue.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(queue.get())


def main() -> None:
    """Serve until the parent closes the pipe."""
    # Standard output carries the messages: what else prints, imports too, goes to standard error.
    out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message, separators=(",", ":")) + "\n")
        out.flush()

    from kvlib.errors import KVLibError

    messages = _lines()
    try:
        import torch

        from kvlib.evals.models import load_eval_model
        from kvlib.evals.runner import RunOptions, Unit, UnitScorer

        options = RunOptions(**next(messages))
        if options.device == "cpu":
            torch.set_num_threads(1)
        loaded = load_eval_model(options.model, options.dtype, options.device)
        scorer = UnitScorer(loaded, options)
        say({"model": loaded.describe()})
        for message in messages:
            unit = Unit(**{**message, "methods": tuple(message["methods"])})
            for record in scorer.score(unit):
                say({"record": record})
            say({"done": True})
    except KVLibError as exc:
        say({"error": str(exc)})


if __name__ == "__main__":
    main()
