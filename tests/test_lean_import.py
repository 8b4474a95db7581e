# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import kvlib

ENGINES = {"faiss", "sglang", "triton", "vllm"}

CHILD = """
import json, os, sys
bound = []
sys.addaudithook(lambda event, args: bound.append(repr(args)) if event == "socket.bind" else None)
if sys.argv[1] == "names":
    from kvlib import *
import kvlib
fds = "/proc/self/fd"
sockets = []
for fd in os.listdir(fds) if os.path.isdir(fds) else ():
    try:
        target = os.readlink(f"{fds}/{fd}")
    except OSError:
        continue
    if target.startswith("socket:"):
        sockets.append(target)
torch = sys.modules.get("torch")
print(json.dumps({
    "file": kvlib.__file__,
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "cuda": torch is not None and torch.cuda.is_initialized(),
    "sockets": bound + sockets,
}))
"""


@cache
def after(what: str) -> dict:
    """What a fresh interpreter holds after importing the package (or all its public names)."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, what],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_loads_no_heavy_package():
    """`import kvlib` loads neither an engine nor a dependency that only one part needs."""
    assert not set(after("package")["modules"]) & {*ENGINES, "lmdb", "transformers"}


def test_public_names_load_no_engine():
    """Nor do the public names load an engine or an accelerator's compiler."""
    assert not set(after("names")["modules"]) & ENGINES


@pytest.mark.parametrize("what", ["package", "names"])
def test_import_touches_no_device_and_opens_no_socket(what):
    """Importing initialises no CUDA context and leaves no socket open."""
    state = after(what)
    assert not state["cuda"]
    assert state["sockets"] == []


def test_child_processes_import_the_same_package():
    """A child finds the kvlib that the tests run on, not one that shadows it."""
    assert Path(after("package")["file"]).resolve() == Path(kvlib.__file__).resolve()
