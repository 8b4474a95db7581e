# SPDX-License-Identifier: Apache-2.0
import pytest
from typer.testing import CliRunner

from kvlib.cli import app, main
from kvlib.codecs import CODECS
from kvlib.evals.tasks import TASKS
from kvlib.eviction import ALLOCATORS, POLICIES
from kvlib.store import TIERS


def test_list_prints_every_plugin():
    """`kvlib list` shows what the registries hold."""
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    families = (POLICIES, ALLOCATORS, CODECS, TIERS, TASKS)
    for name in [name for family in families for name in family.names()]:
        assert name in result.output


def test_an_error_of_ours_is_one_line_and_status_1(monkeypatch, capsys, tmp_path):
    """A wrong codec ends the command with the message, not with a traceback."""
    monkeypatch.setattr("sys.argv", ["kvlib", "demo", "--codecs", "in8", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "UnknownPluginError" in error
    assert "Traceback" not in error


def test_help_names_the_commands():
    """`kvlib --help` lists what there is."""
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "list" in result.output
