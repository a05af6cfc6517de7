"""Which keys may each query row attend? `Mask`: a list of slices, rectangles of (row, key) cells with a diagonal band.

A slice `q0 q1 k0 k1 lo hi` holds the cells of `[q0, q1) x [k0, k1)` with `lo <= k - q <= hi` (both inclusive); `NO_LO`
and `NO_HI` stand for an absent bound. The four mask types are shorthand that exists at this border only
(`band_slices`).
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure

MAX_ROWS = 1 << 29  # rows and keys are below this, so that every k - q fits an int32
NO_LO = -(1 << 30)  # no lower bound
NO_HI = 1 << 30  # no upper bound

Ranges = Sequence[Sequence[int]] | Tensor  # [n, 2], half-open
Ints = Sequence[int] | Tensor


class AttnMaskType(enum.Enum):
    """Shorthand for a band: bit 0 of the code bounds it from above (bottom-right aligned), bit 1 below (top-left)."""

    FULL = "full"
    CAUSAL = "causal"
    INVCAUSAL = "inv_causal"
    BICAUSAL = "bi_causal"

    @classmethod
    def from_int_type(cls, code: int) -> AttnMaskType:
        """The type of code 0 (full), 1 (causal), 2 (inv_causal) or 3 (bi_causal); ValueError for any other."""
        if not 0 <= code < 4:
            raise ValueError(f"code must be 0, 1, 2 or 3, got {code}")
        return tuple(cls)[code]

    def to_int_type(self) -> int:
        return tuple(AttnMaskType).index(self)


def band_slices(q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor) -> Tensor:
    """Typed slices as band slices, int32 [n, 6], on the device of the inputs; unchecked and traceable.

    Args:
        q_ranges, k_ranges: integers [n, 2], half-open.
        attn_type_map: integers [n], codes of `AttnMaskType`.
    """
    q0, q1 = q_ranges.unbind(1)
    k0, k1 = k_ranges.unbind(1)
    lo = torch.where(attn_type_map & 2 != 0, k0 - q0, NO_LO)
    hi = torch.where(attn_type_map & 1 != 0, k1 - q1, NO_HI)
    return torch.stack([q0, q1, k0, k1, lo, hi], dim=1).to(torch.int32)


def window_slices(q_ranges: Ranges, k_ranges: Ranges, window: tuple[int, int]) -> Tensor:
    """One band slice int32 [n, 6] per pair of ranges: a sliding window aligned to the bottom-right corner.

    Row i of sq sees key j of sk where `e - left <= j <= e + right` with `e = i + sk - sq`; a bound of -1 is absent.
    Where sq > sk the first sq - sk rows, which lie above the first key, see nothing.

    Example: `window_slices([[0, 4]], [[0, 6]], (1, 0))` gives rows `.xx...  ..xx..  ...xx.  ....xx`.
    """
    left, right = _window("window", window)
    q = _ranges("q_ranges", q_ranges)
    k = _ranges("k_ranges", k_ranges, len(q))
    (q0, q1), (k0, k1) = q.unbind(1), k.unbind(1)
    corner = k1 - q1
    return _stack(
        torch.maximum(q0, q1 - (k1 - k0)),
        q1,
        k0,
        k1,
        corner - left if left >= 0 else NO_LO,
        corner + right if right >= 0 else NO_HI,
    )


def slice_areas(slices: Tensor) -> Tensor:
    """Allowed cells of each slice in closed form: int64 [n], for slices int32 [n, 6]."""
    q0, q1, k0, k1, lo, hi = slices.long().unbind(1)
    num_q, num_k, origin = (q1 - q0).clamp(min=0), (k1 - k0).clamp(min=0), k0 - q0

    def triangle(side: Tensor) -> Tensor:
        side = side.clamp(min=0)
        return side * (side + 1) // 2

    def cells_up_to(diagonal: Tensor) -> Tensor:
        # Row q holds clamp(q + d + 1, 0, num_k) cells: a ramp from 0, less the ramp that starts where a row is full.
        d = torch.minimum(torch.maximum(diagonal, -num_q), num_k)
        return triangle(num_q + d) - triangle(d) - triangle(num_q + d - num_k) + triangle(d - num_k)

    return torch.where(lo <= hi, cells_up_to(hi - origin) - cells_up_to(lo - 1 - origin), 0)


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """The (row, key) cells that attention computes: a list of slices that do not overlap.

    Build one with a class method (`Mask.causal`, `Mask.varlen`, `Mask.from_slices`, ...). A mask is a value: frozen,
    hashable and equal by its slices and lengths, picklable; its tensor is never to be modified. Rows that no slice
    covers attend nothing (out 0, lse -inf).

    Attributes:
        slices: int32 CPU tensor [n, 6], columns q0 q1 k0 k1 lo hi; `lo <= k - q <= hi` inside `[q0, q1) x [k0, k1)`.
        total_q, total_k: number of query rows and of keys, below 2**29.

    Raises:
        ValueError: wrong shape or dtype, ranges that are negative, reversed or beyond the totals, overlapping slices.

    Example:
        >>> Mask.varlen([0, 2, 5]).dense().int()
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [0, 0, 1, 0, 0],
                [0, 0, 1, 1, 0],
                [0, 0, 1, 1, 1]], dtype=torch.int32)
    """

    slices: Tensor
    total_q: int
    total_k: int

    def __post_init__(self) -> None:
        slices = self.slices
        if not isinstance(slices, Tensor) or slices.dtype != torch.int32 or slices.dim() != 2 or slices.shape[1] != 6:
            raise ValueError(f"slices must be an int32 tensor [n, 6], got {_describe(slices)}")
        total_q, total_k = _length("total_q", self.total_q), _length("total_k", self.total_k)
        slices = slices.detach().cpu().contiguous().clone()
        _check_within("slices (rows)", slices[:, :2], "total_q", total_q)
        _check_within("slices (keys)", slices[:, 2:4], "total_k", total_k)
        _refuse_overlap(slices)
        self._set(slices, total_q, total_k)

    def _set(self, slices: Tensor, total_q: int, total_k: int) -> Mask:
        object.__setattr__(self, "slices", slices)
        object.__setattr__(self, "total_q", total_q)
        object.__setattr__(self, "total_k", total_k)
        return self

    @classmethod
    def _disjoint(cls, slices: Tensor, total_q: int, total_k: int) -> Mask:
        """From slices that are in range and disjoint by construction; the ones without a cell are dropped."""
        q0, q1, k0, k1, lo, hi = slices.unbind(1)
        least, most = torch.maximum(lo, k0 - q1 + 1), torch.minimum(hi, k1 - 1 - q0)
        keep = (q0 < q1) & (k0 < k1) & (least <= most)
        return object.__new__(cls)._set(slices if bool(keep.all()) else slices[keep], total_q, total_k)

    # ---- builders ----------------------------------------------------------------------------------------------------

    @classmethod
    def full(cls, total_q: int, total_k: int | None = None) -> Mask:
        """Every row sees every key; `total_k` defaults to `total_q`."""
        total_q = _length("total_q", total_q)
        total_k = total_q if total_k is None else _length("total_k", total_k)
        return cls._disjoint(_stack(torch.tensor([0]), total_q, 0, total_k, NO_LO, NO_HI), total_q, total_k)

    @classmethod
    def causal(cls, total: int) -> Mask:
        """Row i sees keys 0 to i."""
        return cls.sliding_window(total, -1, 0)

    @classmethod
    def sliding_window(cls, total: int, left: int, right: int) -> Mask:
        """Row i sees keys i - left to i + right, both inclusive; -1 leaves a side unbounded. One slice.

        A causal window of w keys, the row's own included, is `sliding_window(total, w - 1, 0)`.
        """
        total = _length("total", total)
        left, right = _window("left, right", (left, right))
        return cls._disjoint(window_slices([[0, total]], [[0, total]], (left, right)), total, total)

    @classmethod
    def varlen(
        cls,
        cu_seqlens: Ints,
        *,
        causal: bool = True,
        window: tuple[int, int] = (-1, -1),
        global_tokens: int = 0,
        cu_seqlens_k: Ints | None = None,
    ) -> Mask:
        """Packed documents, each attending itself only.

        Args:
            cu_seqlens: [documents + 1], from 0 to the total, never decreasing; a document may be empty.
            causal: a row sees no later key; the right side of `window` must then be -1 or 0.
            window: (left, right) as in `sliding_window`, within each document; one slice per document.
            global_tokens: the first rows of each document that every row in it sees besides its window, where the right
                side of the window allows; at most two slices per document.
            cu_seqlens_k: the documents' keys where they differ from their rows; causal and windows are then aligned to
                each document's bottom-right corner.

        Example: `Mask.varlen([0, 4], window=(1, 0), global_tokens=1)` has rows `x...  xx..  xxx.  x.xx`.
        """
        rows = _cu_seqlens("cu_seqlens", cu_seqlens)
        keys = rows if cu_seqlens_k is None else _cu_seqlens("cu_seqlens_k", cu_seqlens_k)
        if len(keys) != len(rows):
            raise ValueError(f"cu_seqlens_k must have as many entries as cu_seqlens, {len(rows)}, got {len(keys)}")
        left, right = _window("window", window)
        if causal and right > 0:
            raise ValueError(f"window must have a right side of -1 or 0 with causal=True, got {window}")
        right = 0 if causal else right
        if _integer("global_tokens", global_tokens) < 0:
            raise ValueError(f"global_tokens must be at least 0, got {global_tokens}")
        if global_tokens and not torch.equal(rows, keys):
            raise ValueError("global_tokens needs documents with as many keys as rows, got a different cu_seqlens_k")

        q_ranges = torch.stack([rows[:-1], rows[1:]], dim=1)
        k_ranges = torch.stack([keys[:-1], keys[1:]], dim=1)
        if left < 0 and right < 0:
            slices = band_slices(q_ranges, k_ranges, torch.zeros(len(q_ranges), dtype=torch.int64))
        else:
            slices = window_slices(q_ranges, k_ranges, (left, right))
        if global_tokens and left >= 0:
            # The same rows twice: keys before the split without the left bound, keys from it on within the window.
            split = torch.minimum(slices[:, 2] + global_tokens, slices[:, 3])
            seen_by_all, windowed = slices.clone(), slices
            seen_by_all[:, 3], seen_by_all[:, 4] = split, NO_LO
            windowed[:, 2] = split
            slices = torch.stack([seen_by_all, windowed], dim=1).flatten(0, 1)
        return cls._disjoint(slices, int(rows[-1]), int(keys[-1]))

    @classmethod
    def block_causal(cls, total: int, block: int, *, cu_seqlens: Ints | None = None) -> Mask:
        """Blocks of `block` rows; each sees itself whole and all earlier ones (of its document, with `cu_seqlens`).

        The last block of the sequence, or of a document, may be shorter. One slice per block.
        """
        total = _length("total", total)
        if _integer("block", block) < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        documents = _cu_seqlens("cu_seqlens", [0, total] if cu_seqlens is None else cu_seqlens)
        if int(documents[-1]) != total:
            raise ValueError(f"cu_seqlens must end at total = {total}, got {int(documents[-1])}")
        begin, end = documents[:-1], documents[1:]
        document, index = _enumerate(torch.zeros_like(begin), (end - begin + block - 1) // block)
        q0 = begin[document] + index * block
        q1 = torch.minimum(q0 + block, end[document])
        return cls._disjoint(_stack(q0, q1, begin[document], q1, NO_LO, NO_HI), total, total)

    @classmethod
    def prefix_lm(cls, total: int, prefix: int) -> Mask:
        """Every row sees the first `prefix` keys; the later rows are causal among themselves."""
        total = _length("total", total)
        if not 0 <= _integer("prefix", prefix) <= total:
            raise ValueError(f"prefix must be between 0 and total = {total}, got {prefix}")
        q0 = torch.tensor([0, prefix])
        q1 = torch.tensor([prefix, total])
        return cls._disjoint(_stack(q0, q1, 0, q1, NO_LO, torch.tensor([NO_HI, 0])), total, total)

    @classmethod
    def shared_question(cls, question: int, answers: Ints) -> Mask:
        """One question, then its answers: each answer sees the question and itself, causally, and no other answer.

        Args:
            question: rows of the question (causal).
            answers: rows of each answer, in the order in which they are packed.

        Several such groups in one pack, or answers that branch again, are `tree`.
        """
        lengths = torch.cat([torch.tensor([_length("question", question)]), _ints("answers", answers)])
        parents = torch.zeros_like(lengths)
        parents[0] = -1
        return cls.tree(parents, lengths)

    @classmethod
    def tree(cls, parents: Ints, lengths: Ints) -> Mask:
        """Text that branches: a node sees all of its ancestors, and itself causally.

        Args:
            parents: index of each node's parent, below the node's own; -1 for a root (a pack may hold several trees).
            lengths: rows of each node; node i's rows follow those of node i - 1.

        In depth-first order there is one slice per branch; in any other order, one per run of a node's descendants.

        Example: `Mask.tree([-1, 0, 0], [1, 2, 1])` has rows `x...  xx..  xxx.  x..x`.
        """
        parent, length = _ints("parents", parents), _ints("lengths", lengths)
        if len(parent) != len(length):
            raise ValueError(f"parents and lengths must be equally long, got {len(parent)} and {len(length)}")
        _check_each("lengths", length, length >= 0, "at least 0")
        node = torch.arange(len(parent))
        _check_each("parents", parent, (parent >= -1) & (parent < node), "-1 or the index of an earlier node")
        total = _length("the sum of lengths", int(length.sum()))

        # An only child that follows its parent at once continues it: the two are one node.
        children = torch.bincount(parent + 1, minlength=len(parent) + 1)[1:]
        head = torch.ones_like(parent, dtype=torch.bool)
        head[1:] = (parent[1:] != node[:-1]) | (children[:-1] != 1)
        merged = head.cumsum(0) - 1
        parent = torch.where(parent[head] >= 0, merged[parent[head].clamp(min=0)], -1)
        ends = torch.zeros(len(parent), dtype=torch.int64).index_add_(0, merged, length).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends])[: len(parent)]

        # Every pair (ancestor or self, node), one generation at a time; runs of one ancestor's nodes become one slice.
        # Rows of a later node lie above the diagonal of an earlier one's keys, so that "causal" holds for all of them.
        below = ancestor = torch.arange(len(parent))
        pairs = []
        while len(below):
            pairs.append(ancestor * len(parent) + below)
            below, ancestor = below[parent[ancestor] >= 0], parent[ancestor]
            ancestor = ancestor[ancestor >= 0]
        key = torch.cat(pairs).sort().values if pairs else below
        ancestor, below = key // max(len(parent), 1), key % max(len(parent), 1)
        first = torch.ones_like(key, dtype=torch.bool)
        first[1:] = (ancestor[1:] != ancestor[:-1]) | (below[1:] != below[:-1] + 1)
        last = torch.cat([first[1:], first.new_ones(1)])[: len(first)]
        ancestor = ancestor[first]
        return cls._disjoint(
            _stack(starts[below[first]], ends[below[last]], starts[ancestor], ends[ancestor], NO_LO, 0), total, total
        )

    @classmethod
    def from_slices(
        cls,
        q_ranges: Ranges,
        k_ranges: Ranges,
        types: int | str | AttnMaskType | Sequence[int | str | AttnMaskType] | Tensor,
        *,
        total_q: int | None = None,
        total_k: int | None = None,
    ) -> Mask:
        """From typed slices.

        Args:
            q_ranges, k_ranges: [n, 2], half-open; lists or integer tensors.
            types: per slice a code (0 to 3), a name ('full', 'causal', 'inv_causal', 'bi_causal') or an `AttnMaskType`;
                one alone holds for all slices.
            total_q, total_k: lengths; by default the largest end.

        Raises:
            ValueError: two slices cover the same cell (the message names them), or any range or type is not valid.

        Example:
            >>> Mask.from_slices([[0, 2], [2, 4]], [[0, 2], [0, 4]], ["full", "causal"]).area()
            11
        """
        q = _ranges("q_ranges", q_ranges)
        k = _ranges("k_ranges", k_ranges, len(q))
        return cls._checked(q, k, band_slices(q, k, _type_codes(types, len(q)))[:, 4:], total_q, total_k)

    @classmethod
    def from_bands(
        cls,
        q_ranges: Ranges,
        k_ranges: Ranges,
        bands: Sequence[Any] | Tensor,
        *,
        total_q: int | None = None,
        total_k: int | None = None,
    ) -> Mask:
        """From rectangles with a band `lo <= k - q <= hi` each, in absolute rows and keys.

        Args:
            q_ranges, k_ranges, total_q, total_k: as in `from_slices`.
            bands: per slice (lo, hi), inclusive, None for an absent bound; one pair alone holds for all slices. A
                tensor [n, 2] takes `NO_LO` and `NO_HI` for absent bounds.

        Example: `Mask.from_bands([[0, 3]], [[0, 4]], [(0, 1)])` has rows `xx..  .xx.  ..xx`.
        """
        q = _ranges("q_ranges", q_ranges)
        k = _ranges("k_ranges", k_ranges, len(q))
        return cls._checked(q, k, _bands(bands, len(q)), total_q, total_k)

    @classmethod
    def _checked(cls, q: Tensor, k: Tensor, bands: Tensor, total_q: int | None, total_k: int | None) -> Mask:
        totals = []
        for name, ranges, total in ("q", q, total_q), ("k", k, total_k):
            largest = int(ranges.max()) if len(ranges) else 0
            totals.append(_length(f"total_{name}", largest if total is None else total))
            _check_within(f"{name}_ranges", ranges, f"total_{name}", totals[-1])
        return cls(torch.cat([q, k, bands], dim=1).to(torch.int32), *totals)

    # ---- what it holds -----------------------------------------------------------------------------------------------

    def dense(self) -> Tensor:
        """bool [total_q, total_k], True where a row sees a key. For small masks: it has total_q * total_k elements."""
        cells = torch.zeros(self.total_q, self.total_k, dtype=torch.bool)
        for q0, q1, k0, k1, lo, hi in self.slices.tolist():
            diagonal = torch.arange(k0, k1) - torch.arange(q0, q1)[:, None]
            cells[q0:q1, k0:k1] |= (diagonal >= lo) & (diagonal <= hi)
        return cells

    def area(self) -> int:
        """Allowed cells, in closed form."""
        return int(slice_areas(self.slices).sum())

    def crop(self, q_range: tuple[int, int], k_range: tuple[int, int]) -> Mask:
        """The cells in these rows and keys alone; coordinates and totals stay. Bands are kept: only ranges are cut."""
        limits = []
        for name, bounds, total in ("q_range", q_range, self.total_q), ("k_range", k_range, self.total_k):
            limits.append(_ranges(name, [bounds]))
            _check_within(name, limits[-1], "total", total)
        (q0, q1), (k0, k1) = limits[0][0].tolist(), limits[1][0].tolist()
        slices = self.slices.clone()
        slices[:, :2].clamp_(q0, q1)
        slices[:, 2:4].clamp_(k0, k1)
        return Mask._disjoint(slices, self.total_q, self.total_k)

    def shift(self, q_shift: int, k_shift: int, *, total_q: int | None = None, total_k: int | None = None) -> Mask:
        """The same cells, `q_shift` rows and `k_shift` keys further on; the totals move along unless they are given.

        `mask.crop((a, b), (c, d)).shift(-a, -c, total_q=b - a, total_k=d - c)` is `mask.dense()[a:b, c:d]`.

        Raises:
            ValueError: a slice would leave the new totals.
        """
        q_shift, k_shift = _integer("q_shift", q_shift), _integer("k_shift", k_shift)
        total_q = _length("total_q", self.total_q + q_shift if total_q is None else total_q)
        total_k = _length("total_k", self.total_k + k_shift if total_k is None else total_k)
        slices = self.slices.long()
        lo, hi = slices[:, 4], slices[:, 5]
        moved = slices + torch.tensor([q_shift, q_shift, k_shift, k_shift, 0, 0])
        moved[:, 4] = torch.where(lo <= NO_LO, NO_LO, (lo + k_shift - q_shift).clamp(NO_LO, NO_HI))
        moved[:, 5] = torch.where(hi >= NO_HI, NO_HI, (hi + k_shift - q_shift).clamp(NO_LO, NO_HI))
        _check_within("shifted rows", moved[:, :2], "total_q", total_q)
        _check_within("shifted keys", moved[:, 2:4], "total_k", total_k)
        return Mask._disjoint(moved.to(torch.int32), total_q, total_k)

    # ---- pictures ----------------------------------------------------------------------------------------------------

    def coverage(self, num_tiles: int = 512) -> Tensor:
        """Which part of each tile is allowed: float32 [rows of tiles, columns of tiles], at most `num_tiles` each way.

        Works from the areas of cropped slices, so that millions of tokens cost no more than thousands. Tiles have
        `ceil(total / num_tiles)` rows (and keys); the last may be smaller.
        """
        if _integer("num_tiles", num_tiles) < 1:
            raise ValueError(f"num_tiles must be at least 1, got {num_tiles}")
        rows, keys = -(-self.total_q // num_tiles) or 1, -(-self.total_k // num_tiles) or 1
        num_rows, num_columns = -(-self.total_q // rows), -(-self.total_k // keys)
        slices = self.slices.long()
        owner, tile_row = _enumerate(slices[:, 0] // rows, -(-slices[:, 1] // rows))
        cells = torch.zeros(num_rows * num_columns, dtype=torch.int64)
        for part in range(0, len(owner), 2048):  # bounds the memory: one part meets at most 2048 * num_tiles tiles
            row = tile_row[part : part + 2048]
            strip = slices[owner[part : part + 2048]]
            strip[:, 0] = torch.maximum(strip[:, 0], row * rows)
            strip[:, 1] = torch.minimum(strip[:, 1], (row + 1) * rows)
            q0, q1, k0, k1, lo, hi = strip.unbind(1)
            first = torch.minimum(torch.maximum(k0, q0 + lo), k1)
            last = torch.maximum(torch.minimum(k1, q1 + hi), first)
            which, column = _enumerate(first // keys, -(-last // keys))
            tile = strip[which]
            tile[:, 2] = torch.maximum(tile[:, 2], column * keys)
            tile[:, 3] = torch.minimum(tile[:, 3], (column + 1) * keys)
            cells.index_add_(0, row[which] * num_columns + column, slice_areas(tile))
        tile_rows = (torch.arange(1, num_rows + 1) * rows).clamp(max=self.total_q).diff(prepend=torch.tensor([0]))
        tile_keys = (torch.arange(1, num_columns + 1) * keys).clamp(max=self.total_k).diff(prepend=torch.tensor([0]))
        return (cells.view(num_rows, num_columns) / (tile_rows[:, None] * tile_keys)).float()

    def draw(self, path: str | os.PathLike[str] | None = None, *, num_tiles: int = 512) -> Figure:
        """A picture of the mask as a matplotlib figure; saved where `path` is given. Readable at any length.

        Tiles are as dark as their coverage; a tile with a single allowed cell still shows.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Mask.draw needs matplotlib: pip install 'magi_attention[viz]'") from error
        coverage = self.coverage(num_tiles)
        shade = torch.where(coverage > 0, 0.3 + 0.7 * coverage, 0.0)
        figure = Figure(figsize=(4.8, 4.8), dpi=160, layout="constrained")
        axes = figure.add_subplot(
            xlabel="key", ylabel="row", title=f"cells: {self.area():,}   slices: {len(self.slices):,}"
        )
        extent = (0, max(self.total_k, 1), max(self.total_q, 1), 0)
        axes.imshow(shade.reshape(coverage.shape).numpy(), cmap="Blues", vmin=0, vmax=1, extent=extent, aspect="auto")
        if max(self.total_q, self.total_k) <= min(num_tiles, 64):  # one tile is one cell: show them one by one
            axes.set_xticks(range(self.total_k), minor=True)
            axes.set_yticks(range(self.total_q), minor=True)
            axes.grid(which="both", color="white", linewidth=0.8)
            axes.tick_params(which="minor", length=0)
        if path is not None:
            figure.savefig(path)
        return figure

    # ---- a value -----------------------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return (
            self.total_q == other.total_q and self.total_k == other.total_k and torch.equal(self.slices, other.slices)
        )

    def __hash__(self) -> int:
        return hash((self.total_q, self.total_k, self.slices.numpy().tobytes()))

    def __repr__(self) -> str:
        cells = max(self.total_q * self.total_k, 1)
        area = self.area()
        return (
            f"Mask(total_q={self.total_q}, total_k={self.total_k}, slices={len(self.slices)}, area={area}, "
            f"density={area / cells:.3g})"
        )


# ---- checks at the border, and small tensor helpers ------------------------------------------------------------------


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {_describe(value)}") from None


def _length(name: str, value: Any) -> int:
    length = _integer(name, value)
    if not 0 <= length < MAX_ROWS:
        raise ValueError(f"{name} must be at least 0 and below 2**29 = {MAX_ROWS}, got {length}")
    return length


def _window(name: str, window: Any) -> tuple[int, int]:
    try:
        left, right = (_integer(name, side) for side in window)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two integers (left, right), got {window!r}") from None
    if left < -1 or right < -1:
        raise ValueError(f"{name} must be at least -1 on each side (-1: unbounded), got ({left}, {right})")
    return left, right


def _int_tensor(name: str, value: Any, shape: str) -> Tensor:
    """int64 CPU tensor from lists or an integer tensor; an empty list has no dtype of its own."""
    try:
        tensor = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers {shape}, got {value!r} ({error})") from None
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} must be integers {shape}, got {_describe(tensor)}")
    return tensor.long()


def _ints(name: str, value: Any) -> Tensor:
    tensor = _int_tensor(name, value, "[n]")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must be integers [n], got shape {list(tensor.shape)}")
    return tensor


def _ranges(name: str, value: Any, count: int | None = None) -> Tensor:
    tensor = _int_tensor(name, value, "[n, 2]")
    if tensor.numel() == 0 and tensor.dim() == 1:
        tensor = tensor.reshape(0, 2)
    if tensor.dim() != 2 or tensor.shape[1] != 2:
        raise ValueError(f"{name} must be integers [n, 2], got shape {list(tensor.shape)}")
    if count is not None and len(tensor) != count:
        raise ValueError(f"{name} must have one range for each of the {count} q_ranges, got {len(tensor)}")
    return tensor


def _cu_seqlens(name: str, value: Any) -> Tensor:
    tensor = _ints(name, value)
    if len(tensor) == 0 or int(tensor[0]) != 0:
        raise ValueError(f"{name} must start at 0, got {tensor[:1].tolist()}")
    if bool((tensor.diff() < 0).any()):
        at = int((tensor.diff() < 0).nonzero()[0]) + 1
        raise ValueError(
            f"{name} must never decrease, got {name}[{at}] = {int(tensor[at])} after {int(tensor[at - 1])}"
        )
    _length(f"the end of {name}", int(tensor[-1]))
    return tensor


def _type_codes(types: Any, count: int) -> Tensor:
    """int64 [count] codes from one type, a sequence of types or an integer tensor."""

    def code(position: str, kind: Any) -> int:
        try:
            if isinstance(kind, AttnMaskType):
                return kind.to_int_type()
            return (
                AttnMaskType(kind).to_int_type()
                if isinstance(kind, str)
                else AttnMaskType.from_int_type(_integer("", kind)).to_int_type()
            )
        except ValueError:
            names = ", ".join(repr(kind.value) for kind in AttnMaskType)
            raise ValueError(
                f"types{position} must be a code 0 to 3, one of {names}, or an AttnMaskType, got {kind!r}"
            ) from None

    if isinstance(types, Tensor):
        types = _int_tensor("types", types, "[n]")
        if types.dim() == 1:
            _check_each("types", types, (types >= 0) & (types < 4), "a code 0 to 3")
            codes = types
        else:
            codes = torch.tensor([code("", types.tolist())]).expand(count)
    elif isinstance(types, (str, AttnMaskType)) or not isinstance(types, Sequence):
        codes = torch.tensor([code("", types)]).expand(count)
    else:
        codes = torch.tensor([code(f"[{at}]", kind) for at, kind in enumerate(types)], dtype=torch.int64)
    if len(codes) != count:
        raise ValueError(f"types must be one type, or one for each of the {count} q_ranges, got {len(codes)}")
    return codes


def _bands(bands: Any, count: int) -> Tensor:
    """int64 [count, 2]; None becomes NO_LO or NO_HI."""
    if not isinstance(bands, Tensor):
        try:
            pairs = (
                [bands] * count if len(bands) == 2 and all(b is None or isinstance(b, int) for b in bands) else bands
            )
            bands = [(NO_LO if lo is None else lo, NO_HI if hi is None else hi) for lo, hi in pairs]
        except (TypeError, ValueError):
            raise ValueError(f"bands must be pairs (lo, hi) of integers or None, got {bands!r}") from None
    return _ranges("bands", bands, count).clamp(NO_LO, NO_HI)


def _check_each(name: str, values: Tensor, valid: Tensor, expected: str) -> None:
    if not bool(valid.all()):
        at = int((~valid).nonzero()[0])
        raise ValueError(f"{name}[{at}] must be {expected}, got {values[at].tolist()}")


def _check_within(name: str, ranges: Tensor, total_name: str, total: int) -> None:
    start, end = ranges.unbind(1)
    valid = (start >= 0) & (start <= end) & (end <= total)
    _check_each(name, ranges, valid, f"a range [start, end) with 0 <= start <= end <= {total_name} = {total}")


def _refuse_overlap(slices: Tensor) -> None:
    first, second = torch.ops.magi.slices_overlap(slices).tolist()
    if first < 0:
        return
    pair = slices[[first, second]].long()
    starts, ends = pair.amax(0).tolist(), pair.amin(0).tolist()
    row = max(starts[0], starts[2] - ends[5])  # the first row whose band reaches the first common key
    key = max(starts[2], row + starts[4])
    names = []
    for at, (q0, q1, k0, k1, lo, hi) in zip((first, second), pair.tolist()):
        bounds = (f"{lo} <= " if lo > NO_LO else "") + "k - q" + (f" <= {hi}" if hi < NO_HI else "")
        band = f", {bounds}" if bounds != "k - q" else ""
        names.append(f"slice {at} (rows [{q0}, {q1}), keys [{k0}, {k1}){band})")
    raise ValueError(
        f"slices must not overlap, got {names[0]} and {names[1]}, which both cover row {row}, key {key}: "
        f"attention would count that key twice"
    )


def _stack(*columns: Tensor | int) -> Tensor:
    """int32 [n, 6] from six columns, each int64 [n] or one value for all."""
    count = max(len(column) for column in columns if isinstance(column, Tensor))
    slices = torch.empty(count, 6, dtype=torch.int32)
    for at, column in enumerate(columns):
        slices[:, at] = column
    return slices


def _enumerate(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(owner, value) of every integer in every [begin[i], end[i]); int64 [sum of lengths] each."""
    counts = (end - begin).clamp(min=0)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    offset = torch.arange(len(owner)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return owner, begin[owner] + offset
