"""Calls past 2^31 elements, held to small calls on the rows at both of their ends."""

from __future__ import annotations

from swathe.kernels.core.contract import Contract, Outputs, Problem


def ends_differ(
    contract: Contract, backend: str, problem: Problem, by_row: tuple[str, ...]
) -> tuple[Outputs, list[str]]:
    """What the call gives, and each output of `by_row` that is not what fewer rows alone give.

    Rows are the first dimension of the first input, and of every tensor that is as long.
    """
    call = contract.on(backend)
    found, wrong = problem.run(call), []
    M = next(iter(problem.inputs.values())).shape[0]
    for part in (slice(0, 8), slice(M - 16, M)):
        small = problem.map(lambda t, p=part: t[p] if t.dim() and t.shape[0] == M else t).run(call)
        wrong += [
            f"{name} differs in rows {part.start} to {part.stop}"
            for name in by_row
            if not small[name].equal(found[name][part])
        ]
    return found, wrong
