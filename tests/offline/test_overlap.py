"""The reader of hot loops, on machine code written for it."""

from __future__ import annotations

import pytest

from support.overlap import hot_loops


def sass(*body: str) -> str:
    """A loop of these instructions."""
    lines = [".L_x_1:", *body, "@P0 BRA `(.L_x_1)"]
    return "\n".join(
        line if line.startswith(".") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )


MATRIX = (
    "HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8",
    "HGMMA.64x64x16.F32.BF16 R8, gdesc[UR8], R8, gsb0",
)
EX2, WAIT = "MUFU.EX2 R1, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    ("body", "in_flight"),
    [
        ((*MATRIX, EX2, EX2, WAIT), 100),
        ((*MATRIX, WAIT, EX2, EX2), 0),
        ((*MATRIX, EX2, WAIT, EX2), 50),
        # what one turn leaves running hides the next one's
        ((EX2, EX2, WAIT, *MATRIX), 100),
        ((*MATRIX, *MATRIX, "WARPGROUP.DEPBAR.LE gsb0, 0x1", EX2, WAIT, EX2), 50),
    ],
)
def test_what_runs_beside_the_matrix_units(body: tuple[str, ...], in_flight: int) -> None:
    (loop,) = hot_loops(sass(*body))
    assert loop.in_flight == in_flight and loop.exponentials == 2


def test_a_hoisted_wait_shows() -> None:
    """Planted: the compiler moves the wait ahead of the softmax, and nothing else changes."""
    before, after = hot_loops(sass(*MATRIX, EX2, WAIT)), hot_loops(sass(*MATRIX, WAIT, EX2))
    assert before[0].instructions == after[0].instructions
    assert (before[0].in_flight, after[0].in_flight) == (100, 0)


def test_only_loops_with_both_count() -> None:
    assert hot_loops(sass(EX2, EX2)) == [] and hot_loops(sass(*MATRIX)) == []
    (loop,) = hot_loops(
        sass(*MATRIX, EX2, "UTMALDG.4D [UR8], [UR4]", "LDL R1, [R2]", "STL [R2], R1")
    )
    assert (loop.copies_by_tma, loop.spills, loop.matrix) == (1, 2, 2)
