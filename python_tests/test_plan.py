"""A plan computes each allowed cell exactly once, moves each needed row exactly once, and all ranks agree."""

import dataclasses
import itertools
import json
import pickle
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magi_attention.mask import Mask
from magi_attention.plan import (
    Guests,
    HardwareProfile,
    Plan,
    PlanCache,
    PlanConfig,
    Stage,
    build_plan,
    build_plans,
    choose_stages,
    survey,
)


def rows_of(ranges: Tensor) -> Tensor:
    return torch.cat([torch.arange(begin, end) for begin, end in ranges.tolist()] or [torch.arange(0)])


def plan_all(mask: Mask, world_size: int, config: PlanConfig) -> list[Plan]:
    return [build_plan(mask, world_size=world_size, rank=rank, config=config) for rank in range(world_size)]


def received(senders: list[tuple[Stage | Guests, Tensor]], rank: int) -> Tensor:
    """Global ids of the rows that arrive at a rank, built only from what every sender's table says of its rows."""
    buffer = []
    for source, (table, rows) in enumerate(senders):
        sent = rows[rows_of(table.send_ranges)]
        counts = table.splits[0]
        assert len(sent) == int(counts.sum()) == len(table.send_rows)
        assert counts[rank] == senders[rank][0].splits[1, source]
        first = int(counts[:rank].sum())
        buffer.append(sent[first : first + int(counts[rank])])
    rows = torch.cat(buffer)
    table = senders[rank][0]
    assert len(rows) == int(table.splits[1].sum()) == len(table.recv_rows)
    return rows


def received_keys(plans: list[Plan], rank: int, stage: int, of: str = "stages") -> Tensor:
    return received([(getattr(p, of)[stage], rows_of(p.k_layout.ranges)) for p in plans], rank)


def received_guests(plans: list[Plan], rank: int) -> Tensor:
    tables = [(p.guests, rows_of(p.q_layout.ranges)) for p in plans if p.guests is not None]
    return received(tables, rank) if tables else torch.arange(0)


def check(mask: Mask, world_size: int, config: PlanConfig, moves: Tensor | None = None) -> list[Plan]:
    return check_plans(
        mask, [build_plan(mask, world_size=world_size, rank=r, config=config, moves=moves) for r in range(world_size)]
    )


def check_plans(mask: Mask, plans: list[Plan]) -> list[Plan]:
    """Every allowed cell is computed once, every row that a rank computes with is there once, all ranks agree."""
    for layouts, total in ([p.q_layout for p in plans], mask.total_q), ([p.k_layout for p in plans], mask.total_k):
        # Every row has one home, and every rank as many slots as any other.
        assert torch.equal(torch.cat([rows_of(x.ranges) for x in layouts]).sort().values, torch.arange(total))
        assert len({x.rows for x in layouts}) == 1
        for x in layouts:
            assert x.num_owned == len(rows_of(x.ranges)) <= x.rows == x.chunks.shape[1] * x.chunk
            assert torch.equal(x.chunks, layouts[0].chunks)

    dense = mask.dense()
    for of, counts_of in ("stages", "stage_rows"), ("backward_stages", "backward_stage_rows"):
        computed = torch.zeros(dense.shape, dtype=torch.int32)
        visits = torch.zeros(mask.total_q, dtype=torch.int64)
        for plan in plans:
            rank, stages, mine = plan.rank, getattr(plan, of), torch.zeros(dense.shape, dtype=torch.int32)
            rows, keys = rows_of(plan.q_layout.ranges), rows_of(plan.k_layout.ranges)
            guests = received_guests(plans, rank)
            buffers = [received_keys(plans, rank, stage, of) for stage in range(len(stages))]
            compute(mine, plan.slices, rows, keys)
            compute(mine, plan.guests and plan.guests.slices, guests, keys)
            for stage, buffer in zip(stages, buffers):
                compute(mine, stage.slices, rows, buffer)
                compute(mine, stage.guest_slices, guests, buffer)
            # What it needs of others it receives, each once and nothing else.
            for axis, own, came in (0, keys, torch.cat(buffers)), (1, rows, guests):
                needed = mine.any(axis).nonzero().flatten()
                assert torch.equal(came.sort().values, needed[~torch.isin(needed, own)])
            computed += mine
            visits[guests] += 1
            assert plan.area[rank] == mine.sum()
            assert plan.remote_rows[rank] == sum(map(len, buffers))
            assert getattr(plan, counts_of)[rank].tolist() == [len(buffer) for buffer in buffers]
            assert plan.guest_rows[rank] == len(guests)
            assert torch.equal(plan.statistics, plans[0].statistics)
            assert plan.guests is not None or torch.equal(mine[rows], dense[rows].int())
        assert torch.equal(computed, dense.int())
        for plan in plans:
            assert plan.returned_rows[plan.rank] == visits[rows_of(plan.q_layout.ranges)].sum()
    assert [len(plans[0].stages), len(plans[0].backward_stages)] == plans[0].config.stage_counts
    return plans


def compute(cells: Tensor, slices: Tensor | None, rows: Tensor, keys: Tensor) -> None:
    """Counts in `cells` what slices of these rows and keys allow."""
    for q0, q1, k0, k1, lo, hi in [] if slices is None else slices.tolist():
        diagonal = torch.arange(k0, k1) - torch.arange(q0, q1)[:, None]
        cells[rows[q0:q1][:, None], keys[k0:k1]] += ((diagonal >= lo) & (diagonal <= hi)).int()


MASKS = {
    "full": Mask.full(64),
    "causal": Mask.causal(101),
    "documents": Mask.varlen([0, 3, 50, 51, 90, 128]),
    "documents in both directions": Mask.varlen([0, 17, 64, 90], causal=False),
    "window": Mask.sliding_window(100, 7, 3),
    "windows with global tokens": Mask.varlen([0, 40, 97], window=(5, 0), global_tokens=3),
    "prefix": Mask.prefix_lm(77, 20),
    "blocks": Mask.block_causal(100, 16),
    "tree": Mask.tree([-1, 0, 0, 1], [20, 20, 20, 11]),
    "cross attention": Mask.full(30, 50),
    "cross attention, fewer keys": Mask.from_slices([[0, 40], [40, 90]], [[0, 9], [9, 21]], ["causal", "full"]),
    "fewer rows than ranks": Mask.full(3),
    "nothing": Mask.varlen([0]),
    "rows without keys": Mask.from_slices([[10, 20]], [[0, 5]], "full", total_q=64, total_k=64),
}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", MASKS)
def test_every_cell_once(name: str, world_size: int) -> None:
    for chunk in (1, 5, 16):
        check(MASKS[name], world_size, PlanConfig(chunk=chunk, stages=3, backward_stages=2))


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """Random bands in the cells of a random grid: they cannot overlap, and anything else may happen."""
    q_cuts = sorted(draw(st.lists(st.integers(0, 90), min_size=2, max_size=6)))
    k_cuts = sorted(draw(st.lists(st.integers(0, 90), min_size=2, max_size=4)))
    q_ranges, k_ranges, bands = [], [], []
    bound = st.none() | st.integers(-60, 60)
    for q in itertools.pairwise(q_cuts):
        for k in itertools.pairwise(k_cuts):
            if draw(st.booleans()):
                q_ranges.append(q)
                k_ranges.append(k)
                bands.append((draw(bound), draw(bound)))
    total_q = q_cuts[-1] + draw(st.integers(0, 10))
    total_k = total_q if draw(st.booleans()) and k_cuts[-1] <= total_q else k_cuts[-1] + draw(st.integers(0, 10))
    if not q_ranges:
        return Mask.from_slices([[0, 0]], [[0, 0]], "full", total_q=total_q, total_k=total_k)
    return Mask.from_bands(q_ranges, k_ranges, bands, total_q=total_q, total_k=total_k)


@st.composite
def moves(draw: st.DrawFn, mask: Mask, world_size: int) -> Tensor:
    """Random disjoint rectangles, each for a random rank."""
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=4))}) for n in (mask.total_q, mask.total_k)]
    rectangles = [
        (*q, *k, draw(st.integers(0, world_size - 1)))
        for q in itertools.pairwise(cuts[0])
        for k in itertools.pairwise(cuts[1])
        if draw(st.booleans())
    ]
    return torch.tensor(rectangles, dtype=torch.int32).reshape(-1, 5)


# A slow link, so that moving rows instead of keys is worth it even for masks as small as these.
SLOW = HardwareProfile(flops=1e9, bandwidth=1e6, launch=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    masks(),
    st.integers(1, 16),
    st.integers(1, 40),
    st.integers(1, 4),
    st.none() | st.integers(1, 4),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.sampled_from(["keys", "auto"]),
)
def test_every_cell_once_on_random_masks(
    mask: Mask, world_size: int, chunk: int, stages: int, backward_stages: int | None, spare: float, movement: str
) -> None:
    config = PlanConfig(
        chunk=chunk,
        stages=stages,
        backward_stages=backward_stages,
        spare=spare,
        movement=movement,
        heads=(8, 8),
        profile=SLOW,
    )
    check(mask, world_size, config)


@settings(max_examples=100, deadline=None)
@given(st.data(), masks(), st.integers(1, 9), st.integers(1, 40), st.integers(1, 4))
def test_any_rectangle_may_be_computed_anywhere(
    data: st.DataObject, mask: Mask, world_size: int, chunk: int, stages: int
) -> None:
    config = PlanConfig(chunk=chunk, stages=stages, movement="auto")
    check(mask, world_size, config, data.draw(moves(mask, world_size)))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(masks(), min_size=2, max_size=3),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from(["keys", "auto"]),
    st.booleans(),
)
def test_every_cell_once_where_masks_share_rows(
    several: list[Mask], world_size: int, chunk: int, stages: int, movement: str, joint: bool
) -> None:
    """Planned together, or later ones on the layout of the first."""
    total_q, total_k = (max(getattr(mask, name) for mask in several) for name in ("total_q", "total_k"))
    several = [_grown(mask, total_q, total_k) for mask in several]
    config = PlanConfig(chunk=chunk, stages=stages, movement=movement, heads=(8, 8), profile=SLOW)
    ranks = range(world_size)
    if joint:
        weights = [1.0 + i for i in range(len(several))]
        plans = [build_plans(several, weights=weights, world_size=world_size, rank=r, config=config) for r in ranks]
    else:
        first = plan_all(several[0], world_size, config)
        later = [
            [build_plan(m, world_size=world_size, rank=r, config=config, layout_of=first[r]) for m in several[1:]]
            for r in ranks
        ]
        plans = [(one, *others) for one, others in zip(first, later)]
    for mask, of_mask in zip(several, zip(*plans)):
        assert all(plan.q_layout is mine[0].q_layout for plan, mine in zip(of_mask, plans))
        check_plans(mask, list(of_mask))


def _grown(mask: Mask, total_q: int, total_k: int) -> Mask:
    q, k, bands = mask.slices[:, :2], mask.slices[:, 2:4], mask.slices[:, 4:]
    return Mask.from_bands(q, k, bands, total_q=total_q, total_k=total_k)


@pytest.mark.parametrize("name", ["documents", "prefix", "cross attention", "rows without keys"])
def test_attention_in_stages_is_attention(name: str) -> None:
    """All ranks in one process: partial results of the stages, merged, are attention under the whole mask."""
    mask, config = MASKS[name], PlanConfig(chunk=8, stages=2)
    random = torch.Generator().manual_seed(0)
    q = torch.randn(mask.total_q, 2, 16, generator=random, dtype=torch.float64)
    k, v = torch.randn(2, mask.total_k, 1, 16, generator=random, dtype=torch.float64)
    out, lse = torch.ops.magi.ffa.slices(q, k, v, mask.slices)
    plans = plan_all(mask, 4, config)
    for plan in plans:
        rows, own = rows_of(plan.q_layout.ranges), rows_of(plan.k_layout.ranges)
        partial = torch.ops.magi.ffa.slices(q[rows], k[own], v[own], plan.slices)
        for number, stage in enumerate(plan.stages):
            keys = received_keys(plans, plan.rank, number)
            partial = torch.ops.magi.merge_partials(
                *partial, *torch.ops.magi.ffa.slices(q[rows], k[keys], v[keys], stage.slices)
            )
        torch.testing.assert_close(partial[0], out[rows], rtol=0, atol=1e-12)
        torch.testing.assert_close(partial[1], lse[rows], rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(masks(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 20), st.integers(1, 3), st.integers(1, 3))
def test_relayed_rows_cross_once_and_are_attention(
    mask: Mask, nodes: int, node_size: int, chunk: int, stages: int, backward_stages: int
) -> None:
    config = PlanConfig(chunk=chunk, stages=stages, backward_stages=backward_stages, node_size=node_size)
    plans = plan_all(mask, nodes * node_size, config)
    dense = mask.dense()
    local = [torch.full((plan.k_layout.rows,), -1) for plan in plans]
    for plan, rows in zip(plans, local):
        own = rows_of(plan.k_layout.ranges)
        rows[: len(own)] = own

    def exchange(held: list[Tensor], groups: list[list[int]], hops: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Rows that arrive at each rank, by what the senders' ranges and splits say."""
        received: list[list[Tensor]] = [[] for _ in plans]
        for group in groups:
            for source in group:
                ranges, splits = hops[source]
                for target, rows in zip(group, held[source][rows_of(ranges)].split(splits[0].tolist())):
                    received[target].append(rows)
                for target in group:
                    assert splits[0, group.index(target)] == hops[target][1][1, group.index(source)]
        return [torch.cat(parts) for parts in received]

    node_groups = [list(range(node * node_size, (node + 1) * node_size)) for node in range(nodes)]
    place_groups = [list(range(place, nodes * node_size, node_size)) for place in range(node_size)]
    for passes in [plan.stages for plan in plans], [plan.backward_stages for plan in plans]:
        computed = torch.zeros(dense.shape, dtype=torch.int32)
        crossings = torch.zeros(nodes, mask.total_k, dtype=torch.int32)
        arrivals = torch.zeros(nodes * node_size, mask.total_k, dtype=torch.int32)
        for number in range(-1, len(passes[0])):
            buffers = local
            tables = [of_rank[number] for of_rank in passes]
            if number >= 0:
                held = local
                assert (tables[0].relay_ranges is None) == (number == 0 and len(passes[0]) > 1)
                if tables[0].relay_ranges is not None:
                    hops = [(table.relay_ranges, table.relay_splits) for table in tables]
                    relayed = exchange(local, place_groups, hops)  # type: ignore[arg-type]
                    for rank, rows in enumerate(relayed):
                        table = tables[rank]
                        assert len(rows) == len(table.relay_rows)  # type: ignore[arg-type]
                        assert len(table.relay_send_rows) == int(table.relay_splits[0].sum())  # type: ignore
                        crossings[rank // node_size].index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
                    held = [torch.cat(pair) for pair in zip(local, relayed)]
                buffers = exchange(held, node_groups, [(table.send_ranges, table.splits) for table in tables])
                for rank, rows in enumerate(buffers):
                    assert len(rows) == len(tables[rank].recv_rows)
                    arrivals[rank].index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
            for rank, plan in enumerate(plans):
                rows = rows_of(plan.q_layout.ranges)
                for q0, q1, k0, k1, lo, hi in (plan.slices if number < 0 else tables[rank].slices).tolist():
                    diagonal = torch.arange(k0, k1) - torch.arange(q0, q1)[:, None]
                    computed[rows[q0:q1][:, None], buffers[rank][k0:k1]] += ((diagonal >= lo) & (diagonal <= hi)).int()
        assert torch.equal(computed, dense.int())
        for members, counts in [*zip(node_groups, crossings), *(([r], counts) for r, counts in enumerate(arrivals))]:
            # Rows that are needed here and live elsewhere come once, and nothing else does.
            needed = dense[torch.cat([rows_of(plans[r].q_layout.ranges) for r in members])].any(0)
            needed[torch.cat([rows_of(plans[r].k_layout.ranges) for r in members])] = False
            assert torch.equal(counts, needed.int())
    statistics = plans[0].statistics
    for plan in plans:
        assert torch.equal(plan.statistics, statistics)
        assert plan.stage_rows[plan.rank].tolist() == [len(stage.recv_rows) for stage in plan.stages]
        assert plan.backward_stage_rows[plan.rank].tolist() == [len(stage.recv_rows) for stage in plan.backward_stages]


def test_contiguous_rows_need_few_slices() -> None:
    plan = build_plan(Mask.sliding_window(4096, 63, 0), world_size=4, rank=1, config=PlanConfig(chunk=64, stages=1))
    assert plan.q_layout.ranges.shape[0] == 1
    assert len(plan.slices) == 1 and len(plan.stages[0].slices) == 1
    assert plan.remote_rows.max() == 63


@pytest.mark.parametrize("node_size", [None, 2])
def test_plan_is_a_value(node_size: int | None) -> None:
    config = PlanConfig(node_size=node_size)
    mask = Mask.varlen([0, 100, 300, 512])
    plan, again = (build_plan(mask, world_size=4, rank=2, config=config) for _ in range(2))
    other = build_plan(Mask.varlen([0, 100, 301, 512]), world_size=4, rank=2, config=config)
    assert plan == again and hash(plan) == hash(again)
    assert plan != other and plan != build_plan(mask, world_size=4, rank=1, config=config)
    with pytest.raises(AttributeError):
        plan.slices = other.slices  # type: ignore[misc]
    for copy in pickle.loads(pickle.dumps(plan)), plan.to("cpu"):
        assert copy == plan and copy.q_layout is copy.k_layout
        for table in [copy.slices, copy.q_layout.ranges, *(s.recv_rows for s in copy.stages)]:
            assert table._dynamo_unbacked_indices == {0}


def test_cache_is_bounded() -> None:
    cache = PlanCache(capacity=2)
    plans = [cache.build_plan(Mask.causal(n), world_size=2, rank=0) for n in (10, 20, 30)]
    assert len(cache) == 2
    assert cache.build_plan(Mask.causal(30), world_size=2, rank=0) is plans[2]
    assert cache.build_plan(Mask.causal(30), world_size=2, rank=1) is not plans[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 0, "rank": 0}, "world_size must be at least 1, got 0"),
        ({"world_size": 4, "rank": 4}, r"rank must be in \[0, 4\), got 4"),
        (
            {"world_size": 4, "rank": 0, "config": PlanConfig(node_size=3)},
            "node_size must divide the world size 4, got 3",
        ),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_plan(Mask.causal(16), **arguments)


def test_config_errors_name_the_field() -> None:
    for bad in (
        {"chunk": 0},
        {"stages": 0},
        {"backward_stages": 65},
        {"node_size": 0},
        {"heads": (8, 0)},
        {"head_dim": 0},
        {"spare": -1.0},
        {"slack": -1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PlanConfig(**bad)  # type: ignore[arg-type]


def brute_force_overlap(slices: Tensor) -> bool:
    covered = torch.zeros(64, 64, dtype=torch.int32)
    for q0, q1, k0, k1, lo, hi in slices.tolist():
        diagonal = torch.arange(k0, k1) - torch.arange(q0, q1)[:, None]
        covered[q0:q1, k0:k1] += ((diagonal >= lo) & (diagonal <= hi)).int()
    return bool((covered > 1).any())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 30)] * 4, st.integers(-40, 40), st.integers(-40, 40)), max_size=8))
def test_overlap_is_found(rows: list[tuple[int, ...]]) -> None:
    table = [(q, q + h, k, k + w, lo, hi) for q, h, k, w, lo, hi in rows]
    slices = torch.tensor(table, dtype=torch.int32).reshape(-1, 6)
    first, second = torch.ops.magi.slices_overlap(slices).tolist()
    assert (first >= 0) == brute_force_overlap(slices)
    if first >= 0:
        assert first < second and brute_force_overlap(slices[[first, second]])


def test_area_of_slices() -> None:
    mask = MASKS["windows with global tokens"]
    assert torch.ops.magi.slices_area(mask.slices).sum() == mask.dense().sum()


def test_layouts_can_serve_several_masks() -> None:
    window, causal = Mask.sliding_window(300, 20, 0), Mask.causal(300)
    first = plan_all(causal, 4, PlanConfig(chunk=16))
    plans = [build_plan(window, world_size=4, rank=r, layout_of=first[r]) for r in range(4)]
    for plan, base in zip(plans, first):
        assert plan.q_layout is base.q_layout
        assert plan != base
    assert sum(int(plan.area[plan.rank]) for plan in plans) == window.area()
    with pytest.raises(ValueError, match="layout_of must have world_size, total_q, total_k"):
        build_plan(Mask.causal(301), world_size=4, rank=0, layout_of=first[0])


@pytest.mark.parametrize("node_size", [None, 2])
@pytest.mark.parametrize("name", MASKS)
def test_survey_agrees_with_every_rank(name: str, node_size: int | None) -> None:
    config = PlanConfig(chunk=8, stages=2, node_size=node_size)
    plans, overview = plan_all(MASKS[name], 4, config), survey(MASKS[name], world_size=4, config=config)
    assert overview.imbalance == pytest.approx(plans[0].imbalance)
    assert torch.equal(overview.remote_rows, plans[0].remote_rows)
    for plan in plans:
        first = 0 if node_size is None else plan.rank // node_size * node_size
        peers = slice(first, first + (node_size or 4))
        assert torch.equal(overview.rows[:, plan.rank, peers], torch.stack([s.splits[0] for s in plan.stages]))
        assert torch.equal(overview.rows[:, peers, plan.rank], torch.stack([s.splits[1] for s in plan.stages]))
        parts = [plan.slices] + [s.slices for s in plan.stages]
        assert overview.pieces[plan.rank].tolist() == [len(part) for part in parts]
        assert overview.areas[plan.rank].tolist() == [int(torch.ops.magi.slices_area(part).sum()) for part in parts]


def test_timeline_waits_for_what_it_computes_with() -> None:
    overview = survey(Mask.causal(4096), world_size=4, config=PlanConfig(stages=3))
    for spans in overview.timeline():
        arrived = {span.stage: span.end for span in spans if span.kind == "receive"}
        computes = [span for span in spans if span.kind == "compute"]
        assert [span.stage for span in computes] == [0, 1, 2, 3]
        for before, after in itertools.pairwise(computes):
            assert after.begin == max(before.end, arrived[after.stage])
    assert overview.step_time == max(spans[-1].end for spans in overview.timeline())


def test_stages_are_chosen_by_predicted_time() -> None:
    slow = PlanConfig(profile=HardwareProfile(flops=600e12, bandwidth=20e9, launch=1e-6))
    masks = [Mask.causal(65536)]
    chosen = choose_stages(masks, world_size=8, config=slow)
    surveys = [survey(masks[0], world_size=8, config=slow.replace(stages=s)) for s in range(1, 7)]
    for count, times in (
        (chosen.stages, [overview.step_time for overview in surveys]),
        (chosen.backward_stages, [overview.backward_time for overview in surveys]),
    ):
        assert times[count - 1] == min(times) < times[0]


def test_backward_is_divided_for_itself() -> None:
    """Its last gradients travel alone, and it computes longer: another division hides more."""
    config = PlanConfig(stages=3, heads=(8, 8), profile=HardwareProfile(bandwidth=40e9, launch=1e-6))
    overview = survey(Mask.full(65536), world_size=8, config=config)
    as_forward = dataclasses.replace(overview, backward_rows=overview.rows, backward_work=overview.work)
    assert overview.backward_time < 0.9 * as_forward.backward_time
    for spans in overview.backward_timeline():
        ends = {(span.kind, span.stage): span for span in spans}
        for stage in range(1, 4):
            computed = ends["compute", stage]
            assert ends["receive", stage].end <= computed.begin and computed.end <= ends["return", stage].begin


def test_drawing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mask = MASKS["documents"]
    build_plan(mask, world_size=4, rank=1).draw(mask, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    survey(MASKS["cross attention"], world_size=20).draw(tmp_path / "plan.svg")
    assert b"<svg" in (tmp_path / "plan.svg").read_bytes()


@pytest.mark.parametrize(
    "mask",
    [
        "causal",
        {"cu_seqlens": [0, 100, 512], "causal": False},
        {"q_ranges": [[0, 4]], "k_ranges": [[0, 4]], "types": ["causal"]},
        {"slices": [[0, 4, 0, 4, -1, 0]], "total_q": 4, "total_k": 4},
    ],
)
def test_command_prints_the_table(
    mask: str | dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if isinstance(mask, dict):
        (tmp_path / "mask.json").write_text(json.dumps(mask))
        mask = str(tmp_path / "mask.json")
    monkeypatch.setattr(sys, "argv", ["plan", mask, "--total", "4096", "--world-size", "2", "--stages", "0"])
    runpy.run_module("magi_attention.plan", run_name="__main__")
    printed = capsys.readouterr().out
    assert "area imbalance" in printed and "remote rows, worst rank" in printed


def test_one_layout_for_several_masks() -> None:
    window, causal = Mask.sliding_window(2048, 63, 0), Mask.causal(2048)
    config = PlanConfig(chunk=32, profile=HardwareProfile(flops=6e13))  # areas matter, even of masks this small
    plans = [build_plans([window, causal], weights=[5, 1], world_size=4, rank=r, config=config) for r in range(4)]
    for both in plans:
        assert both[0].q_layout is both[1].q_layout is both[0].k_layout
    mostly_window, mostly_causal = (
        build_plans([window, causal], weights=weights, world_size=4, rank=0, config=config)
        for weights in ([1000, 1], [1, 1000])
    )
    assert mostly_window[0].remote_rows.sum() < mostly_causal[0].remote_rows.sum()
    assert mostly_causal[1].imbalance < 1.02 < mostly_window[1].imbalance


def test_keys_of_cross_attention_live_where_they_are_needed() -> None:
    blocks = [[100 * i, 100 * (i + 1)] for i in range(4)], [[20 * i, 20 * (i + 1)] for i in range(4)]
    mask = Mask.from_slices(*blocks, "full")
    plans = check(mask, 4, PlanConfig(chunk=50))
    assert plans[0].remote_rows.sum() == 0 or plans[0].k_layout.chunk > 20


@pytest.mark.parametrize(
    ("masks", "weights", "message"),
    [
        ([], None, "masks must hold at least one"),
        ([Mask.causal(8)], [0.0], "weights must be one positive number"),
        ([Mask.causal(8)], [1, 2], "weights must be one positive number"),
        ([Mask.causal(8), Mask.causal(9)], None, "masks must have equal lengths"),
    ],
)
def test_errors_of_several_masks(masks: list[Mask], weights: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_plans(masks, weights=weights, world_size=2, rank=0)
