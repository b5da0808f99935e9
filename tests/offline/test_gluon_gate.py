"""The gate on Gluon kernels: what it is for, planted in text and in a kernel, does not pass."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from support import gate
from support.gluon_gate import GluonConfiguration
from support.machine_code import GluonCode, _ptxas_log, box, compile_gluon
from support.overlap import hot_loops
from support.partitions import partitions
from swathe.kernels.core.gluon import (
    box_bytes,
    gl,
    jit,
    mbarrier,
    mbarriers,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@jit
def _copy(k_at, k, full, empty, tiles, STAGES: gl.constexpr):
    for i in range(tiles):
        slot = i % STAGES
        mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), box_bytes(k_at))
        tma_load(k_at, [i * k_at.block_shape[0], 0], full.index(slot), k.index(slot))


@jit
def _weigh(s):
    p = gl.exp2(s - gl.expand_dims(gl.max(s, 1), 1))
    WIDTH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    return gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, WIDTH, 2))


@jit
def _multiply(out_ptr, q, k, full, empty, tiles, STAGES: gl.constexpr, PINNED: gl.constexpr):
    """acc += exp2(q k^T) k, the product of one tile beside the exponentials of the next."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    zero = gl.zeros([64, 128], gl.float32, ACC)
    acc = zero
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q, k.index(0).permute([1, 0]), zero, use_acc=False, is_async=True)
    p = _weigh(warpgroup_mma_wait(0, deps=[s]))
    for i in range(1, tiles):
        slot, before = i % STAGES, (i - 1) % STAGES
        if not PINNED:
            mbarrier.wait(full.index(slot), (i // STAGES) & 1)
        s = warpgroup_mma(q, k.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True)
        ahead = warpgroup_mma(p, k.index(before), acc, is_async=True)
        p = _weigh(warpgroup_mma_wait(1, deps=[s]))
        if PINNED:
            mbarrier.wait(full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, i + 1 < tiles)
        acc, p = warpgroup_mma_wait(0, deps=[ahead, p])
        mbarrier.arrive(empty.index(before), count=1)
    acc = warpgroup_mma_wait(
        0, deps=[warpgroup_mma(p, k.index((tiles - 1) % STAGES), acc, is_async=True)]
    )
    m = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, ACC)), 1)
    n = gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, ACC)), 0)
    gl.store(out_ptr + m * 128 + n, acc)


@jit
def attend(
    out_ptr, q_at, k_at, tiles, STAGES: gl.constexpr, PINNED: gl.constexpr
):  # fmt: skip
    """64 rows over all tiles of keys, which are their own values."""
    q = gl.allocate_shared_memory(q_at.dtype, [64, 128], q_at.layout)
    k = gl.allocate_shared_memory(k_at.dtype, [STAGES, 128, 128], k_at.layout)
    there, full, empty = mbarriers(1).index(0), mbarriers(STAGES), mbarriers(STAGES)
    mbarrier.init(there, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.expect(there, box_bytes(q_at))
    tma_load(q_at, [0, 0], there, q)
    mbarrier.wait(there, 0)
    gl.warp_specialize(
        [
            (_multiply, (out_ptr, q, k, full, empty, tiles, STAGES, PINNED)),
            (_copy, (k_at, k, full, empty, tiles, STAGES)),
        ],
        [1],
        [24],
    )


LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
TYPES = {
    "out_ptr": "*fp32",
    "q_at": box("bf16", [64, 128], LAYOUT),
    "k_at": box("bf16", [128, 128], LAYOUT),
    "tiles": "i32",
}


@cache
def compiled(*, pinned: bool = True) -> GluonCode:
    """The kernel above; without its pin, nothing but the order of instructions differs."""
    constants = {"STAGES": 2, "PINNED": pinned}
    return compile_gluon(attend, TYPES, constants, {"out_ptr"}, 4, 128)


CONFIGURATION = GluonConfiguration(
    "attend",
    compiled,
    loops=1,
    matrix=({"64x128x16 SS": 8, "64x128x16 RS": 8},),
    copies={"UTMALDG": 3, "UTMASTG": 0},
)


def test_a_real_kernel_passes() -> None:
    code = compiled()
    assert CONFIGURATION.faults(code, "sm_90") == []
    assert (code.threads, code.registers, code.serialised) == (256, 128, ())
    assert {p.limit for p in code.partitions} == {24, 232}
    assert max(p.used for p in code.partitions) > 128, "more than the launch gave"
    (loop,) = code.loops
    assert str(loop) in str(code) and loop.exponentials == 64


def test_a_real_loss_of_overlap_does_not() -> None:
    (fault,) = CONFIGURATION.faults(compiled(pinned=False), "sm_90")
    assert fault.startswith("exponentials that nothing hides")


def test_ptxas_is_asked_about_the_very_code() -> None:
    with pytest.raises(AssertionError, match="other flags"):
        _ptxas_log(SMALL_PTX, b"another kernel", "another code")


SMALL_PTX = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry nothing() { ret; }
"""


def sass(*body: str, limit: int = 240) -> str:
    """A consumer whose loop is `body`, in text."""
    lines = [f"USETMAXREG.TRY_ALLOC.CTAPOOL UP0, {limit:#x}", ".L_x_1:"]
    lines += [*body, "@P0 BRA `(.L_x_1)", "EXIT"]
    return "\n".join(
        line if line.startswith(".") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )


SS = ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",) * 8
RS = ("HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR12].tnspB, R88, gsb0",) * 8
EX2, WAIT = ("MUFU.EX2 R1, R2",) * 4, ("WARPGROUP.DEPBAR.LE gsb0, 0x0",)
GOOD = GluonCode(
    registers=168,
    spilled=0,
    shared=200_000,
    loads={},
    stores={},
    double_arithmetic=False,
    sass=sass(*SS, *RS, *EX2, *WAIT),
    threads=384,
    copies={"UTMALDG": 3, "UTMASTG": 0, "UTMAREDG": 0, "LDGSTS": 0},
)
C7512 = "(C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to"
FAULTY = {
    "nothing hides": {"sass": sass(*SS, *RS, *WAIT, *EX2)},
    "spills in a loop": {"sass": sass(*SS, *RS, *EX2, "LDL R7, [R1+0x8]", *WAIT)},
    "40 bytes spilled, 0 allowed": {"spilled": 40},
    "serialized": {"serialised": (C7512,)},
    "matrix instructions other": {"sass": sass(*SS, *SS, *EX2, *WAIT)},
    "converted through shared memory": {
        "sass": sass(*SS, *RS, *EX2, "STSM.16.M88.4 [R2+0x24000], R4", *WAIT)
    },
    "0 hot loops": {"sass": sass(*SS, *RS, *WAIT)},
    "partition uses more registers": {"sass": sass(*SS, *RS, *EX2, *WAIT, limit=144)},
    "2 UTMALDG, expected 3": {"copies": {**GOOD.copies, "UTMALDG": 2}},
    "threads copy": {"copies": {**GOOD.copies, "LDGSTS": 4}},
    "fp64": {"double_arithmetic": True},
    "240000 bytes of shared": {"shared": 240_000},
    "512 threads cannot start": {"threads": 512},
}


def test_a_good_text_passes() -> None:
    assert CONFIGURATION.faults(GOOD, "sm_90") == []


@pytest.mark.parametrize("fault", FAULTY)
def test_planted(fault: str) -> None:
    (found,) = CONFIGURATION.faults(replace(GOOD, **FAULTY[fault]), "sm_90")
    assert fault in found


def test_what_is_allowed_is_counted() -> None:
    known = replace(CONFIGURATION, spilled_in_loops=1, shared_accesses=1)
    body = (*SS, *RS, *EX2, "LDL R7, [R1+0x8]", "LDS R8, [R2]")
    assert known.faults(replace(GOOD, sass=sass(*body, *WAIT)), "sm_90") == []
    found = known.faults(replace(GOOD, sass=sass(*body, *body[-2:], *WAIT)), "sm_90")
    assert [fault.split(":")[0] for fault in found] == [
        "spills in a loop", "a layout is converted through shared memory",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fact", "value"), [("instructions", 100), ("in_flight", 101), ("barriers", 0)]
)
def test_worse_than_the_baseline(fact: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    known = CONFIGURATION.facts(compiled(), "sm_90")
    rows = {"attend sm_90": known}
    monkeypatch.setattr(gate, "_baseline", lambda op: {gate.TRITON: rows})
    gate.verify("attend", CONFIGURATION, "sm_90")
    rows["attend sm_90"] = {**known, fact: value}
    with pytest.raises(AssertionError, match=rf"{fact}: \d+, baseline {value}"):
        gate.verify("attend", CONFIGURATION, "sm_90")


def test_partitions_are_followed_through_jumps() -> None:
    """A wait that stands aside belongs to whoever jumps to it, and so do its registers."""
    lines = [
        "USETMAXREG.DEALLOC.CTAPOOL 0x18",
        "UTMALDG.4D [UR8], [UR4]",
        "MOV R7, R6",
        'BRX R2 -0x190 (*"BRANCH_TARGETS .L_x_3,.L_x_4"*)',
        ".L_x_3:",
        "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0",
        "@!P0 BRA `(.L_x_5)",
        ".L_x_6:",
        SS[0],
        "LDS.128 R96, [R4]",
        ".L_x_4:",
        "EXIT",
        ".L_x_5:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5+0x280d8], R200",
        "BRA `(.L_x_6)",
    ]
    text = "\n".join(
        line if line.startswith(".") else f"  /*{16 * i:04x}*/     {line} ;"
        for i, line in enumerate(lines)
    )
    copies, multiplies = partitions(text, 168)
    assert (copies.limit, copies.used, copies.copies, copies.matrix) == (24, 8, 1, 0)
    assert (multiplies.limit, multiplies.used, multiplies.matrix) == (240, 201, 1)
    (whole,) = partitions("\n".join(f"  /*{16 * i:04x}*/   {x} ;" for i, x in enumerate(SS)), 168)
    assert (whole.limit, whole.used) == (168, 88), "64x128 accumulators from R24 on"


def test_a_wait_aside_makes_no_loop() -> None:
    """The jump back from it spans what lies between, which no turn runs through."""
    straight = sass(*SS, *RS, *EX2, *WAIT).replace("@P0 BRA `(.L_x_1)", "EXIT")
    aside = straight + "\n".join(("", ".L_x_9:", f"  /*{0x2000:04x}*/   BRA `(.L_x_1) ;"))
    assert hot_loops(aside, waits_aside=True) == []
    assert len(hot_loops(GOOD.sass, waits_aside=True)) == 1
