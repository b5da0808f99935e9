"""One call of an op as data (`Problem`), what must hold for it (`Contract`), and the check.

An op's `contract.py` fills in a `Contract`; tests, `bench` and third parties run it:

    from swathe.kernels.core.contract import check
    from swathe.kernels.norm.contract import CONTRACT
    print(check(CONTRACT, "mine", device="cuda").rows())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swathe.kernels.core.testing import BOUNDS, Bound, Report, elementwise_miss

Outputs = dict[str, Tensor]
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """One call: `inputs` that are differentiated, `options` for the rest, both by keyword.

    `arriving` names the op's outputs in their order and gives the gradient that arrives at each.
    An input that the call leaves out (residual=None) is not in `inputs`.
    """

    inputs: Mapping[str, Tensor]
    arriving: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def call(self, function: Callable[..., Any], *, backward: bool = True) -> Callable[[], Outputs]:
        """The call without arguments, ready to be made, and timed, any number of times.

        It returns the outputs by name and, as "d" + name, the gradient of every input.
        """
        leaves = {k: t.detach().requires_grad_(backward) for k, t in self.inputs.items()}
        names, options = tuple(self.arriving), dict(self.options)
        gradients = [f"d{name}" for name in leaves]
        wanted, arriving = tuple(leaves.values()), tuple(self.arriving.values())

        def forward() -> Outputs:
            found = function(**leaves, **options)
            return dict(zip(names, found if type(found) is tuple else (found,), strict=True))

        def both() -> Outputs:
            outputs = forward()
            found = torch.autograd.grad(tuple(outputs.values()), wanted, arriving)
            return {**outputs, **dict(zip(gradients, found, strict=True))}

        return both if backward else forward

    def run(self, function: Callable[..., Any], *, backward: bool = True) -> Outputs:
        """One such call, its outputs detached."""
        return {k: t.detach() for k, t in self.call(function, backward=backward)().items()}

    def to(self, dtype: torch.dtype) -> Problem:
        """The same call with every floating-point tensor in `dtype`."""
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The same call with `change` applied to every tensor."""
        return replace(
            self,
            inputs={k: change(t.detach()) for k, t in self.inputs.items()},
            arriving={k: change(t) for k, t in self.arriving.items()},
            options={k: change(v) if isinstance(v, Tensor) else v for k, v in self.options.items()},
        )

    def given(self, **options: Any) -> Problem:
        """The same call with other options."""
        return replace(self, options={**self.options, **options})


class Case(NamedTuple):
    """A problem and the group whose pools its errors enter: options that round alike."""

    group: str
    problem: Problem


@dataclass(frozen=True)
class Contract:
    """An op's side of the numerical contract (kernels/core/testing.py).

    function    the public function; takes `implementation`.
    cases       cases(dtype, device, seed): every shape class and option, at least MIN_POOL elements
                of each output in each group.
    gold        outputs and gradients in fp64 of a problem's rounded inputs.
    baseline    the same from Hugging Face's eager code in the problem's own dtypes.
    magnitudes  the formulas on absolute values, in fp64; names that are missing are not bounded
                element by element.
    roundings   how often an output is rounded to its dtype. One that is rounded more than once
                follows a family's rounding points: in bf16 and fp16 it is held to `baseline` bit
                for bit (up to elements at a rounding boundary) instead of to the ratios.
    share       the part of its magnitude that an element of an output may be off by, where what it
                is made of is rounded too; None for an output that is rounded once.
    boundary    the share of elements that may sit at such a boundary, by output.
    bounds      the row of BOUNDS for an output.
    pooled      outputs whose ratios are pooled; a handful of losses would be noise.
    tuning      tuning(N, dtype, device): a large problem for the tuner, at each of `tuning_sizes`.
    backward    whether calls have gradients that are the op's own.
    exactly     further facts that must hold exactly; returns a sentence for each that does not.
    """

    op: str
    function: Callable[..., Any]
    cases: Callable[[torch.dtype, str, int], Iterable[Case]]
    gold: Callable[[Problem], Outputs]
    baseline: Callable[[Problem], Outputs]
    magnitudes: Callable[[Problem], Outputs]
    roundings: Callable[[str, Problem], int] = lambda name, problem: 1
    share: Callable[[str, Problem], float | None] = lambda name, problem: None
    boundary: Callable[[str, Problem], float] = lambda name, problem: boundary_share(problem)
    bounds: Callable[[str], str] = lambda name: "row-wise"
    exactly: Callable[[Problem, Outputs, Outputs], list[str]] = lambda problem, ours, eager: []
    pooled: Callable[[str], bool] = lambda name: True
    backward: bool = True
    tuning: Callable[[int, torch.dtype, str], Problem] | None = None
    tuning_sizes: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)

    def on(self, implementation: str) -> Callable[..., Any]:
        """The public function with its backend named."""
        return partial(self.function, implementation=implementation)


def measure(
    contract: Contract, report: Report, case: Case, implementation: str, *, backward: bool = True
) -> None:
    """Add one problem's errors to the report's pools and everything it misses to the list."""
    problem = case.problem
    ours = problem.run(contract.on(implementation), backward=backward)
    gold, eager = contract.gold(problem), contract.baseline(problem)
    sizes = contract.magnitudes(problem)
    report.misses += contract.exactly(problem, ours, eager)
    for name, found in ours.items():
        label = f"{name} {case.group} {problem.label}"
        if found.shape != gold[name].shape:
            shapes = f"{tuple(found.shape)}, expected {tuple(gold[name].shape)}"
            report.misses.append(f"{label}: has shape {shapes}")
            continue
        roundings = contract.roundings(name, problem)
        if name in sizes:
            share = contract.share(name, problem)
            miss = elementwise_miss(label, found, gold[name], sizes[name], roundings, share)
            report.misses += [miss] if miss else []
        if roundings > 1 and found.dtype != torch.float32:
            moved = contract.boundary(name, problem)
            report.misses += same_rounding(label, found, eager[name], moved)
        elif contract.pooled(name):
            key = f"{name} {case.group}".strip()
            report.pool(key, found.dtype).add(found, gold[name], eager[name])


def boundary_share(problem: Problem) -> float:
    """Elements that another order of an fp32 sum carries across a rounding boundary.

    It moves a row statistic by a unit or two: one element of about 2^15 in bf16, 2^12 in fp16.
    """
    dtype = next(iter(problem.inputs.values())).dtype
    return 1 / 4096 if dtype == torch.bfloat16 else 1 / 512


def same_rounding(label: str, ours: Tensor, eager: Tensor, share: float) -> list[str]:
    """A miss if more than this share of the elements (and more than two) differ from eager's."""
    changed = int((ours != eager).sum())
    allowed = max(2, int(ours.numel() * share))
    if changed <= allowed:
        return []
    return [f"{label}: {changed} of {ours.numel()} elements round unlike HF's; allowed {allowed}"]


def check(
    contract: Contract,
    implementation: str,
    *,
    device: str = "cpu",
    dtypes: Iterable[torch.dtype] = FLOAT_DTYPES,
    groups: Iterable[str] | None = None,
    seeds: int = 1,
) -> Report:
    """Hold a registered backend to the contract; returns the measured ratios.

    `groups` leaves out every other group of cases. Raises ContractBroken listing every miss:
    ratios by output, group and dtype, and single elements that no rounding explains.
    """
    report = Report(f"{contract.op} on {implementation!r} ({device})")
    for dtype in dtypes:
        for seed in range(seeds):
            for case in contract.cases(dtype, device, seed):
                if groups is None or case.group in groups:
                    measure(contract, report, case, implementation, backward=contract.backward)
    report.settle(lambda name: bound_of(contract, name))
    return report


def bound_of(contract: Contract, pool: str) -> Bound:
    """The bound of a pool, whose name is that of the output and its group."""
    return BOUNDS[contract.bounds(pool.split(" ")[0])]
