"""A process group begins and ends with its block, and gathering is exact. Many processes: see test_step."""

import pytest
import torch
import torch.distributed as dist

from grr.parallel.process_group import all_sum, default_device, gather, process_group


def test_a_group_begins_and_ends_with_its_block():
    with process_group() as device:
        assert device == default_device()
        assert (dist.is_initialized(), dist.get_world_size()) == (True, 1)
    assert not dist.is_initialized()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block_ends_the_group_of_one_process(error):
    with pytest.raises(error), process_group():
        raise error
    assert not dist.is_initialized()


def test_a_group_that_exists_is_used_and_left():
    with process_group() as device:
        with process_group() as inner:
            assert inner == device
        assert all_sum(1) == [1]


def test_gathering_in_one_process_is_the_identity_with_its_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    with process_group():
        gather(x).square().sum().backward()
        assert all_sum(1, 2.5) == [1, 2.5]
    torch.testing.assert_close(x.grad, 2 * x.detach())
