"""Real DTensors: fused backends refuse them, eager mode follows torch's sharding rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from bench.subject import OPS, subject
from support.tensors import rows
from swathe.kernels.core.contract import Problem
from swathe.kernels.norm.api import rms_norm

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the mesh is of CPUs")


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def one_sharded(problem: Problem, name: str, mesh: DeviceMesh) -> Problem:
    """The problem with one of its inputs spread over the mesh."""
    sharded = distribute_tensor(problem.inputs[name], mesh, [Shard(0)])
    return replace(problem, inputs={**problem.inputs, name: sharded})


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_every_input_of_every_op_is_refused(op: str, grad: bool, mesh: DeviceMesh) -> None:
    of = subject(op)
    problem = of.draw(of.tiny[0], torch.float32, of.forms[0], "cpu", 0)
    for name in problem.inputs:
        with pytest.raises(TypeError, match=r"given a DTensor.*to_local"):
            one_sharded(problem, name, mesh).run(of.contract.on("triton"), backward=grad)


@pytest.mark.parametrize("op", OPS)
def test_compiled_code_does_not_gather_either(op: str, mesh: DeviceMesh) -> None:
    of = subject(op)
    problem = of.draw(of.tiny[0], torch.float32, of.forms[0], "cpu", 0)
    compiled = torch.compile(of.contract.on("triton"), fullgraph=True, backend="aot_eager")
    sharded = one_sharded(problem, next(iter(problem.inputs)), mesh)
    with pytest.raises(TorchDynamoException, match=f"swathe.*{op}.*DTensor"):
        sharded.run(compiled, backward=False)


def test_eager_keeps_the_placements(mesh: DeviceMesh) -> None:
    x, weight = rows(4, 16), rows(16, seed=1)

    def spread(t: Tensor, placement: Shard | Replicate) -> Tensor:
        return distribute_tensor(t, mesh, [placement])

    y = rms_norm(spread(x, Shard(0)), spread(weight, Replicate()), implementation="eager")
    assert isinstance(y, DTensor) and y.placements == (Shard(0),)
    assert torch.equal(y.to_local(), rms_norm(x, weight, implementation="eager"))
