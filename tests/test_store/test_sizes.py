# SPDX-License-Identifier: Apache-2.0
import pytest

from kvlib.errors import ConfigError
from kvlib.store.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [(0, 0), (7, 7), ("123", 123), ("4KiB", 4096), ("4 KB", 4000), ("1.5GiB", 3 << 29), ("2T", 0)],
)
def test_sizes_as_people_write_them(text, size):
    """Binary and decimal units, with and without a point; a bare letter is refused."""
    if text == "2T":
        with pytest.raises(ConfigError):
            parse_bytes(text, "disk")
    else:
        assert parse_bytes(text, "disk") == size


@pytest.mark.parametrize("text", [-1, True, 1.5, None, "", "GiB", "-4KiB", "4 gigabytes", "4XiB"])
def test_anything_else_is_an_error_that_names_it(text):
    """The message has the argument, what was seen, and an example."""
    with pytest.raises(ConfigError, match=r"disk=.*512MiB"):
        parse_bytes(text, "disk")
