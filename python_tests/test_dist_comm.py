"""Do the communication ops keep torch's contracts?"""

import pytest
import torch
import torch.distributed as dist
from dist_harness import run
from torch.library import opcheck

import magi_attention.dist  # noqa: F401

ops = torch.ops.magi


def case_ops():
    """Every rank sends its last rank + 1 rows to the other one, and nothing to itself; then nobody sends anything."""
    rank, group = dist.get_rank(), dist.group.WORLD.group_name
    x = torch.arange(6.0).reshape(3, 2) + 10 * rank
    mine, theirs = rank + 1, 2 - rank
    splits = torch.zeros(2, 2, dtype=torch.int64)
    splits[0, 1 - rank], splits[1, 1 - rank] = mine, theirs
    ranges = torch.tensor([[3 - mine, 3]], dtype=torch.int32)
    call = (x, ranges, splits, group, theirs)
    arrived = torch.ops._c10d_functional.wait_tensor(ops.group_cast(*call))
    assert torch.equal(arrived, (torch.arange(6.0).reshape(3, 2) + 10 * (1 - rank))[3 - theirs :])
    returned = torch.ops._c10d_functional.wait_tensor(ops.group_reduce([arrived, 2 * arrived], splits, group, mine))
    assert torch.equal(returned, torch.cat([x[3 - mine :], 2 * x[3 - mine :]], 1))

    nothing = (x, ranges[:0], torch.zeros(2, 2, dtype=torch.int64), group, 0, [x])
    # An un-waited result cannot be compared: opcheck's other tests.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for arguments in (call, nothing):
        opcheck(ops.group_cast.default, arguments, test_utils=tests)
    opcheck(ops.group_reduce.default, ([arrived, arrived], splits, group, mine, [x]), test_utils=tests)
    opcheck(ops.group_reduce.default, ([x[:0]], nothing[2], group, 0), test_utils=tests)
    blocks = torch.tensor([[0], [1]], dtype=torch.int32)
    opcheck(ops.move_rows.default, (x, blocks, blocks.flip(0), 3, 3, 6, 3, 1, rank, group))

    owned = torch.tensor([[1, 3]], dtype=torch.int32)
    opcheck(ops.take_rows.default, (x, owned, 2, 4))
    opcheck(ops.return_rows.default, (x, owned, 2, 5))
    opcheck(ops.sequence_order.default, (owned, torch.tensor([[1, 2], [0, -1]], dtype=torch.int32), 2, 5))

    needs_grad = x.clone().requires_grad_()
    with pytest.raises(
        RuntimeError, match="group_cast is a raw kernel and not differentiable, but x requires a gradient"
    ):
        ops.group_cast(needs_grad, *call[1:])
    with pytest.raises(RuntimeError, match="group_reduce is a raw kernel and not differentiable, but parts requires"):
        ops.group_reduce([needs_grad], splits, group, mine)
    with pytest.raises(ValueError, match="splits must receive the 7 rows of the buffer"):
        ops.group_cast(*call[:4], 7)
    with pytest.raises(ValueError, match="splits must be an int64 tensor"):
        ops.group_cast(x, ranges, splits.int(), group, theirs)


def test_ops():
    run(2, case_ops)
