"""Do rows get where the plan says, and their gradients back? All of it bitwise."""

import pytest
import torch
import torch.distributed as dist
from dist_data import local, plan_here, rows_of
from dist_harness import run
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from magi_attention import Mask
from magi_attention.dist import dispatch, position_ids, roll, undispatch

# Length and spare slots: ragged, even, fewer rows than ranks, one row, several slots a rank, unequal shares.
LAYOUTS = ((61, 0.0), (64, 0.0), (3, 0.0), (1, 0.0), (128, 0.0), (200, 0.5))


def sequence(total, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (total, 3), generator=g).double().requires_grad_()  # sums are exact in any order


def case_round_trip():
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for total, spare in LAYOUTS:
        plan = plan_here(Mask.causal(total), spare=spare)
        layout, group = plan.q_layout, dist.group.WORLD
        x, weight = sequence(total), sequence(total, seed=1).detach()
        y = dispatch(x, plan, group)
        assert torch.equal(y, local(x, layout))
        assert torch.equal(undispatch(y, plan, group), x)
        assert torch.equal(dispatch(x.long(), plan, group), y.long())
        positions = position_ids(plan, "cpu")
        assert positions.dtype == torch.int64 and positions.shape == (layout.rows,)
        assert torch.equal(positions[: layout.num_owned], rows_of(layout))
        assert not positions[layout.num_owned :].any()

        # Gradients of dispatch: every rank weighs its own rows, and padding, which counts for nothing.
        w = local(weight, layout)
        w[layout.num_owned :] = 5
        (whole,) = torch.autograd.grad(y, x, w)
        assert torch.equal(whole, weight)
        (part,) = torch.autograd.grad(dispatch(x, plan, group, grad="partial"), x, w)
        mine = torch.zeros(total, dtype=torch.bool)
        mine[rows_of(layout)] = True
        assert torch.equal(part, weight * mine[:, None])

        # Gradients of undispatch: the same loss on every rank, or a share of it.
        rows = y.detach().requires_grad_()
        (dy,) = torch.autograd.grad(undispatch(rows, plan, group), rows, weight)
        assert torch.equal(dy, local(weight, layout))
        (dy,) = torch.autograd.grad(undispatch(rows, plan, group, grad="partial"), rows, weight * (rank + 1))
        assert torch.equal(dy, local(weight, layout) * sum(range(world_size + 1)))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_round_trip(world_size):
    run(world_size, case_round_trip)


def case_roll():
    for total, spare in LAYOUTS:
        plan = plan_here(Mask.causal(total), spare=spare)
        layout, group = plan.q_layout, dist.group.WORLD
        x, weight = sequence(total).detach(), sequence(total, seed=1).detach()
        rows = local(x, layout)
        rows[layout.num_owned :] = 5  # never enters
        rows.requires_grad_()
        for shift in (0, 1, -1, 17, total, -3 * total - 2):
            y = roll(rows, shift, plan, group)
            assert torch.equal(y, local(torch.roll(x, shift, 0), layout))
            (dx,) = torch.autograd.grad(y, rows, local(weight, layout))
            assert torch.equal(dx, local(torch.roll(weight, -shift, 0), layout))
        assert torch.equal(roll(rows.long(), -1, plan, group), local(torch.roll(x, -1, 0), layout).long())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_roll(world_size):
    run(world_size, case_roll)


def case_shards():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for total, spare in LAYOUTS:
        plan = plan_here(Mask.causal(total), spare=spare)
        x, weight = sequence(total).detach(), sequence(total, seed=1).detach()
        sharded = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
        y = dispatch(sharded, plan, mesh)
        assert torch.equal(y, local(x, plan.q_layout))
        (dx,) = torch.autograd.grad(y, sharded, local(weight, plan.q_layout))
        assert dx.placements == (Shard(0),) and torch.equal(dx.full_tensor(), weight)


@pytest.mark.parametrize("world_size", [1, 4])
def test_dispatch_of_shards(world_size):
    run(world_size, case_shards)


def case_cross_attention():
    plan = plan_here(Mask.full(20, 50))
    x = sequence(50).detach()
    keys = dispatch(x, plan.k_layout, dist.group.WORLD)
    assert torch.equal(keys, local(x, plan.k_layout))
    assert torch.equal(undispatch(keys, plan.k_layout, dist.group.WORLD), x)


def test_keys_of_cross_attention():
    run(2, case_cross_attention)


def case_refusals():
    plan, group = plan_here(Mask.causal(64)), dist.group.WORLD
    x = torch.zeros(64, 2)
    for call, message in (
        (lambda: dispatch(x[:-1], plan, group), r"x must have the sequence's 64 rows, got \[63, 2\]"),
        (lambda: dispatch(x, plan, group, grad="sum"), "grad must be 'replicated' or 'partial', got 'sum'"),
        (lambda: undispatch(x, plan, group), r"x must have the 32 rows of this rank, got \[64, 2\]"),
        (lambda: roll(x, 1, plan, group), r"x must have the 32 rows of this rank, got \[64, 2\]"),
        (lambda: dispatch(x.to("meta"), plan, group), r"plan.to\('meta'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_refusals():
    run(2, case_refusals)


def case_traced():
    total = 61
    plan = plan_here(Mask.causal(total))
    layout, group = plan.q_layout, dist.group.WORLD

    @torch.compile(fullgraph=True, backend="aot_eager")
    def there_and_back(x):
        y = roll(dispatch(x, plan, group, grad="partial"), 1, plan, group)
        return undispatch(y * 2, plan, group, grad="partial"), position_ids(plan, "cpu")

    x, weight = sequence(total), sequence(total, seed=1).detach()
    y, positions = there_and_back(x)
    assert torch.equal(y, 2 * torch.roll(x, 1, 0)) and torch.equal(positions, position_ids(plan, "cpu"))
    (dx,) = torch.autograd.grad(y, x, weight)
    dist.all_reduce(dx)
    assert torch.equal(dx, 2 * dist.get_world_size() * torch.roll(weight, -1, 0))
    assert layout.num_owned <= layout.rows


def test_traced():
    run(2, case_traced)


def case_every_length(function, grad):
    """One graph for all lengths, with the values and gradients of eager."""
    group = dist.group.WORLD

    def move(x, plan):
        if function == "roll":
            return roll(x, -1, plan, group)
        return {"dispatch": dispatch, "undispatch": undispatch}[function](x, plan, group, grad=grad)

    compiled = torch.compile(move, fullgraph=True, backend="aot_eager")
    for total in (64, 80, 33, 7, 130, 2):
        plan = plan_here(Mask.causal(total), spare=0.25)
        rows = total if function == "dispatch" else plan.q_layout.rows
        x, wrong = (torch.randn(n, 3).requires_grad_() for n in (rows, rows + 1))
        for tensor in (x, wrong):
            torch._dynamo.mark_dynamic(tensor, 0)
        got, want = compiled(x, plan), move(x, plan)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        weight = torch.randn_like(want)
        grads = [torch.autograd.grad(y, x, weight)[0] for y in (got, want)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)
    graphs = counters["stats"]["unique_graphs"]
    with pytest.raises(Exception, match=r"plan\.q_layout\.(local|sequence)_rows"):
        compiled(wrong, plan)
    dist.barrier()  # nobody is left in a launch
    return graphs


@pytest.mark.parametrize(
    "function, grad",
    [
        ("dispatch", "replicated"),
        ("dispatch", "partial"),
        ("undispatch", "replicated"),
        ("undispatch", "partial"),
        ("roll", ""),
    ],
)
def test_one_graph_for_all_lengths(function, grad):
    assert run(2, case_every_length, function, grad, timeout=240) == [1, 1]
