"""Does the harness fail where it should? A rank that raises, one that hangs, one that dies; and go on afterwards."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from dist_harness import run


def case_sum(x):
    total = torch.tensor(x + dist.get_rank())
    dist.all_reduce(total)
    return total.item()


def case_raise():
    if dist.get_rank() == 1:
        raise KeyError("lost")
    dist.barrier()


def case_hang():
    if dist.get_rank() == 0:
        time.sleep(60)


def case_die():
    if dist.get_rank() == 1:
        os._exit(3)


def test_failures_name_the_rank_and_where_the_others_were():
    assert run(2, case_sum, 10) == [21, 21]
    with pytest.raises(
        AssertionError, match=r"(?s)rank 1 failed:.*KeyError: 'lost'.*rank 0 did not finish:.*case_raise"
    ):
        run(2, case_raise)
    assert run(2, case_sum, 1) == [3, 3]
    with pytest.raises(AssertionError, match=r"(?s)rank 0 did not finish:.*in case_hang"):
        run(2, case_hang, timeout=1)
    with pytest.raises(AssertionError, match="rank 1 failed:\nthe process ended, exit code 3"):
        run(2, case_die)
