# SPDX-License-Identifier: Apache-2.0
"""Page layouts against loops that place one number at a time."""

import pytest
import torch

from kvlib.connectors.layouts import LAYOUTS, Pages, verify_layout
from kvlib.errors import ConnectorError


def place(name, page, heads, size, dim, keys, values):
    """Where each number of a page lies, from the reference's words: a flat list a head."""
    content = dim if name == "latent" else 2 * dim
    out = torch.zeros(heads, size * content, dtype=keys.dtype)
    for h in range(heads):
        for t in range(size):
            for d in range(dim):
                if name == "latent":
                    out[h, t * dim + d] = keys[h, t, d]
                    continue
                if name == "rows":
                    k, v = t * 2 * dim + d, t * 2 * dim + dim + d
                elif name == "cpu-vec":
                    k, v = d * size + t, size * dim + t * dim + d
                else:
                    k = ((t // 16 * (dim // 2) + d // 2) * 16 + t % 16) * 2 + d % 2
                    v = ((d // 16 * (size // 2) + t // 2) * 16 + d % 16) * 2 + t % 2 + size * dim
                out[h, k], out[h, v] = keys[h, t, d], values[h, t, d]
    return out.view(heads, size, content)


@pytest.fixture(params=sorted(LAYOUTS))
def name(request):
    return request.param


def make(name, pages=5, heads=2, size=32, dim=32, dtype=torch.float32):
    heads = 1 if name == "latent" else heads
    width = 0 if name == "latent" else dim
    memory = torch.zeros(pages, heads, size, dim + width, dtype=dtype)
    keys = torch.randn(heads, 3 * size, dim).to(dtype)
    return memory, keys, torch.randn(heads, 3 * size, width).to(dtype)


@pytest.mark.parametrize("pages", [[0, 1, 2], [3, 0, 4], [4, 3, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_lies_where_it_should(name, pages, dtype):
    memory, keys, values = make(name, dtype=dtype)
    layout = LAYOUTS[name]
    layout.write(memory, torch.tensor(pages), keys, values)
    for i, page in enumerate(pages):
        cut = slice(32 * i, 32 * (i + 1))
        expected = place(name, page, memory.shape[0:2][1], 32, 32, keys[:, cut], values[:, cut])
        assert torch.equal(memory[page], expected)
    untouched = sorted(set(range(5)) - set(pages))
    assert not memory[untouched].any()
    got = layout.read(memory, torch.tensor(pages))
    assert torch.equal(got[0], keys)
    assert torch.equal(got[1], values)


def test_what_is_read_is_a_copy(name):
    memory, keys, values = make(name)
    layout = LAYOUTS[name]
    layout.write(memory, torch.arange(3), keys, values)
    got, _ = layout.read(memory, torch.arange(3))
    memory.zero_()
    assert torch.equal(got, keys)


@pytest.mark.parametrize("order", ["LBNHC", "BLHNC"])
def test_views_with_other_strides(order):
    """A token-major memory, and one where the layers of a block lie together."""
    if order == "LBNHC":
        view = torch.zeros(5, 32, 2, 64).permute(0, 2, 1, 3)
    else:
        view = torch.zeros(5, 3, 2, 32, 64)[:, 1]
    _, keys, values = make("rows")
    layout = LAYOUTS["rows"]
    layout.write(view, torch.tensor([4, 0, 2]), keys, values)
    got = layout.read(view, torch.tensor([4, 0, 2]))
    assert torch.equal(got[0], keys)
    assert torch.equal(got[1], values)
    verify_layout(layout, view, None)


def writer_of(name):
    """An engine that lays out its pages by that name, one page at a time."""

    def write(keys, values, memory, slots):
        size = memory.shape[2]
        for page in range(len(slots) // size):
            cut = slice(page * size, (page + 1) * size)
            target = int(slots[page * size]) // size
            LAYOUTS[name].write(
                memory,
                torch.tensor([target]),
                keys[cut].transpose(0, 1),
                values[cut].transpose(0, 1),
            )

    return write


def test_the_engines_own_layout_passes(name):
    memory, _, _ = make(name)
    verify_layout(LAYOUTS[name], memory, writer_of(name))
    assert not memory.any()  # the test has memory of its own


@pytest.mark.parametrize("other", ["rows", "cpu-vec", "cpu-amx"])
@pytest.mark.parametrize("mine", ["rows", "cpu-vec", "cpu-amx"])
def test_another_layout_is_refused(mine, other):
    memory, _, _ = make(mine)
    if mine == other:
        verify_layout(LAYOUTS[mine], memory, writer_of(other))
        return
    with pytest.raises(ConnectorError, match=mine):
        verify_layout(LAYOUTS[mine], memory, writer_of(other))


def test_an_engine_that_swapped_keys_and_values_is_refused():
    """As happened between two releases, and was served."""
    memory, _, _ = make("rows")

    def swapped(keys, values, memory, slots):
        writer_of("rows")(values, keys, memory, slots)

    with pytest.raises(ConnectorError, match="rows"):
        verify_layout(LAYOUTS["rows"], memory, swapped)


def test_layers_with_pages_of_different_sizes_are_refused():
    with pytest.raises(ConnectorError, match="16, 32"):
        Pages([torch.zeros(2, 1, 16, 8), torch.zeros(2, 1, 32, 8)], LAYOUTS["rows"])
