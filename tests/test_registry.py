# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.errors import ConfigError, UnknownPluginError
from kvlib.registry import (
    Method,
    MethodCall,
    Registry,
    describe,
    parse_grid,
    parse_method,
    suggest,
)


@dataclass(frozen=True)
class Toy:
    """Every type of parameter that a method string can hold."""

    name: ClassVar[str] = "toy"

    budget: float | int = 0.25
    level: float = 1.0
    steps: int = 3
    mode: str = "fast"
    strict: bool = False
    window: int | None = None
    label: str | None = None

    def __post_init__(self):
        if self.steps < 0:
            raise ConfigError("steps cannot be negative")


@dataclass(frozen=True)
class Needy:
    """One parameter without a default."""

    name: ClassVar[str] = "needy"

    path: str
    size: int = 1


@dataclass(frozen=True)
class Bare:
    """No parameters."""

    name: ClassVar[str] = "bare"


class NotADataclass:
    name = "odd"


HERE = Toy.__module__


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setitem(sys.modules, "toy_plugins", sys.modules[__name__])
    table = {"toy": "toy_plugins:Toy", "bare": "toy_plugins:Bare", "needy": "toy_plugins:Needy"}
    table["odd"] = "toy_plugins:NotADataclass"
    table["gone"] = "module_that_is_not_there:Class"
    return Registry("toys", table)


def call(name, **params):
    return MethodCall(name, tuple(params.items()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("h2o", Method((call("h2o"),))),
        (" h2o ", Method((call("h2o"),))),
        ("snapkv:budget=0.25", Method((call("snapkv", budget="0.25"),))),
        (
            "snapkv:budget=0.25,window=32+think:ratio=0.4 | int4:group=32",
            Method(
                (call("snapkv", budget="0.25", window="32"), call("think", ratio="0.4")),
                call("int4", group="32"),
            ),
        ),
        ("a+b+c|d", Method((call("a"), call("b"), call("c")), call("d"))),
        ("| exact", Method((), call("exact"))),
        ("|exact", Method((), call("exact"))),
        (" a : x = 1 , y = b ", Method((call("a", x="1", y="b"),))),
        ("a:x=1e-3,y=-2,z=a/b.c_d", Method((call("a", x="1e-3", y="-2", z="a/b.c_d"),))),
    ],
)
def test_grammar(text, expected):
    """Names, parameters, '+' between policies and '|' before a codec are read as documented."""
    assert parse_method(text) == expected
    assert parse_method(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ":", "a:", "a:x", "a:=1", "a:x=", "a:x=1,", "a:,x=1", "a:x=1,x=2", "a:x=1=2",
        "a:x=1:2", "a b", "a:x=1 2", "a:x y=1", "+", "a+", "+a", "a++b", "a|", "|", "a||b", "a|b|c",
        "a|b+c", "a;b", ";", "a=1", "a,b", "a:x=1;y=2", "a:x=\n1\n2",
    ],
    ids=repr,
)  # fmt: skip
def test_grammar_errors(text):
    """Anything else is a ConfigError that quotes the text."""
    with pytest.raises(ConfigError) as info:
        parse_method(text)
    assert repr(text) in str(info.value) or text.strip() in str(info.value)


words = st.text("abcz019_.-/", min_size=1, max_size=6)
calls = st.builds(
    lambda name, params: MethodCall(name, tuple(params.items())),
    words,
    st.dictionaries(words, words, max_size=3),
)


@given(st.lists(calls, max_size=3), st.none() | calls)
def test_text_of_a_method_reads_back(policies, codec):
    """Every method has a normal form that parses to it."""
    if policies or codec:
        method = Method(tuple(policies), codec)
        text = str(method)
        assert parse_method(text) == method


def test_grids():
    """';' separates methods; empty ones are skipped and errors name their own method."""
    assert parse_grid(" a ; b+c | d ;; ") == (parse_method("a"), parse_method("b+c|d"))
    assert parse_grid("") == ()
    with pytest.raises(ConfigError, match="b:"):
        parse_grid("a;b:")


def test_suggestions(registry):
    """Typos in names and keys are errors that name what is near, and all that is known."""
    with pytest.raises(UnknownPluginError, match=r"no toy is named 'tpy'. Did you mean 'toy'"):
        registry.get("tpy")
    with pytest.raises(UnknownPluginError, match="Known: bare, gone, needy, odd, toy"):
        registry.build("zzzzzz")
    with pytest.raises(ConfigError, match=r"no parameter 'bugdet'. Did you mean 'budget'"):
        registry.build("toy:bugdet=1")
    with pytest.raises(ConfigError, match="Known: none"):
        registry.build("bare:x=1")
    with pytest.raises(ConfigError, match="no parameter 'name'"):
        registry.build("toy:name=x")
    assert "Did you mean" not in suggest("zzzzzz", ["snapkv"])
    assert isinstance(UnknownPluginError("x"), LookupError)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("budget=0.25", "budget", 0.25),
        ("budget=512", "budget", 512),
        ("budget=512.0", "budget", 512.0),
        ("budget=1e2", "budget", 100.0),
        ("level=2", "level", 2.0),
        ("level=-0.5", "level", -0.5),
        ("level=1e20", "level", 1e20),
        ("steps=7", "steps", 7),
        ("mode=slow", "mode", "slow"),
        ("mode=3", "mode", "3"),
        ("mode=none", "mode", "none"),
        ("mode=true", "mode", "true"),
        ("strict=true", "strict", True),
        ("strict=False", "strict", False),
        ("window=none", "window", None),
        ("window=4", "window", 4),
        ("label=none", "label", None),
        ("label=x", "label", "x"),
    ],
)
def test_coercion(registry, text, field, value):
    """Text becomes the field's type; a point or exponent makes a float."""
    built = getattr(registry.build(f"toy:{text}"), field)
    assert built == value
    assert type(built) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "steps=1.0", "steps=x", "steps=true", "steps=none", "steps=1e3", "steps=-1", "level=x",
        "level=nan", "level=inf", "level=1e999", "level=true", "strict=1", "strict=yes",
        "window=1.5", "budget=x", "budget=true", "steps=0x10",
    ],
)  # fmt: skip
def test_coercion_errors(registry, text):
    """A value of another type, or one that the plug-in refuses, is a ConfigError naming the key."""
    with pytest.raises(ConfigError, match=text.partition("=")[0]):
        registry.build(f"toy:{text}")


@given(
    st.builds(
        Toy,
        budget=st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False),
        level=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**40), 2**40),
        steps=st.integers(0, 2**70),
        mode=words,
        strict=st.booleans(),
        window=st.none() | st.integers(),
        label=st.none() | words,
    )
)
def test_describe_reads_back(toy):
    """Every plug-in has one text, from which an equal plug-in is built."""
    registry = Registry("toys", {"toy": f"{__name__}:Toy"})
    registry._loaded["toy"] = Toy
    text = describe(toy)
    assert registry.build(text) == toy
    assert describe(registry.build(text)) == text


def test_describe_joins_the_parts_of_a_composition():
    """What has parts is described by them, whatever its own fields are."""

    @dataclass(frozen=True)
    class Pair:
        parts: tuple
        name: str = "pair"

    assert describe(Pair((Bare(), Toy()))) == f"bare+{describe(Toy())}"


def test_describe_gives_every_parameter():
    """Defaults are written too, in the order of the fields; without fields it is the name."""
    assert describe(Toy()) == (
        "toy:budget=0.25,level=1.0,steps=3,mode=fast,strict=false,window=none,label=none"
    )
    assert describe(Bare()) == "bare"


def test_equal_plugins_have_equal_text():
    """1 and 1.0 of a float, and both zeros, are one text: it is part of storage identities."""
    assert Toy(level=1) == Toy(level=1.0)
    assert describe(Toy(level=1)) == describe(Toy(level=1.0))
    assert describe(Toy(level=-0.0)) == describe(Toy(level=0.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": ""}, {"mode": "a b"}, {"mode": "a,b"}, {"mode": "a=b"}, {"mode": "a|b"},
        {"mode": "a+b"}, {"mode": "a;b"}, {"mode": "a:b"}, {"mode": "a\n"},
        {"level": float("nan")}, {"level": float("inf")}, {"budget": (1, 2)},
    ],
    ids=repr,
)  # fmt: skip
def test_values_that_no_text_can_hold(changes):
    """A plug-in that could not be named in a header is refused when it is described."""
    with pytest.raises(ConfigError, match="cannot hold"):
        describe(Toy(**changes))


def test_required_parameters(registry):
    """A parameter without a default must be given."""
    assert registry.build("needy:path=x") == Needy("x")
    with pytest.raises(ConfigError, match="needs a value for path"):
        registry.build("needy:size=2")


def test_other_classes(registry):
    """A plug-in that is no dataclass can be had but not built; a call object builds like text."""
    assert registry.get("odd") is sys.modules["toy_plugins"].NotADataclass
    with pytest.raises(ConfigError, match="not a dataclass"):
        registry.build("odd")
    assert registry.build(call("toy", steps="4")).steps == 4
    for text in ("toy|exact", "toy+bare", "toy;bare", ""):
        with pytest.raises(ConfigError):
            registry.build(text)


def test_names_import_nothing(registry):
    """Names can be listed although a plug-in's module is missing; only `get` imports."""
    assert registry.names() == ["bare", "gone", "needy", "odd", "toy"]
    with pytest.raises(ModuleNotFoundError):
        registry.get("gone")
    code = (
        "import sys\n"
        "from kvlib.codecs import CODECS\n"
        "assert 'exact' in CODECS.names()\n"
        "assert not {'torch', 'kvlib.codecs.exact', 'kvlib.codecs.integer'} & set(sys.modules)\n"
        "CODECS.get('int4')\n"
        "assert 'kvlib.codecs.integer' in sys.modules\n"
        "assert 'kvlib.codecs.exact' not in sys.modules"
    )
    env = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def install(folder: Path, dist: str, points: dict[str, str], family: str = "toys") -> None:
    """A package's metadata, as pip leaves it."""
    info = folder / f"{dist}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = {value}" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[kvlib.{family}]\n{lines}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path, with one plug-in module."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "outside_toys.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "@dataclass(frozen=True)\n"
        "class Ball:\n"
        "    name: ClassVar[str] = 'ball'\n"
        "    size: int = 1\n"
    )
    yield tmp_path
    sys.modules.pop("outside_toys", None)


def test_entry_points(site):
    """A plug-in of an installed package is listed, loaded on demand and built like our own."""
    install(site, "ball", {"ball": "outside_toys:Ball", "broken": "outside_toys:Nothing"})
    install(site, "foreign", {"puck": "outside_toys:Ball"}, family="pucks")
    registry = Registry("toys", {"toy": "nowhere:Toy"})
    assert registry.names() == ["ball", "broken", "toy"]
    assert "outside_toys" not in sys.modules
    ball = registry.build("ball:size=3")
    assert (type(ball).__name__, ball.size) == ("Ball", 3)
    assert describe(ball) == "ball:size=3"
    assert registry.get("ball") is type(ball)
    with pytest.raises(UnknownPluginError, match="Did you mean 'ball'"):
        registry.get("bal")


def test_entry_points_may_not_take_our_names(site):
    """A package that registers a built-in's name is an error that names both."""
    install(site, "thief", {"toy": "outside_toys:Ball"})
    registry = Registry("toys", {"toy": "nowhere:Toy"})
    with pytest.raises(ConfigError, match=r"outside_toys:Ball registers toy 'toy'.*nowhere:Toy"):
        registry.names()


def test_entry_points_may_not_share_names(site):
    """Two packages that register one name are an error that names it, not a matter of luck."""
    install(site, "ball_a", {"ball": "outside_toys:Ball"}, family="policies")
    install(site, "ball_b", {"ball": "other_toys:Ball"}, family="policies")
    registry = Registry("policies", {})
    with pytest.raises(ConfigError, match=r"registers policy 'ball', which is taken by"):
        registry.get("ball")
