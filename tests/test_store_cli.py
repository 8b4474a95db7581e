# SPDX-License-Identifier: Apache-2.0
"""`kvlib store` as a user calls it, on small stores of both tiers."""

import io
import json
import tarfile
from hashlib import sha256

import pytest
from typer.testing import CliRunner

from kvlib.cli import app, main
from kvlib.codecs import CODECS
from kvlib.codecs.container import parse_header
from kvlib.errors import KVLibError
from kvlib.store.archive import import_records
from kvlib.store.files import FileStore
from kvlib.store.kept import make_kept
from kvlib.store.segments import SegmentStore
from kvlib.store.store import KVStore
from kvlib.store.upkeep import is_older_version
from kvlib.testing.models import random_block, tiny_spec
from kvlib.testing.records import make_record

TIERS = {"file": FileStore, "segment": SegmentStore}
MAC = b"a secret of 24 bytes ..."


def invoke(*arguments, code=0, answer=None):
    result = CliRunner().invoke(app, ["store", *map(str, arguments)], input=answer)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout


def as_json(*arguments, code=0):
    return json.loads(invoke(*arguments, "--json", code=code))


@pytest.fixture
def fails(monkeypatch, capsys):
    """Runs a command that must end in one line and status 1; returns the line."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["kvlib", "store", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


def records(n=6, mac_key=None):
    """Records of different sizes, by the digits that name them."""
    made = (make_record(seed, size=3000 * seed, mac_key=mac_key) for seed in range(n))
    return {key.to_bytes().hex(): (key, b"".join(parts)) for key, parts in made}


def fill(path, tier, mac_key=None, n=6):
    with TIERS[tier](path, capacity="1MiB", mac_key=mac_key) as store:
        for key, data in records(n, mac_key).values():
            assert store.put(key, [data])
    return path


def content(path, tier, mac_key=None):
    """Digits and bytes of every record, the one used longest ago first."""
    found = {}
    with TIERS[tier](path, capacity="1MiB", mac_key=mac_key) as store:
        for key in store.keys():
            data = bytearray(store.size(key))
            assert store.get_into(key, data) == len(data)
            found[key.to_bytes().hex()] = bytes(data)
    return found


def wanted(n=6, mac_key=None):
    return {name: data for name, (_, data) in records(n, mac_key).items()}


def flip(path, tier, name, at=-1):
    """Flip a bit of a record in its file, or in the segment that holds it."""
    data = wanted()[name]
    if tier == "file":
        file = path / name[:2] / f"{name}.kvlc"
        first = 0
    else:
        (file,) = path.glob("seg-*.kv")
        first = file.read_bytes().index(data)
    whole = bytearray(file.read_bytes())
    whole[first + at % len(data)] ^= 1
    file.write_bytes(whole)


@pytest.fixture(params=["file", "segment"])
def tier(request):
    return request.param


@pytest.fixture
def path(tmp_path, tier):
    return fill(tmp_path / "kv", tier)


@pytest.fixture
def mac_file(tmp_path):
    file = tmp_path / "key"
    file.write_bytes(MAC)
    return file


# Looking


def test_stat_counts_what_is_there(path, tier):
    """Numbers of a store whose content is known, as JSON and as a table."""
    about = as_json("stat", path)
    data = wanted().values()
    assert (about["tier"], about["records"], about["tokens"]) == (tier, 6, 6 * 64)
    assert about["bytes"] == sum(map(len, data))
    assert about["codecs"] == {"test@1": 6}
    assert about["fidelities"] == {"exact": 6}
    specs = {parse_header(x).spec_fingerprint.hex() for x in data}
    assert about["models"] == dict.fromkeys(specs, 1)
    assert about["unreadable"] == {}
    assert about["bytes"] <= about["used_bytes"] <= about["disk_bytes"] <= 1 << 20
    assert about["free_bytes"] > 0
    assert (about["oldest_use"] is None) == (tier == "segment")
    text = invoke("stat", path)
    assert tier in text
    assert "test@1: 6" in text


def put_prompt(path, codec, start=0, tier=None):
    """A record of four blocks, as `KVStore` makes it."""
    spec = tiny_spec()
    with KVStore(path, memory=0, disk="4MiB", codec=codec, tier=tier) as store:
        keys = store.block_keys(spec, list(range(start, start + 256)))
        assert store.put(spec, keys, random_block(spec, 256)).stored_blocks == 4
    return spec


def test_stat_of_a_real_store(tmp_path):
    """Blocks that a `KVStore` put with a lossy codec: tokens, codec and model."""
    spec = put_prompt(tmp_path / "kv", "int8")
    about = as_json("stat", tmp_path / "kv")
    assert about["tokens"] == 256
    assert about["codecs"] == {"int8@1:group=64": 1}
    assert about["fidelities"] == {"exact": 1}
    assert about["models"] == {spec.fingerprint().hex(): 1}


def test_ls_names_records_in_order_of_use(path):
    """A line each, the oldest first; --limit and --codec leave some out."""
    lines = invoke("ls", path).splitlines()
    assert [line[:16] for line in lines] == [name[:16] for name in wanted()]
    assert "tokens 0..64" in lines[0]
    assert "2 layers" in lines[0]
    assert f"{len(list(wanted().values())[3]):,} bytes" in lines[3]
    assert invoke("ls", path, "--limit", 2).splitlines() == lines[:2]
    for codec, some in (("test", 6), ("test@1", 6), ("test@2", 0), ("tes", 0), ("exact", 0)):
        assert len(invoke("ls", path, "--codec", codec).splitlines()) == some
    rows = [json.loads(line) for line in invoke("ls", path, "--json").splitlines()]
    assert [row["block"] + row["storage"] for row in rows] == list(wanted())
    assert [row["nbytes"] for row in rows] == [len(data) for data in wanted().values()]
    assert {(row["start"], row["stop"], row["layers"], row["problem"]) for row in rows} == {
        (0, 64, 2, "")
    }


def test_looking_leaves_no_trace(path, tier, tmp_path, mac_file):
    """Order of use and every record stay, whoever looks with whatever key."""
    for command in (["stat"], ["ls", "--limit", 1], ["verify"], ["gc", "--disk", 0, "--dry-run"]):
        name, *options = command
        invoke(name, path, *options)
        invoke(name, path, *options, *_key_option(mac_file), code=int(name == "verify"))
    invoke("export", path, tmp_path / "a.tar")
    invoke("export", path, tmp_path / "b.tar", *_key_option(mac_file), code=1)
    assert list(content(path, tier).items()) == list(wanted().items())


def _key_option(file):
    return ["--mac-key-file", file]


def test_a_wrong_key_drops_nothing(tmp_path, tier, mac_file, fails):
    """Under another MAC key all looks damaged: it is said, also by --repair, and kept."""
    path = fill(tmp_path / "kv", tier, MAC)
    other = tmp_path / "other"
    other.write_bytes(MAC[::-1])
    for option in ([], _key_option(other)):
        about = as_json("stat", path, *option)
        assert (about["records"], sum(about["unreadable"].values())) == (6, 6)
        assert len(invoke("ls", path, *option).splitlines()) == 6
        found = as_json("verify", path, "--repair", *option, code=1)
        assert len(found["problems"]) >= 6
        assert found["repaired"] == 0
        assert as_json("export", path, tmp_path / "x.tar", *option, code=1)["records"] == 0
        (tmp_path / "x.tar").unlink()
    assert "is it theirs?" in invoke("verify", path, "--repair", *_key_option(other), code=1)
    assert content(path, tier, MAC) == wanted(mac_key=MAC)
    assert as_json("verify", path, *_key_option(mac_file))["problems"] == []
    for text, message in (("short", "16 to 64 bytes"), ("x" * 100, "16 to 64 bytes")):
        other.write_text(text)
        assert message in fails("stat", path, *_key_option(other))
    assert "cannot read" in fails("stat", path, *_key_option(tmp_path / "absent"))


# Wrong folders


@pytest.mark.parametrize(
    "command",
    [["stat"], ["ls"], ["verify"], ["gc", "--disk", "0"], ["clear", "--yes"], ["export"]],
    ids=lambda command: command[0],
)
def test_a_folder_that_is_no_store_is_left_alone(tmp_path, fails, command):
    """It is neither made nor changed."""
    name, *rest = command
    rest += [tmp_path / "out.tar"] if name == "export" else []
    absent, empty, foreign = (tmp_path / x for x in ("absent", "empty", "foreign"))
    empty.mkdir()
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear ...")
    assert "does not exist" in fails(name, absent, *rest)
    assert not absent.exists()
    assert "is no store" in fails(name, empty, *rest)
    assert not list(empty.iterdir())
    for _ in range(2):
        message = fails(name, foreign, *rest)
        assert "is no store" in message or "this kvlib reads" in message
        assert (foreign / "letter.txt").read_text() == "dear ..."
        (foreign / "FORMAT").write_text("a file of somebody else's")
    (foreign / "FORMAT").unlink()
    (foreign / "SUPER").write_text("a file of somebody else's")
    assert "is not a segment store's" in fails(name, foreign, *rest)
    assert sorted(p.name for p in foreign.iterdir()) == ["SUPER", "letter.txt"]
    assert "is no store" in fails(name, foreign / "letter.txt", *rest)
    assert not (tmp_path / "out.tar").exists()


# Verifying


def test_verify_finds_each_damaged_record(path, tier):
    """Status 1 and its name, and nothing is dropped; --repair drops those only."""
    assert "6 records" in invoke("verify", path)
    bad = [list(wanted())[i] for i in (1, 4)]
    for name in bad:
        flip(path, tier, name)
    for _ in range(2):
        found = as_json("verify", path, code=1)
        assert sorted(line[:16] for line in found["problems"]) == sorted(x[:16] for x in bad)
        assert (found["records"], found["repaired"]) == (6, 0)
    assert "2 problems" in invoke("verify", path, code=1)
    assert as_json("verify", path, "--repair", code=1)["repaired"] == 2
    left = {name: data for name, data in wanted().items() if name not in bad}
    assert as_json("verify", path)["problems"] == []
    assert content(path, tier) == left


def test_a_damaged_header_is_shown_as_such(path, tier):
    """`ls` and `stat` go on."""
    name = list(wanted())[2]
    flip(path, tier, name, at=50)
    (line,) = [x for x in invoke("ls", path).splitlines() if x.startswith(name[:16])]
    assert "does not match its checksum" in line
    assert sum(as_json("stat", path)["unreadable"].values()) == 1
    assert as_json("stat", path)["records"] == 6


# Dropping


def test_gc_brings_a_store_down_to_a_size(path, tier):
    """The ones used longest ago go, no more than needed; a dry run says the same."""
    names = list(wanted())
    dry = as_json("gc", path, "--disk", "60000", "--dry-run")
    done = as_json("gc", path, "--disk", "60000")
    assert dry["dropped"] == done["dropped"]
    gone = len(done["dropped"])
    assert 0 < gone < 6
    assert done["dropped"] == names[:gone]
    assert done["used_bytes"] <= 60000 < dry["used_bytes"]
    assert list(content(path, tier)) == names[gone:]
    with TIERS[tier](path, capacity="1MiB") as store:
        size = store.stats().used_bytes
    assert as_json("gc", path, "--disk", size)["dropped"] == []
    last = as_json("gc", path, "--disk", size - 1)
    assert last["dropped"] == names[gone : gone + 1]
    assert "0 of" in invoke("gc", path, "--disk", "1GiB")


def test_gc_of_a_codec_and_of_older_versions(tmp_path, tier, fails, monkeypatch):
    """Only what the options name goes, and no more of it than --disk asks for."""
    path = tmp_path / "kv"
    for start, codec in enumerate(("int8", "exact", "exact")):
        put_prompt(path, codec, 1000 * start, tier)
    assert as_json("gc", path, "--older-versions")["dropped"] == []
    assert as_json("gc", path, "--codec", "int4")["dropped"] == []
    assert len(as_json("gc", path, "--codec", "int8@1")["dropped"]) == 1
    used = as_json("stat", path)["used_bytes"]
    assert as_json("stat", path)["records"] == 2
    monkeypatch.setattr(CODECS.get("exact"), "version", 99)
    assert len(as_json("gc", path, "--older-versions", "--disk", used - 1)["dropped"]) == 1
    assert len(as_json("gc", path, "--older-versions")["dropped"]) == 1
    assert as_json("gc", path)["dropped"] == []  # nothing has expired
    assert "is not a size" in fails("gc", path, "--disk", "much")


def test_older_versions_are_those_before_the_current_one():
    """By the number in the canonical string; what is not known is not older."""
    now = CODECS.get("exact").version
    assert is_older_version(f"exact@{now - 1}")
    assert is_older_version(f"exact@{now - 1}:x=1")
    for text in (f"exact@{now}", f"exact@{now + 1}", "exact", "exact@x", "test@0", ""):
        assert not is_older_version(text)


def test_clear_asks_first(path, tier):
    """No means no; after yes the store is empty, usable, and takes no room."""
    invoke("clear", path, code=1, answer="n\n")
    assert len(content(path, tier)) == 6
    assert "6 records went" in invoke("clear", path, answer="y\n")
    assert content(path, tier) == {}
    fill(path, tier)
    done = as_json("clear", path, "--yes")
    assert done["dropped"] == 6
    assert done["disk_bytes"] == 0
    assert as_json("stat", path)["records"] == 0
    assert content(fill(path, tier), tier) == wanted()


def test_a_store_that_is_in_use_can_be_looked_after(path, tier):
    """Whoever has it open goes on: what went is a miss, what stayed and what is new is served."""
    with TIERS[tier](path, capacity="1MiB") as store:
        assert as_json("stat", path)["records"] == 6
        assert as_json("verify", path)["problems"] == []
        gone = as_json("gc", path, "--disk", 60000)["dropped"]
        for name, (key, data) in records().items():
            got = store.get_into(key, memoryview(bytearray(len(data))))
            assert got == (None if name in gone else len(data))
        assert as_json("clear", path, "--yes")["dropped"] == 6 - len(gone)
        for key, data in records().values():
            assert store.get_into(key, bytearray(len(data))) is None
            assert store.put(key, [data])
    assert content(path, tier) == wanted()


# There and back


@pytest.mark.parametrize("target", ["file", "segment"])
def test_export_and_import_between_tiers(path, tier, target, tmp_path):
    """The same bytes in the same order of use, in a tar file that tar reads."""
    tar, there = tmp_path / "kv.tar", tmp_path / "there"
    assert as_json("export", path, tar)["records"] == 6
    with tarfile.open(tar) as opened:
        found = {info.name: opened.extractfile(info).read() for info in opened}
    assert found == {f"{name}.kvlc": data for name, data in wanted().items()}
    assert not list(tmp_path.glob("*.part"))
    done = as_json("import", there, tar, "--tier", target)
    assert (done["stored"], done["duplicate"], done["refused"], done["evicted"]) == (6, 0, 0, 0)
    assert list(content(there, target).items()) == list(wanted().items())
    again = as_json("import", there, tar)
    assert (again["stored"], again["duplicate"]) == (0, 6)
    assert as_json("verify", there)["problems"] == []


def test_import_evicts_only_if_told_how_much_there_may_be(tmp_path, tier):
    """By default all fits beside what is there; with --disk the oldest go."""
    fill(tmp_path / "all", "file", n=12)
    tar = tmp_path / "kv.tar"
    invoke("export", tmp_path / "all", tar)
    path = fill(tmp_path / "kv", tier)
    done = as_json("import", path, tar)
    assert (done["stored"], done["duplicate"], done["evicted"]) == (6, 6, 0)
    assert content(path, tier) == wanted(12)
    small = fill(tmp_path / "small", tier)
    done = as_json("import", small, tar, "--disk", "128KiB")
    assert done["evicted"] > 0
    assert as_json("stat", small)["used_bytes"] <= 128 << 10
    assert list(wanted(12))[-1] in content(small, tier)
    done = as_json("import", small, tar, "--disk", "8KiB", code=1)
    assert any("there is no room" in line for line in done["reasons"])


def test_a_damaged_record_is_left_out(path, tier, tmp_path):
    """Of the export, with its name and status 1; the others are there."""
    bad = list(wanted())[3]
    flip(path, tier, bad)
    done = as_json("export", path, tmp_path / "kv.tar", code=1)
    assert done["records"] == 5
    assert done["problems"][0].startswith(bad[:16])
    assert as_json("import", tmp_path / "new", tmp_path / "kv.tar", "--tier", tier)["stored"] == 5


def test_macs_travel(tmp_path, tier, mac_file):
    """Records under a key come back under it, and are refused without."""
    path = fill(tmp_path / "kv", tier, MAC)
    tar = tmp_path / "kv.tar"
    invoke("export", path, tar, *_key_option(mac_file))
    invoke("import", tmp_path / "new", tar, "--tier", tier, *_key_option(mac_file))
    assert content(tmp_path / "new", tier, MAC) == wanted(mac_key=MAC)
    refused = as_json("import", tmp_path / "none", tar, "--tier", tier, code=1)
    assert (refused["stored"], refused["refused"]) == (0, 6)


def test_places_that_will_not_do(path, tier, tmp_path, fails):
    """An archive is never written over, nor into the store; other tiers' folders are refused."""
    tar = tmp_path / "kv.tar"
    tar.write_text("precious")
    assert "is there already" in fails("export", path, tar)
    assert tar.read_text() == "precious"
    assert "in the store itself" in fails("export", path, path / "kv.tar")
    assert "cannot write" in fails("export", path, tmp_path / "absent" / "kv.tar")
    part = tmp_path / "new.tar.part"
    part.write_text("of another export")
    assert "cannot write" in fails("export", path, tmp_path / "new.tar")
    assert part.read_text() == "of another export"
    good = tmp_path / "good.tar"
    invoke("export", path, good)
    other = "file" if tier == "segment" else "segment"
    assert f"of the {tier} tier" in fails("import", path, good, "--tier", other)
    assert "expected segment or file" in fails("import", path, good, "--tier", "memory")
    assert "cannot read" in fails("import", path, tmp_path / "nothing.tar")
    assert "does not exist" in fails("import", tmp_path / "none", good)
    assert not (tmp_path / "none").exists()


# Hostile archives


def entry(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    padding = bytes(-len(data) % 512)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + padding


END = bytes(1024)
NAME, DATA = next(iter(wanted().items()))
OTHER = list(wanted().values())[1]
LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (entry("../../etc/passwd", b"x"), "128 hexadecimal digits"),
        (entry(f"/{NAME}.kvlc", DATA), "128 hexadecimal digits"),
        (entry(f"a/{NAME}.kvlc", DATA), "128 hexadecimal digits"),
        (entry(f"{NAME.upper()}.kvlc", DATA), "128 hexadecimal digits"),
        (entry(f"{NAME}.kvlc\n", DATA), "128 hexadecimal digits"),
        (entry("\x1b[31m", DATA), "128 hexadecimal digits"),
        (entry(f"{NAME}.kvlc", OTHER), "the record holds"),
        (entry(f"{NAME}.kvlc", DATA[:-8]), "in an entry of"),
        (entry(f"{NAME}.kvlc", DATA + bytes(8)), "in an entry of"),
        (entry(f"{NAME}.kvlc", DATA[:-1] + bytes([DATA[-1] ^ 1])), "checksum"),
        (entry(f"{NAME}.kvlc"), "not a KVLC container"),
        (entry(f"{NAME}.kvlc", b"x" * 600), "not a KVLC container"),
        (entry(f"{NAME}.kvlc", **LINK), "no regular file"),
        (entry(f"{NAME}.kvlc", type=tarfile.LNKTYPE, linkname="x"), "no regular file"),
        (entry(f"{NAME}.kvlc", type=tarfile.DIRTYPE), "no regular file"),
        (entry(f"{NAME}.kvlc", type=tarfile.CHRTYPE), "no regular file"),
        (entry(f"{NAME}.kvlc", DATA, type=tarfile.GNUTYPE_SPARSE), "no regular file"),
        (entry("x", b"30 path=../../../etc/passwd\n", type=tarfile.XHDTYPE), "no regular file"),
        (entry("././@LongLink", b"a" * 5000, type=tarfile.GNUTYPE_LONGNAME), "no regular file"),
    ],
)
def test_hostile_entries_are_refused(tmp_path, tier, bad, why):
    """Each is named with its reason, touches nothing, and the records around it are stored."""
    good = [entry(f"{name}.kvlc", data) for name, data in list(wanted().items())[1:3]]
    tar = tmp_path / "kv.tar"
    tar.write_bytes(good[0] + bad + good[1] + END)
    done = as_json("import", tmp_path / "kv", tar, "--tier", tier, code=1)
    assert (done["stored"], done["refused"]) == (2, 1)
    assert why in done["reasons"][0]
    assert done["reasons"][0].isprintable()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kv", "kv.tar"]
    assert len(content(tmp_path / "kv", tier)) == 2


@pytest.mark.parametrize(
    "whole",
    [
        b"",
        b"x" * 100,
        b"x" * 2000,
        entry(f"{NAME}.kvlc", DATA),
        (entry(f"{NAME}.kvlc", DATA) + END)[:900],
        entry(f"{NAME}.kvlc", DATA)[:-20] + b"x",
        entry(f"{NAME}.kvlc", size=1 << 40) + END,
        entry(f"{NAME}.kvlc", size=-512) + END,
    ],
    ids=["empty", "short", "noise", "no end", "cut", "cut in data", "size", "negative"],
)
def test_what_is_no_whole_archive_is_an_error(tmp_path, whole, fails):
    """Before anything is made or stored, in one line."""
    tar = tmp_path / "kv.tar"
    tar.write_bytes(whole)
    message = fails("import", tmp_path / "kv", tar, "--tier", "file")
    assert message.startswith("CorruptDataError")
    assert not (tmp_path / "kv").exists()


def test_every_flipped_bit_of_an_archive_is_harmless(tmp_path):
    """Whatever is stored of it is right, and the rest is refused or an error of ours."""
    tar = entry(f"{NAME}.kvlc", DATA) + END
    seen = set()
    with make_kept(tmp_path / "kv", "file") as store:
        for bit in range(0, 8 * len(tar), 5):
            flipped = bytearray(tar)
            flipped[bit // 8] ^= 1 << bit % 8
            try:
                done = import_records(store, io.BytesIO(flipped))
            except KVLibError:
                seen.add("error")
                continue
            seen.add("stored" if done.stored else "refused")
            for key in list(store.keys()):
                data = bytearray(store.size(key))
                assert store.get_into(key, data) == len(data)
                assert sha256(data).digest() == sha256(DATA).digest()
                assert key.to_bytes().hex() == NAME
                store.delete(key)
    assert {"error", "refused"} <= seen
