# SPDX-License-Identifier: Apache-2.0
"""Rules of the tree itself.

Each check is a function of text, so that a second test can show it failing.
"""

import ast
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPDX = "# SPDX-License-Identifier: Apache-2.0"
MAX_LINES = 500


def repo_files() -> list[Path]:
    """What git tracks or would add; without git, what lies in the folders that are not hidden."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        if done.returncode == 0:
            names = {name for name in done.stdout.decode().split("\0") if name}
            return sorted(ROOT / name for name in names if (ROOT / name).is_file())
    skipped = {"__pycache__", "build", "dist", "demo-report"}
    return sorted(
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and not any(
            part in skipped or (part.startswith(".") and part != ".ci")
            for part in path.relative_to(ROOT).parts[:-1]
        )
    )


FILES = repo_files()
PYTHON_FILES = [path for path in FILES if path.suffix == ".py"]
PACKAGE_FILES = [path for path in PYTHON_FILES if path.is_relative_to(ROOT / "kvlib")]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_tree_is_found():
    """The lists that the other tests walk are not empty."""
    assert {"tests/test_repo.py", "pyproject.toml"} <= {name(path) for path in FILES}
    assert ROOT / "kvlib" / "__init__.py" in PACKAGE_FILES


# Code that runs what it reads

BANNED_MODULES = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
BANNED_NAMES = {
    "eval",
    "exec",
    "builtins.eval",
    "builtins.exec",
    "torch.hub.load",
    "torch.load",
    "torch.save",
    "torch.serialization.load",
    "torch.serialization.save",
    "yaml.full_load",
    "yaml.load",
    "yaml.unsafe_load",
}


def dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """`a.b.c` of a name or attribute, import aliases resolved; empty for anything else."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, aliases)
        return base and f"{base}.{node.attr}"
    return ""


def banned_uses(source: str) -> list[str]:
    """Names in `source` that can run code out of data, as "line: name"."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                if item.asname:
                    aliases[item.asname] = item.name
                if item.name.partition(".")[0] in BANNED_MODULES:
                    found.append((node.lineno, item.name))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for item in node.names:
                aliases[item.asname or item.name] = f"{node.module}.{item.name}"
            if str(node.module).partition(".")[0] in BANNED_MODULES:
                found.append((node.lineno, str(node.module)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            if dotted(node, aliases) in BANNED_NAMES:
                found.append((node.lineno, dotted(node, aliases)))
        elif isinstance(node, ast.Call):
            called = dotted(node.func, aliases)
            if called in {"__import__", "importlib.import_module"} and node.args:
                target = node.args[0]
                if isinstance(target, ast.Constant) and target.value in BANNED_MODULES:
                    found.append((node.lineno, f"{called}({target.value!r})"))
            for keyword in node.keywords:
                allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_pickle" and not allowed:
                    found.append((node.lineno, f"{called}(allow_pickle=...)"))
    return [f"{line}: {what}" for line, what in sorted(found)]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name)
def test_no_file_runs_code_out_of_data(path):
    """Nothing unpickles, unmarshals, evaluates or executes."""
    assert banned_uses(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from dill import loads", "dill"),
        ("import torch as t\nt.load('x')", "torch.load"),
        ("from torch import load as read\nread('x')", "torch.load"),
        ("import yaml\nyaml.load('x')", "yaml.load"),
        ("eval('1')", "eval"),
        ("run = exec", "exec"),
        ("import builtins\nbuiltins.eval('1')", "builtins.eval"),
        ("import importlib\nimportlib.import_module('marshal')", "import_module('marshal')"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
    ],
)
def test_code_that_runs_data_is_named(source, found):
    """Each forbidden form is found, aliases included."""
    assert any(found in use for use in banned_uses(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "self.load('x')",
        "import json\njson.load(f)",
        "import yaml\nyaml.safe_load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
    ],
)
def test_harmless_code_is_not_named(source):
    """Methods that only share a name with a forbidden function pass."""
    assert banned_uses(source) == []


# Addresses and paths of one machine

HOSTS = (
    ("files", "pythonhosted", "org"),
    ("test", "pypi", "org"),
    ("pypi", "org"),
    ("pypi", "python", "org"),
    ("download", "pytorch", "org"),
    ("registry", "npmjs", "org"),
    ("registry", "yarnpkg", "com"),
    ("conda", "anaconda", "org"),
    ("deb", "debian", "org"),
    ("archive", "ubuntu", "com"),
    ("proxy", "golang", "org"),
    ("static", "crates", "io"),
)
FOLDERS = ("work", "root", "home", "Users")
LOCAL = re.compile(
    "(?<![a-z0-9.-])(?:"
    + "|".join(r"\.".join(host) for host in HOSTS)
    + r")(?![a-z0-9-])|(?<![\w.~$}/>-])/(?:"
    + "|".join(FOLDERS)
    + r")/[\w.]",
    re.ASCII,
)


def local_names(text: str) -> list[str]:
    """Registry hosts and absolute paths that `text` names."""
    return [match[0] for match in LOCAL.finditer(text)]


def test_no_file_names_a_registry_host_or_a_machine_path():
    """The tree builds anywhere: no file holds a registry's host or a path of one machine."""
    texts = {name(path): path.read_bytes().decode("latin-1") for path in FILES}
    assert {where: found for where, text in texts.items() if (found := local_names(text))} == {}


@pytest.mark.parametrize("host", HOSTS, ids=".".join)
def test_registry_hosts_are_seen(host):
    """Each host is found inside an address."""
    address = ".".join(host)
    assert address in local_names(f"see https://{address}/simple")


@pytest.mark.parametrize("folder", FOLDERS)
def test_machine_paths_are_seen(folder):
    """Absolute paths are found; the same word inside a longer or relative path is not."""
    path = "/".join(("", folder, "x"))
    assert local_names(f'open("{path}/y")') == [path]
    assert local_names(f"at file://{path}") == []
    assert local_names(f"data{path} and ~{path} and $HOME{path}") == []


# Licence and length


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name)
def test_python_files_name_the_licence(path):
    """Every Python file has its SPDX line among the first two."""
    assert SPDX in path.read_text(encoding="utf-8").splitlines()[:2]


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name)
def test_modules_stay_short(path):
    """No module has more than 500 lines."""
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES


# Direction of imports

FLOORS = (
    {
        "artefacts",
        "blocks",
        "budget",
        "errors",
        "keys",
        "layer_kv",
        "plans",
        "registry",
        "snapshots",
        "spec",
        "threads",
    },
    {"attention", "codecs", "eviction", "kernels", "store"},
    {
        "cache",
        "cache_columns",
        "cache_decisions",
        "cache_hidden",
        "cache_layers",
        "cache_probe",
        "cache_ragged",
        "cache_rows",
        "cache_signals",
        "cache_copies",
        "episodes",
        "model_hooks",
        "model_spec",
        "prefix",
        "selection",
        "tiered",
        "tiered_attention",
        "tiered_attention_numba",
        "tiered_guess",
        "tiered_layers",
        "tiered_prompts",
    },
    {
        "calibration",
        "cli",
        "codec_bench",
        "codec_cli",
        "connectors",
        "demo",
        "engine_bench",
        "evals",
        "kvlib",
        "machine",
        "pages",
        "policy_docs",
        "smollm2",
        "store_bench",
        "store_cli",
        "store_cli_text",
        "testing",
    },
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
DECISIONS = {
    "attention",
    "cache",
    "cache_columns",
    "cache_hidden",
    "cache_layers",
    "cache_ragged",
    "cache_rows",
    "cache_signals",
    "cache_copies",
    "eviction",
}
BYTES = {"codecs", "connectors", "store"}


def room_of(module: str) -> str:
    """The part of the package that a dotted module name lies in; the package itself is `kvlib`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "kvlib"


def imported_rooms(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Rooms that `module` imports from anywhere in its code, `TYPE_CHECKING` blocks included."""
    here = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*here[: len(here) - node.level + 1], *base.split(".")]).strip(".")
            names = [base]
            if base == "kvlib":
                names = [
                    f"kvlib.{item.name}" if item.name in FLOOR else "kvlib" for item in node.names
                ]
        else:
            continue
        for imported in names:
            if imported.partition(".")[0] == "kvlib":
                yield room_of(imported)


def forbidden(importer: str, imported: str) -> str:
    """Why room `importer` may not import room `imported`; empty where it may."""
    if importer == imported:
        return ""
    unknown = {importer, imported} - FLOOR.keys()
    if unknown:
        return f"{', '.join(sorted(unknown))}: on no floor; add it to FLOORS"
    if FLOOR[importer] < FLOOR[imported]:
        return f"{importer} stands below {imported}"
    for wing, other in ((DECISIONS, BYTES), (BYTES, DECISIONS)):
        if importer in wing and imported in other:
            return f"{importer} and {imported} are in different wings"
    if imported == "connectors" and importer != "cli":
        return "nothing imports a connector"
    return ""


def package_imports() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in PACKAGE_FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        source = path.read_text(encoding="utf-8")
        rooms = graph.setdefault(room_of(module), set())
        rooms.update(imported_rooms(source, module, is_package=is_package))
    return {room: rooms - {room} for room, rooms in graph.items()}


def cycle(graph: dict[str, set[str]]) -> set[str]:
    """Rooms that import each other in a ring, and those above them; empty without a ring."""
    left = dict(graph)
    while free := [room for room, rooms in left.items() if not rooms & left.keys()]:
        for room in free:
            del left[room]
    return set(left)


def test_imports_run_one_way():
    """Ground floor <- eviction, codecs, store <- cache, prefix <- connectors, evals, demo, cli."""
    graph = package_imports()
    assert sorted(graph.keys() - FLOOR.keys()) == [], "on no floor: add them to FLOORS"
    pairs = [(room, other) for room, others in graph.items() for other in sorted(others)]
    assert [f"{a} imports {b}: {why}" for a, b in pairs if (why := forbidden(a, b))] == []
    assert cycle(graph) == set()


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("from kvlib.store import KVStore", "kvlib.blocks", "stands below"),
        ("def f():\n    import kvlib.prefix", "kvlib.codecs.x", "stands below"),
        ("if TYPE_CHECKING:\n    from kvlib import KVStore", "kvlib.keys", "stands below"),
        ("from ..cache import KVCache", "kvlib.eviction.h2o", "stands below"),
        ("from kvlib import codecs", "kvlib.eviction.h2o", "different wings"),
        ("from kvlib.attention import attend", "kvlib.connectors.x", "different wings"),
        ("from kvlib.connectors import x", "kvlib.evals.x", "nothing imports"),
        ("import kvlib.helpers", "kvlib.cli", "on no floor"),
    ],
)
def test_wrong_imports_are_named(source, module, found):
    """Each rule catches its violation, wherever in the file the import stands."""
    reasons = [forbidden(room_of(module), room) for room in imported_rooms(source, module)]
    assert any(found in reason for reason in reasons)


def test_rings_are_found():
    """Two rooms of one floor may not import each other."""
    assert cycle({"store": {"codecs"}, "codecs": {"store"}, "keys": set()}) == {"store", "codecs"}


# Documents

BLOCK = re.compile(r"^ *```(\w+)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def blocks(text: str, language: str) -> list[str]:
    return [match[2] for match in BLOCK.finditer(text) if match[1] == language]


def unknown_targets(text: str, makefile: str) -> list[str]:
    """Targets that the bash blocks of `text` hand to make and that `makefile` lacks."""
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))
    asked = []
    for line in "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words[:1] == ["make"]:
            asked += [word for word in words[1:] if re.fullmatch(r"[a-z][\w-]*", word)]
    return sorted(set(asked) - targets)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_existing_make_targets(document):
    """Every `make` command a reader may copy exists."""
    text = (ROOT / document).read_text(encoding="utf-8")
    assert unknown_targets(text, (ROOT / "Makefile").read_text(encoding="utf-8")) == []


def test_missing_make_targets_are_named():
    """A command whose target is gone is found, behind variables and prompts too."""
    text = '```bash\nmake demo  # and more\n$ CI=true make gone X="-k y"\n```\nmake other\n'
    assert unknown_targets(text, "demo: x\n\techo\nX := 1\n") == ["gone"]


def test_python_in_readme_compiles():
    """README shows Python, and all of it is valid."""
    examples = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    assert examples
    for source in examples:
        ast.parse(source)


FRAGMENT = re.compile(r"\d+\.(feature|bugfix|format|removal|doc|misc)\.md")


def test_change_fragments_are_named_by_issue_and_type():
    """Every file in changes/ can be sorted into the changelog."""
    names = [path.name for path in FILES if path.parent == ROOT / "changes"]
    assert "README.md" in names
    assert [x for x in names if x != "README.md" and not FRAGMENT.fullmatch(x)] == []
