# SPDX-License-Identifier: Apache-2.0
"""Page layouts against loops that place one number at a time."""

import pytest
import torch

from kvlib.connectors.layouts import LAYOUTS, Pages, VecPages, verify_layout
from kvlib.errors import ConnectorError, ShapeError


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


@pytest.fixture(params=[*sorted(LAYOUTS), "cpu-vec without numba"])
def name(request, monkeypatch):
    name, _, plain = request.param.partition(" ")
    if plain:
        monkeypatch.setattr(LAYOUTS[name], "_compiled", False)
    return name


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_or_not_is_the_same(dtype):
    """Also into memory and out of records with strides of their own."""
    compiled, plain = VecPages(), VecPages(compiled=False)
    assert compiled._kernels() is not None, "numba is to be tested here"
    frame = torch.zeros(7, 3, 4, 16, 64, dtype=dtype)
    views = [frame[:, i, 1:4] for i in range(2)]
    numbers = torch.randn(3, 96, 2, 32).to(dtype).transpose(1, 2)
    keys, values = numbers[:, 0, 16:80], numbers[:, 1, 16:80]
    keys, values = (x.clone(memory_format=torch.contiguous_format) for x in (keys, values))
    part = torch.zeros(3, 96, 32, dtype=dtype)[:, 8:72]
    for pages in ([2, 3, 4, 5], [6, 0, 3, 1]):
        ids = torch.tensor(pages)
        for source in ((keys, values), (part.copy_(keys), values.clone())):
            for layout, view in zip((compiled, plain), views, strict=True):
                layout.write(view, ids, *source)
            assert torch.equal(views[0], views[1])
        for layout in (compiled, plain):
            got = layout.read(views[0], ids)
            assert torch.equal(got[0], keys)
            assert torch.equal(got[1], values)
    assert not frame[:, 2].any()
    assert not frame[:, :, 0].any()


@pytest.mark.parametrize("pages", [[0, 5], [-1, 0]])
def test_a_page_that_is_not_there_is_not_written(pages):
    """The kernels check nothing while they copy."""
    memory = torch.zeros(5, 2, 16, 64)
    keys = torch.ones(2, 32, 32)
    with pytest.raises(ShapeError):
        VecPages().write(memory, torch.tensor(pages), keys, keys.clone())
    assert not memory.any()
    with pytest.raises((IndexError, RuntimeError)):
        VecPages(compiled=False).write(memory, torch.tensor(pages), keys, keys.clone())


def test_all_layers_and_records_at_once(name):
    """Runs of pages of several lengths, as one call; a layer's numbers in each of them."""
    views, layers = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        memory, keys, values = make(name)
        views.append(memory)
        layers.append((keys, values))
    cuts = {(0, 1): [4], (1, 3): [2, 0]}
    parts = [
        (torch.tensor(ids), [tuple(x[:, 32 * a : 32 * b] for x in pair) for pair in layers])
        for (a, b), ids in cuts.items()
    ]
    Pages(views, LAYOUTS[name]).write_parts(parts)
    for view, (keys, values) in zip(views, layers, strict=True):
        got = LAYOUTS[name].read(view, torch.tensor([4, 2, 0]))
        assert torch.equal(got[0], keys)
        assert torch.equal(got[1], values)
        assert not view[[1, 3]].any()
