"""Every word of core/gluon.py says on the installed Triton what it says on the others: a kernel
that uses each is compiled for Hopper, and its text holds the instruction that the word is for."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

from support.machine_code import box, build_gluon
from swathe.kernels.core import gluon
from swathe.kernels.core.gluon import (
    TensorDescriptor,
    arrive_warpgroups,
    box_bytes,
    constexpr_function,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    mbarriers,
    partition_barrier,
    reinterpret,
    sync_warpgroups,
    tma_add,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


@constexpr_function
def sums(width):
    """Layout of 64 rows of `width` sums."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16]
    )


@jit
def every_word(x_at, y_at, total_at, name):
    """x x^T by one program, stored and added."""
    x = gl.allocate_shared_memory(x_at.dtype, [64, 64], x_at.layout)
    full = mbarriers(2)
    mbarrier.init(full.index(0), count=1)
    mbarrier.expect(full.index(0), box_bytes(x_at))
    tma_load(x_at, [0, 64], full.index(0), x)
    mbarrier.wait(full.index(0), 0)
    mbarrier.arrive(full.index(0), count=1)
    acc = warpgroup_mma_init(gl.zeros([64, 64], gl.float32, sums(64)))
    acc = warpgroup_mma(x, x.permute([1, 0]), acc, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    sync_warpgroups(name, 256)
    arrive_warpgroups(name + 1, 256)
    sync_warpgroups(name + 2, 384)
    arrive_warpgroups(name + 3, 384)
    y = reinterpret(x, y_at.dtype, [64, 64], y_at.layout)
    y.store(acc.to(y_at.dtype))
    fence_async_shared()
    partition_barrier()
    tma_store(y_at, [0, 0], y)
    tma_store_wait(0)
    total = gl.allocate_shared_memory(gl.float32, [64, 32], total_at.layout)
    total.store(gl.convert_layout(gl.zeros([64, 32], gl.float32, sums(32)), sums(32)))
    fence_async_shared()
    partition_barrier()
    tma_add(total_at, [0, 0], total)
    tma_store_wait(0)


# what the text holds for each word: a stage of the compilation, and a pattern
WORDS = {
    "tma_load": ("ptx", r"cp\.async\.bulk\.tensor\.2d\.shared::\S+\.global\S*mbarrier"),
    "tma_store": ("ptx", r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta"),
    "tma_add": ("ptx", r"cp\.reduce\.async\.bulk\.tensor\.2d\.global\.shared::cta\.add"),
    "tma_store_wait": ("ptx", r"cp\.async\.bulk\.wait_group\.read"),
    "box_bytes": ("ptx", rf"mbarrier\.arrive\.expect_tx\S* .*, {64 * 64 * 2};"),
    "mbarrier": ("ptx", r"mbarrier\.try_wait"),
    "mbarriers": ("ptx", r"mbarrier\.init"),
    "fence_async_shared": ("ptx", r"fence\.proxy\.async\.shared::cta"),
    "warpgroup_mma": ("ptx", r"wgmma\.mma_async\.sync\.aligned\.m64n64k16\.f32\.bf16\.bf16"),
    "warpgroup_mma_wait": ("ptx", r"wgmma\.wait_group\.sync\.aligned"),
    # has no instruction of its own: its sums are what the product begins with
    "warpgroup_mma_init": ("ttgir", r"ttng\.warp_group_dot\b"),
    "sync_warpgroups": ("ptx", r"bar\.sync %r\d+, (256|384);"),
    "arrive_warpgroups": ("ptx", r"bar\.arrive %r\d+, (256|384);"),
    "partition_barrier": ("ttgir", r"(gpu|ttg)\.barrier"),
    "reinterpret": ("ttgir", r"ttg\.memdesc_reinterpret"),
    "constexpr_function": ("ttgir", r"instrShape = \[16, 64, 16\]"),
    "gl": ("ttgir", r"ttg\.local_alloc"),
    "jit": ("ptx", r"\.entry every_word\("),
}


@cache
def text(stage: str) -> str:
    """What the compiler made of the kernel at a stage."""
    narrow, wide = gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(128, 32, 2)
    types = {
        "x_at": box("bf16", [64, 64], narrow),
        "y_at": box("fp16", [64, 64], narrow),
        "total_at": box("fp32", [64, 32], wide),
        "name": "i32",
    }
    return build_gluon(every_word, types, {}, set(), 4).asm[stage]


@pytest.mark.parametrize("word", WORDS)
def test_the_word_reaches_the_machine(word: str) -> None:
    stage, pattern = WORDS[word]
    assert re.search(pattern, text(stage)), f"{word}: no {pattern} in {stage}"


def test_no_word_is_left_out() -> None:
    assert {*WORDS, "TensorDescriptor"} == set(gluon.__all__)


def test_both_sizes_of_named_barriers() -> None:
    for kind in ("sync", "arrive"):
        found = set(re.findall(rf"bar\.{kind} %r\d+, (\d+);", text("ptx")))
        assert found >= {"256", "384"}, kind


def test_descriptors_are_made_on_the_host() -> None:
    x = torch.zeros(1, 2, 100, 128, dtype=torch.bfloat16)
    layout = gl.NVMMASharedLayout(128, 16, 4)
    made = TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, 64, 64], layout)
    assert made.base is x and made.block_shape == [1, 1, 64, 64] and made.layout == layout
    assert made.padding == "zero"
    with pytest.raises(AssertionError):
        TensorDescriptor(x, [100, 128], [130, 1], [64, 64], gl.NVMMASharedLayout(128, 16, 2))
