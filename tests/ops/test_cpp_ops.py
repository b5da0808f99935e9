"""Every op of the C++ library: the contract on each instruction set, threads that change no bit."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from support.tensors import instruction_sets
from swathe.kernels.catalog import OPS
from swathe.kernels.core import cpp
from swathe.kernels.core.contract import Contract, Outputs, check
from swathe.kernels.core.registry import registered

pytestmark = pytest.mark.skipif(
    cpp.why_unavailable() is not None, reason=f"backend cpp: {cpp.why_unavailable()}"
)


def contracts() -> dict[str, Contract]:
    """The contract of each op that has a backend "cpp"."""
    found = {}
    for op, api in OPS.items():
        import_module(api)
        if "cpp" in registered(op):
            found[op] = import_module(f"{api.rpartition('.')[0]}.contract").CONTRACT
    return found


CONTRACTS = contracts()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# the suites of the ops themselves run the contract on the widest
@pytest.mark.parametrize("isa", instruction_sets()[:-1])
@pytest.mark.parametrize("op", CONTRACTS)
def test_contract_on_narrower_sets(op: str, isa: str, dtype: torch.dtype) -> None:
    with cpp.using_isa(isa):
        check(CONTRACTS[op], "cpp", device="cpu", dtypes=[dtype])


@pytest.mark.parametrize("op", CONTRACTS)
def test_threads_change_no_bit(op: str) -> None:
    # three times the threads that there are, so that shares are uneven and threads wait
    before = torch.get_num_threads()
    try:
        for case in CONTRACTS[op].cases(torch.bfloat16, "cpu", 0):
            results: list[Outputs] = []
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                results.append(
                    case.problem.run(CONTRACTS[op].on("cpp"), backward=CONTRACTS[op].backward)
                )
            for other in results[1:]:
                for name, expected in results[0].items():
                    torch.testing.assert_close(
                        other[name], expected, rtol=0, atol=0, equal_nan=True, msg=name
                    )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("op", ["gated_mlp_act", "layer_norm", "cross_entropy"])
def test_streamed_outputs_are_the_same_bits(op: str, isa: str) -> None:
    # 1100 rows of 2048 are past the size from which outputs are streamed, ten rows are not
    contract = import_module(f"swathe.kernels.{op}.contract")
    shape = import_module(f"swathe.kernels.{op}.shapes").Shape("streamed", 1100, 2048)
    options = {"reduction": "none"} if op == "cross_entropy" else {}
    problem = contract.random(shape, torch.float32, seed=0, **options)
    some = slice(700, 710)
    part = problem.map(lambda t: t[some] if t.shape[0] == 1100 else t)
    with cpp.using_isa(isa):
        whole, small = (p.run(CONTRACTS[op].on("cpp")) for p in (problem, part))
    for name in ("y", "dx", "dgate", "dup", "loss", "dlogits"):
        if name in whole:
            assert torch.equal(whole[name][some], small[name]), name
