"""Mask: every builder against the picture of its cells, and the geometry against the dense matrix."""

import builtins
import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.mask import MAX_ROWS, NO_HI, NO_LO, AttnMaskType, Mask, band_slices, slice_areas, window_slices

FULL, CAUSAL, INVCAUSAL, BICAUSAL = AttnMaskType


def picture(*rows: str) -> torch.Tensor:
    return torch.tensor([[cell == "x" for cell in row] for row in rows], dtype=torch.bool)


def assert_shows(mask: Mask, *rows: str) -> None:
    expected = picture(*rows)
    assert torch.equal(mask.dense(), expected), f"got\n{mask.dense().int()}\nexpected\n{expected.int()}"
    assert (mask.total_q, mask.total_k) == tuple(expected.shape)
    assert mask.area() == int(expected.sum())
    assert_disjoint(mask)


def assert_disjoint(mask: Mask) -> None:
    """No cell is covered twice: counted cell by cell, without the library's own check."""
    count = torch.zeros(mask.total_q, mask.total_k, dtype=torch.int32)
    for one in mask.slices:
        count += Mask(one[None], mask.total_q, mask.total_k).dense()
    assert int(count.max() if count.numel() else 0) <= 1


# ---- builders against pictures ---------------------------------------------------------------------------------------


def test_full():
    assert_shows(Mask.full(2, 4), "xxxx", "xxxx")
    assert_shows(Mask.full(2), "xx", "xx")


def test_causal():
    assert_shows(Mask.causal(4), "x...", "xx..", "xxx.", "xxxx")


def test_sliding_window():
    assert_shows(Mask.sliding_window(5, 1, 0), "x....", "xx...", ".xx..", "..xx.", "...xx")
    assert_shows(Mask.sliding_window(5, 0, 2), "xxx..", ".xxx.", "..xxx", "...xx", "....x")
    assert_shows(Mask.sliding_window(4, 1, -1), "xxxx", "xxxx", ".xxx", "..xx")
    assert_shows(Mask.sliding_window(3, -1, 1), "xx.", "xxx", "xxx")
    assert len(Mask.sliding_window(1000, 3, 7).slices) == 1


def test_varlen_causal():
    assert_shows(Mask.varlen([0, 2, 2, 5]), "x....", "xx...", "..x..", "..xx.", "..xxx")
    assert len(Mask.varlen([0, 2, 2, 5]).slices) == 2, "the empty document has no slice"


def test_varlen_full():
    assert_shows(Mask.varlen([0, 2, 5], causal=False), "xx...", "xx...", "..xxx", "..xxx", "..xxx")


def test_varlen_window():
    window = Mask.varlen([0, 3, 7], window=(1, 0))
    assert_shows(window, "x......", "xx.....", ".xx....", "...x...", "...xx..", "....xx.", ".....xx")
    assert len(window.slices) == 2
    assert Mask.varlen([0, 3, 7], window=(1, -1)) == window, "causal bounds the right side"
    assert_shows(
        Mask.varlen([0, 3, 7], causal=False, window=(0, 1)),
        *("xx.....", ".xx....", "..x....", "...xx..", "....xx.", ".....xx", "......x"),
    )


def test_varlen_global_tokens():
    assert_shows(
        Mask.varlen([0, 5, 9], window=(1, 0), global_tokens=2),
        *("x........", "xx.......", "xxx......", "xxxx.....", "xx.xx...."),
        *(".....x...", ".....xx..", ".....xxx.", ".....xxxx"),
    )
    assert_shows(
        Mask.varlen([0, 5], causal=False, window=(0, 1), global_tokens=1), "xx...", "xxx..", "x.xx.", "x..xx", "x...x"
    )
    assert_shows(Mask.varlen([0, 1, 3], window=(0, 0), global_tokens=5), "x..", ".x.", ".xx")
    assert Mask.varlen([0, 4], global_tokens=2) == Mask.varlen([0, 4]), "an unbounded left side sees them anyway"


def test_varlen_with_other_keys_aligns_bottom_right():
    assert_shows(Mask.varlen([0, 2, 5], cu_seqlens_k=[0, 4, 5]), "xxx..", "xxxx.", ".....", ".....", "....x")
    assert_shows(Mask.varlen([0, 2, 3], causal=False, cu_seqlens_k=[0, 1, 4]), "x...", "x...", ".xxx")
    assert_shows(Mask.varlen([0, 3], window=(1, 0), cu_seqlens_k=[0, 5]), ".xx..", "..xx.", "...xx")
    assert_shows(
        Mask.varlen([0, 4, 6], causal=False, window=(0, 1), cu_seqlens_k=[0, 2, 5]),
        *(".....", ".....", "xx...", ".x...", "...xx", "....x"),
    )


def test_block_causal():
    assert_shows(Mask.block_causal(5, 2), "xx...", "xx...", "xxxx.", "xxxx.", "xxxxx")
    assert_shows(
        Mask.block_causal(7, 2, cu_seqlens=[0, 3, 3, 7]),
        *("xx.....", "xx.....", "xxx....", "...xx..", "...xx..", "...xxxx", "...xxxx"),
    )
    assert_shows(Mask.block_causal(2, 10), "xx", "xx")


def test_prefix_lm():
    assert_shows(Mask.prefix_lm(5, 2), "xx...", "xx...", "xxx..", "xxxx.", "xxxxx")
    assert Mask.prefix_lm(5, 0) == Mask.causal(5)
    assert_shows(Mask.prefix_lm(2, 2), "xx", "xx")


def test_shared_question():
    assert_shows(Mask.shared_question(2, [1, 2, 1]), "x.....", "xx....", "xxx...", "xx.x..", "xx.xx.", "xx...x")
    assert Mask.shared_question(3, [2]) == Mask.causal(5), "one answer continues its question"


def test_tree():
    # 0 -> (1 -> (2, 3), 4), and a second root 5
    assert_shows(
        Mask.tree([-1, 0, 1, 1, 0, -1], [1, 2, 1, 1, 1, 2]),
        *("x.......", "xx......", "xxx.....", "xxxx....", "xxx.x...", "x....x..", "......x.", "......xx"),
    )
    assert len(Mask.tree([-1, 0, 1, 1, 0, -1], [1, 2, 1, 1, 1, 2]).slices) == 6
    assert_shows(
        Mask.tree([-1, 0, 0, 1, 2], [1, 1, 1, 1, 1]), "x....", "xx...", "x.x..", "xx.x.", "x.x.x"
    )  # breadth first
    assert Mask.tree([-1, 0, 1, 2], [1, 2, 0, 3]) == Mask.causal(6), "a chain is one node"


@given(st.data())
def test_tree_of_any_shape_and_order(data):
    lengths = data.draw(st.lists(st.integers(0, 3), max_size=9))
    parents = [data.draw(st.integers(-1, i - 1)) for i in range(len(lengths))]
    node = [n for n, length in enumerate(lengths) for _ in range(length)]

    def ancestors(n: int) -> list[int]:
        return [] if n < 0 else [n, *ancestors(parents[n])]

    cells = [
        [node[k] in ancestors(node[q]) and (node[k] != node[q] or k <= q) for k in range(len(node))]
        for q in range(len(node))
    ]
    mask = Mask.tree(parents, lengths)
    assert mask.dense().tolist() == cells
    assert_disjoint(mask)


def test_from_slices_types():
    wide, tall, square = ([[0, 2]], [[0, 5]]), ([[0, 5]], [[0, 2]]), ([[0, 3]], [[0, 3]])
    assert_shows(Mask.from_slices(*wide, "full"), "xxxxx", "xxxxx")
    assert_shows(Mask.from_slices(*wide, "causal"), "xxxx.", "xxxxx")
    assert_shows(Mask.from_slices(*wide, "inv_causal"), "xxxxx", ".xxxx")
    assert_shows(Mask.from_slices(*wide, "bi_causal"), "xxxx.", ".xxxx")
    assert_shows(Mask.from_slices(*tall, "causal"), "..", "..", "..", "x.", "xx")
    assert_shows(Mask.from_slices(*tall, "inv_causal"), "xx", ".x", "..", "..", "..")
    assert_shows(Mask.from_slices(*tall, "bi_causal"), "..", "..", "..", "..", "..")
    assert_shows(Mask.from_slices(*square, "causal"), "x..", "xx.", "xxx")
    assert_shows(Mask.from_slices(*square, "bi_causal"), "x..", ".x.", "..x")


def test_from_slices_inputs_are_equivalent():
    q, k = [[0, 2], [2, 4]], [[0, 2], [0, 4]]
    mask = Mask.from_slices(q, k, [0, 1])
    assert_shows(mask, "xx..", "xx..", "xxx.", "xxxx")
    for types in (
        ["full", "causal"],
        (FULL, CAUSAL),
        ["full", 1],
        torch.tensor([0, 1]),
        torch.tensor([0, 1], dtype=torch.int8),
    ):
        assert Mask.from_slices(torch.tensor(q), np.array(k), types) == mask
    broadcast = Mask.from_slices(q, k, [1, 1])
    for types in (1, "causal", CAUSAL, torch.tensor(1), np.int64(1)):
        assert Mask.from_slices(q, k, types) == broadcast


def test_from_slices_totals():
    assert_shows(Mask.from_slices([[1, 2]], [[0, 1]], 0, total_q=3, total_k=2), "..", "x.", "..")
    assert_shows(Mask.from_slices([], [], [], total_q=2, total_k=1), ".", ".")
    assert Mask.from_slices([], [], []).dense().shape == (0, 0)
    empty = Mask.from_slices([[0, 0], [1, 2]], [[0, 4], [3, 3]], 0)
    assert empty.area() == 0 and len(empty.slices) == 2, "empty slices are legal and stay"


def test_from_bands():
    assert_shows(Mask.from_bands([[0, 3]], [[0, 4]], [(0, 1)]), "xx..", ".xx.", "..xx")
    assert_shows(Mask.from_bands([[1, 3]], [[0, 3]], (None, -1)), "...", "x..", "xx.")
    two = [[0, 2], [2, 4]], [[0, 2], [2, 4]]
    assert_shows(Mask.from_bands(*two, (0, None)), "xx..", ".x..", "..xx", "...x")
    assert Mask.from_bands(*two, torch.tensor([[0, NO_HI]] * 2)) == Mask.from_bands(*two, [(0, None), (0, None)])
    assert_shows(Mask.from_bands([[0, 2]], [[0, 2]], [(1, 0)]), "..", "..")
    assert Mask.from_bands([[0, 2]], [[0, 2]], [(-(1 << 40), 1 << 40)]).slices[0, 4:].tolist() == [NO_LO, NO_HI]


# ---- geometry against the dense matrix -------------------------------------------------------------------------------


@st.composite
def masks(draw, limit: int = 9) -> Mask:
    """One to four slices with any band, side by side in q, so that they cannot overlap; some rows may be bare."""
    cuts = sorted(draw(st.lists(st.integers(0, limit), min_size=2, max_size=5)))
    q, k, bands = [], [], []
    bound = st.none() | st.integers(-limit, limit)
    for q0, q1 in itertools.pairwise(cuts):
        q.append((q0, q1))
        k.append(sorted((draw(st.integers(0, limit)), draw(st.integers(0, limit)))))
        bands.append((draw(bound), draw(bound)))
    return Mask.from_bands(q, k, bands, total_q=limit, total_k=limit)


def ranges(limit: int):
    return st.tuples(st.integers(0, limit), st.integers(0, limit)).map(sorted)


@given(masks())
def test_area_is_the_number_of_cells(mask):
    assert mask.area() == int(mask.dense().sum())
    assert slice_areas(mask.slices).sum() == mask.area()


def test_area_of_the_largest_mask_is_exact():
    n = MAX_ROWS - 1
    assert Mask.full(n).area() == n * n
    assert Mask.causal(n).area() == n * (n + 1) // 2
    assert Mask.sliding_window(n, 1, 1).area() == 3 * n - 2


@given(masks(), ranges(9), ranges(9))
def test_crop_and_shift(mask, q_range, k_range):
    (a, b), (c, d) = q_range, k_range
    cropped = mask.crop((a, b), (c, d))
    expected = torch.zeros_like(mask.dense())
    expected[a:b, c:d] = mask.dense()[a:b, c:d]
    assert torch.equal(cropped.dense(), expected)
    moved = cropped.shift(-a, -c, total_q=b - a, total_k=d - c)
    assert torch.equal(moved.dense(), mask.dense()[a:b, c:d])
    assert cropped.area() == moved.area()


@given(masks(), st.integers(0, 5), st.integers(0, 5))
def test_shift_onwards_grows_the_totals(mask, dq, dk):
    moved = mask.shift(dq, dk)
    assert torch.equal(moved.dense()[dq:, dk:], mask.dense())
    assert moved.area() == mask.area()
    assert moved.shift(-dq, -dk).area() == mask.area()


@given(ranges(8), ranges(8), st.integers(0, 3))
def test_types_follow_their_formulas(q_range, k_range, code):
    (q0, q1), (k0, k1) = q_range, k_range
    sq, sk = q1 - q0, k1 - k0
    i, j = torch.arange(8)[:, None] - q0, torch.arange(8) - k0
    visible = (i >= 0) & (i < sq) & (j >= 0) & (j < sk)
    if code & 1:
        visible &= j <= i + (sk - sq)
    if code & 2:
        visible &= j >= i
    mask = Mask.from_slices([q_range], [k_range], code, total_q=8, total_k=8)
    assert torch.equal(mask.dense(), visible)
    tall = sk * (sk + 1) // 2
    trapezoid = (2 * sk - sq + 1) * sq // 2 if sk >= sq else tall
    assert mask.area() == (sq * sk, trapezoid, trapezoid, max(0, sk - sq + 1) * sq)[code]


def window_cells(sq: int, sk: int, wl: int, wr: int) -> np.ndarray:
    """Bottom-right aligned window, cell by cell; the rows that lie above the first key are dropped."""
    cells = np.zeros((sq, sk), dtype=bool)
    for i, j in itertools.product(range(max(0, sq - sk), sq), range(sk)):
        effective = i + sk - sq
        cells[i, j] = (wl == -1 or effective - wl <= j) and (wr == -1 or j <= effective + wr)
    return cells


side = st.integers(-1, 9)


@given(st.integers(0, 8), st.integers(0, 8), side, side)
def test_window_semantics(sq, sk, wl, wr):
    slices = window_slices([[0, sq], [sq, 2 * sq]], [[0, sk], [sk, 2 * sk]], (wl, wr))
    assert slices.dtype == torch.int32 and len(slices) == 2
    dense = Mask(slices, 2 * sq, 2 * sk).dense().numpy()
    assert np.array_equal(dense, np.kron(np.eye(2, dtype=bool), window_cells(sq, sk, wl, wr)))


@given(st.lists(st.integers(0, 6), max_size=4), st.booleans(), side, side, st.integers(0, 7))
def test_varlen_semantics(lengths, causal, wl, wr, num_global):
    """Row i of a document sees [0, min(G, i + wr + 1)) and its window over the rest of the document."""
    wr = min(wr, 0) if causal else wr
    cu_seqlens = np.cumsum([0, *lengths])
    mask = Mask.varlen(cu_seqlens.tolist(), causal=causal, window=(wl, wr), global_tokens=num_global)
    expected = np.zeros((cu_seqlens[-1],) * 2, dtype=bool)
    for begin, n in zip(cu_seqlens, lengths):
        right = n if (0 if causal else wr) == -1 else (0 if causal else wr)
        cells = window_cells(n, n, wl, right)
        for i in range(n):
            cells[i, : max(0, min(num_global, n, i + right + 1))] = True
        expected[begin : begin + n, begin : begin + n] = cells
    assert np.array_equal(mask.dense().numpy(), expected)
    assert mask.area() == expected.sum()
    assert len(mask.slices) <= 2 * len(lengths)
    assert_disjoint(mask)


@given(masks(), st.integers(1, 12))
def test_coverage_is_the_mean_over_tiles(mask, num_tiles):
    dense, size = mask.dense().double(), -(-9 // num_tiles)
    expected = torch.stack([torch.stack([t.mean() for t in rows.split(size, 1)]) for rows in dense.split(size, 0)])
    torch.testing.assert_close(mask.coverage(num_tiles).double(), expected, atol=1e-6, rtol=0)


def test_band_slices_needs_no_python_numbers():
    """The shorthand is expanded by tensor operations alone: it may be traced, and run where the ranges live."""
    q, k, types = torch.tensor([[0, 3], [3, 5]]), torch.tensor([[0, 4], [1, 5]]), torch.tensor([1, 3])
    slices = torch.compile(band_slices, fullgraph=True, backend="eager")(q, k, types)
    assert slices.tolist() == [[0, 3, 0, 4, NO_LO, 1], [3, 5, 1, 5, -2, 0]]


# ---- a mask is a value -----------------------------------------------------------------------------------------------


def test_equal_hashable_picklable_frozen():
    mask, same = Mask.varlen([0, 3, 7]), Mask.varlen(torch.tensor([0, 3, 7], dtype=torch.int32))
    assert mask == same and hash(mask) == hash(same) and mask is not same
    assert len({mask, same, Mask.causal(7), Mask.full(7)}) == 3
    assert mask != Mask.from_slices([[0, 3], [3, 7]], [[0, 3], [3, 7]], 1, total_q=8) and mask != "mask"
    assert pickle.loads(pickle.dumps(mask)) == mask
    with pytest.raises(AttributeError):
        mask.total_q = 8
    assert mask.slices.dtype == torch.int32 and mask.slices.shape == (2, 6)
    assert repr(mask) == "Mask(total_q=7, total_k=7, slices=2, area=16, density=0.327)"


def test_constructor_copies_its_slices():
    slices = Mask.causal(4).slices.clone()
    mask = Mask(slices, 4, 4)
    slices.zero_()
    assert mask == Mask.causal(4)


def test_mask_type_codes():
    assert [kind.to_int_type() for kind in AttnMaskType] == [0, 1, 2, 3]
    assert [AttnMaskType.from_int_type(code) for code in range(4)] == [FULL, CAUSAL, INVCAUSAL, BICAUSAL]
    assert [kind.value for kind in AttnMaskType] == ["full", "causal", "inv_causal", "bi_causal"]


def test_draw(tmp_path):
    pytest.importorskip("matplotlib")
    for name, mask in {
        "small": Mask.prefix_lm(7, 2),
        "wide": Mask.full(3, 9),
        "none": Mask.from_slices([], [], []),
        "million": Mask.varlen(torch.arange(0, 1_000_001, 1000)),
    }.items():
        path = tmp_path / f"{name}.png"
        figure = mask.draw(path)
        assert path.read_bytes().startswith(b"\x89PNG")
        (image,) = figure.axes[0].images
        drawn = np.asarray(image.get_array())
        assert np.array_equal(drawn > 0, mask.coverage().numpy() > 0)


def test_draw_without_matplotlib_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"magi_attention\[viz\]"):
        Mask.causal(3).draw()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Mask.full(-1), "total_q must be at least 0 and below"),
        (lambda: Mask.full(1 << 29), "total_q must be .* below 2\\*\\*29 = 536870912, got 536870912"),
        (lambda: Mask.full(4, 2.5), "total_k must be an integer, got float 2.5"),
        (lambda: Mask.causal(True), "total must be an integer"),
        (lambda: Mask.sliding_window(4, -2, 0), "left, right must be at least -1"),
        (lambda: Mask.varlen([]), "cu_seqlens must start at 0"),
        (lambda: Mask.varlen([1, 4]), "cu_seqlens must start at 0, got \\[1\\]"),
        (lambda: Mask.varlen([0, 9, 7]), "cu_seqlens must never decrease, got cu_seqlens\\[2\\] = 7 after 9"),
        (lambda: Mask.varlen([0.0, 4.0]), "cu_seqlens must be integers"),
        (lambda: Mask.varlen([[0, 4]]), "cu_seqlens must be integers \\[n\\], got shape \\[1, 2\\]"),
        (lambda: Mask.varlen([0, 1 << 29]), "the end of cu_seqlens must be"),
        (lambda: Mask.varlen([0, 4], window=(1, 2)), "window must have a right side of -1 or 0 with causal=True"),
        (lambda: Mask.varlen([0, 4], window=3), "window must be two integers"),
        (lambda: Mask.varlen([0, 4], global_tokens=-1), "global_tokens must be at least 0, got -1"),
        (lambda: Mask.varlen([0, 4], window=(1, 0), global_tokens=1, cu_seqlens_k=[0, 5]), "global_tokens needs"),
        (lambda: Mask.varlen([0, 4], cu_seqlens_k=[0, 2, 4]), "cu_seqlens_k must have as many entries"),
        (lambda: Mask.block_causal(4, 0), "block must be at least 1, got 0"),
        (lambda: Mask.block_causal(4, 2, cu_seqlens=[0, 3]), "cu_seqlens must end at total = 4, got 3"),
        (lambda: Mask.prefix_lm(4, 5), "prefix must be between 0 and total = 4, got 5"),
        (lambda: Mask.shared_question(2, [1, -1]), "lengths\\[2\\] must be at least 0, got -1"),
        (lambda: Mask.tree([-1, 1], [1, 1]), "parents\\[1\\] must be -1 or the index of an earlier node, got 1"),
        (lambda: Mask.tree([-1], [1, 1]), "parents and lengths must be equally long, got 1 and 2"),
        (lambda: Mask.from_slices([[-1, 2]], [[0, 2]], 0), "q_ranges\\[0\\] must be a range .*got \\[-1, 2\\]"),
        (lambda: Mask.from_slices([[0, 2]], [[2, 0]], 0), "k_ranges\\[0\\] must be a range .*got \\[2, 0\\]"),
        (lambda: Mask.from_slices([[0, 9]], [[0, 2]], 0, total_q=8), "q_ranges\\[0\\] .* total_q = 8, got \\[0, 9\\]"),
        (lambda: Mask.from_slices([[0, 2]], [[0, 1 << 29]], 0), "total_k must be"),
        (lambda: Mask.from_slices([[0, 2]], [[0, 2], [2, 4]], 0), "k_ranges must have one range for each of the 1"),
        (lambda: Mask.from_slices([0, 2], [[0, 2]], 0), "q_ranges must be integers \\[n, 2\\]"),
        (lambda: Mask.from_slices([[0, 2]], [[0, 2.5]], 0), "k_ranges must be integers"),
        (lambda: Mask.from_slices([[0, 2]], [[0, 2]], 4), "types must be a code 0 to 3, .*got 4"),
        (lambda: Mask.from_slices([[0, 2]], [[0, 2]], ["causl"]), "types\\[0\\] must be .*'causal'.*got 'causl'"),
        (lambda: Mask.from_slices([[0, 2]], [[0, 2]], torch.tensor([4])), "types\\[0\\] must be a code 0 to 3, got 4"),
        (lambda: Mask.from_slices([[0, 2]], [[0, 2]], [0, 1]), "types must be one type, or one for each of the 1"),
        (lambda: Mask.from_slices([[0, 2]], [[0, 2]], 1.0), "types must be a code"),
        (lambda: Mask.from_bands([[0, 2]], [[0, 2]], [(0, 1), (0, 1)]), "bands must have one range for each of the 1"),
        (lambda: Mask.from_bands([[0, 2]], [[0, 2]], ["ab"]), "bands must be"),
        (lambda: Mask.from_bands([[0, 2]], [[0, 2]], [(0.5, 1)]), "bands must be integers"),
        (
            lambda: Mask(torch.zeros(1, 6), 4, 4),
            "slices must be an int32 tensor \\[n, 6\\], got torch.float32 \\[1, 6\\]",
        ),
        (lambda: Mask(torch.zeros(1, 5, dtype=torch.int32), 4, 4), "slices must be an int32 tensor"),
        (
            lambda: Mask(torch.tensor([[0, 5, 0, 1, 0, 0]], dtype=torch.int32), 4, 4),
            "rows.*total_q = 4, got \\[0, 5\\]",
        ),
        (lambda: Mask.causal(4).crop((0, 5), (0, 4)), "q_range\\[0\\] must be a range"),
        (lambda: Mask.causal(4).shift(-1, 0), "shifted rows"),
        (lambda: Mask.causal(4).coverage(0), "num_tiles must be at least 1"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_type_code_out_of_range():
    with pytest.raises(ValueError, match="code must be 0, 1, 2 or 3, got 4"):
        AttnMaskType.from_int_type(4)


# ---- overlap ---------------------------------------------------------------------------------------------------------


def test_overlap_names_both_slices_and_a_cell():
    with pytest.raises(
        ValueError, match=r"slice 0 \(rows \[0, 4\), keys \[0, 4\), k - q <= 0\) and slice 2 \(rows \[3, 5"
    ):
        Mask.from_slices([[0, 4], [4, 6], [3, 5]], [[0, 4], [4, 6], [2, 4]], ["causal", "full", "full"])
    with pytest.raises(ValueError, match=r"-1 <= k - q <= 1.*both cover row 2, key 3"):
        Mask.from_bands([[0, 4], [2, 4]], [[0, 4], [3, 4]], [(-1, 1), (None, None)])
    with pytest.raises(ValueError, match=r"slices must not overlap, got slice 0 .* and slice 1"):
        Mask(Mask.full(3).slices.repeat(2, 1), 3, 3)


def test_touching_is_not_overlapping():
    halves = Mask.from_bands([[0, 4]] * 2, [[0, 4]] * 2, [(None, 0), (1, None)])
    assert_shows(halves, "xxxx", "xxxx", "xxxx", "xxxx")
    staircase = Mask.from_slices([[0, 2], [0, 2], [2, 4]], [[0, 2], [2, 4], [0, 4]], "full")
    assert staircase.area() == 16
    empty = Mask.from_slices([[0, 2], [0, 0], [1, 2]], [[0, 2], [0, 2], [1, 1]], "full")
    assert empty.area() == 4, "a slice without cells overlaps nothing"


@given(st.data())
def test_overlap_is_refused_exactly_where_a_cell_is_covered_twice(data):
    count = data.draw(st.integers(0, 4))
    bound = st.none() | st.integers(-7, 7)
    q, k = ([data.draw(ranges(7)) for _ in range(count)] for _ in range(2))
    bands = [(data.draw(bound), data.draw(bound)) for _ in range(count)]
    covers = [Mask.from_bands([a], [b], [c], total_q=7, total_k=7).dense() for a, b, c in zip(q, k, bands)]
    twice = sum((c.int() for c in covers), torch.zeros(7, 7, dtype=torch.int32)) > 1
    if not twice.any():
        assert Mask.from_bands(q, k, bands, total_q=7, total_k=7).area() == sum(int(c.sum()) for c in covers)
        return
    with pytest.raises(ValueError, match="slices must not overlap") as error:
        Mask.from_bands(q, k, bands, total_q=7, total_k=7)
    first, second = (int(at) for at in re.findall(r"slice (\d+) \(", str(error.value)))
    row, key = (int(at) for at in re.search(r"row (\d+), key (\d+)", str(error.value)).groups())
    assert first != second and covers[first][row, key] and covers[second][row, key]


def test_builders_are_disjoint_at_scale():
    """The builders skip the check, being disjoint by construction; what they build has to pass it."""
    ends = torch.randint(0, 200, (1000,), generator=torch.Generator().manual_seed(0)).cumsum(0)
    cu_seqlens = torch.cat([torch.tensor([0]), ends])
    total = int(ends[-1])
    for mask in (
        Mask.varlen(cu_seqlens, window=(16, 0), global_tokens=4),
        Mask.block_causal(total, 33, cu_seqlens=cu_seqlens),
        Mask.tree([(i - 1) // 2 for i in range(1000)], cu_seqlens.diff()),
    ):
        assert Mask(mask.slices, mask.total_q, mask.total_k) == mask
