"""Joining a job of one process."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from megarq.errors import FaultError
from megarq.launch.environment import LaunchEnvironment, read_environment
from megarq.launch.process_group import joined

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def environment_is_put_back(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_alone_is_a_group_of_one():
    with joined(read_environment({}), CPU):
        assert dist.get_world_size() == 1


def test_variables_are_completed_for_libraries_that_read_them():
    with joined(read_environment({}), CPU):
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]
        assert "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ


def test_the_group_is_destroyed_where_the_body_fails():
    with pytest.raises(RuntimeError, match="body"), joined(read_environment({}), CPU):
        raise RuntimeError("body")
    assert not dist.is_initialized()


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = LaunchEnvironment(0, 2, 0, "127.0.0.1", port, "torchrun or deepspeed")
        with pytest.raises(FaultError, match=f"127.0.0.1:{port}.*Choose a free port"), joined(place, CPU):
            pass
