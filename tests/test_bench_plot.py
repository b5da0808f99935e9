"""Pictures say what the results say: every loss, every absence, the roofs of the same run."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from bench.plot import Picture, kinds, pictures
from bench.plot import __main__ as command
from bench.readme import RESULTS
from bench.record import document, save

# a picture's module is imported where matplotlib is needed, so that the rest runs without it
SIZES = (1, 16, 256, 2048)


def results_of(op: str = "attention", *, flops: bool = True) -> dict[str, Any]:
    """Ours at 10, a peer at 20 and one that wins every cell but does not serve the last."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        for number, size in enumerate(SIZES):
            for backend, time in (("triton", 10.0), ("eager", 20.0), ("liger", 8.0)):
                row: dict[str, Any] = {"op": op, "shape": f"s{size}", "size": f"{size} x 8"}
                row |= {"dtype": dtype, "variant": "forward", "backend": backend}
                row["ours"] = backend == "triton"
                if backend == "liger" and number == len(SIZES) - 1:
                    rows.append({**row, "error": "NotImplementedError: liger: too long"})
                    continue
                median, traffic = time * size, 1e6 * size
                row |= {"median_us": median, "samples_us": [median * f for f in (0.9, 1, 1.2)]}
                row |= {"traffic_bytes": traffic, "gbps": traffic / median / 1e3}
                row |= {"copy_gbps": 3000.0 if number == len(SIZES) - 1 else 9000.0}
                if flops:
                    row |= {"flops": traffic * 4**number, "product_tflops": 700.0}
                    row["tflops"] = row["flops"] / median / 1e6
                rows.append(row)
    absent = {"quack": "package quack is not installed"}
    return {**document(op, "cpu", "c0ffee"), "benchmarks": rows, "absent": absent}


def texts(figure: Any) -> list[str]:
    import matplotlib.text

    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def test_which_pictures_there_are(tmp_path: Path) -> None:
    save(results_of(), tmp_path / "attention.json")
    plain = results_of("rms_norm", flops=False)
    save(plain, tmp_path / "rms_norm.json")
    assert [one.name for one in pictures(tmp_path)] == [
        *("peers", "attention-bars", "attention-sizes", "attention-roofline"),
        *("rms_norm-bars", "rms_norm-sizes"),
    ]
    plain["benchmarks"] = [row for row in plain["benchmarks"] if row["shape"] == "s1"]
    assert kinds(plain) == ["bars"]
    assert kinds({**plain, "benchmarks": []}) == []


def test_a_picture_knows_its_results(tmp_path: Path) -> None:
    first, other = results_of(), results_of()
    other["benchmarks"][0]["median_us"] += 0.001
    one, two = (Picture("attention-bars", "bars", (each,)) for each in (first, other))
    file = tmp_path / "a.svg"
    assert not one.is_drawn(file)
    file.write_text(f"<svg>drawn from results of sha256 {one.inputs}</svg>")
    assert one.is_drawn(file) and not two.is_drawn(file)
    assert Picture("x", "bars", (copy.deepcopy(first),)).is_drawn(file)


def test_bars_show_losses_and_absences() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_hex
    from matplotlib.patches import Rectangle

    from bench.plot import bars, style

    with style.settings():
        figure = bars.draw([results_of()])
    said = texts(figure)
    assert "Absent: quack (package quack is not installed)." in "\n".join(said)
    assert said.count("liger: does not serve this") == 2
    assert any("Ours, the blue line at 1, is the fastest in 2 of 8 cells." in text for text in said)
    numbers = [text for axes in figure.axes for text in axes.texts]
    lost = {text.get_text() for text in numbers if text.get_color() == style.LOST}
    assert lost == {"0.80"} and [t.get_text() for t in numbers].count("2.00") == 8
    left = [
        patch
        for axes in figure.axes
        for patch in axes.patches
        if isinstance(patch, Rectangle) and math.isclose(patch.get_width(), 0.8 - 1)
    ]
    assert len(left) == 6
    assert {to_hex(patch.get_facecolor()) for patch in left} == {style.CARD}
    assert {to_hex(patch.get_edgecolor()) for patch in left} == {
        style.looks(["liger"], ())["liger"][0]
    }


def test_bars_say_where_ours_failed() -> None:
    pytest.importorskip("matplotlib")
    from bench.plot import bars, style

    results = results_of()
    first = results["benchmarks"][0]
    first["error"] = "gate: y is off"
    del first["median_us"]
    results["benchmarks"][4] = {**results["benchmarks"][4], "error": "gate: y is off"}
    del results["benchmarks"][4]["median_us"]
    with style.settings():
        said = texts(bars.draw([results]))
    assert "eager: ours failed" in said and "liger: ours failed" in said
    assert "eager: failed (gate)" in said


def test_overview_counts_and_marks_losses() -> None:
    pytest.importorskip("matplotlib")
    from bench.plot import overview, style

    with style.settings():
        figure = overview.draw([results_of(), results_of("rms_norm", flops=False)])
    said = texts(figure)
    assert "Time of each peer over ours: ours is the fastest in 4 of 16 cells" in said
    assert said.count("2 of 8") == 2 and {"attention", "rms_norm"} <= {*said}
    assert "Absent: quack (package quack is not installed)." in "\n".join(said)
    hollow = [
        x
        for line in figure.axes[0].lines
        if line.get_markerfacecolor() == style.CARD
        for x in line.get_xdata()
    ]
    assert len(hollow) == 12 and all(x == pytest.approx(0.8) for x in hollow)


def test_roofs_are_those_of_the_run() -> None:
    pytest.importorskip("matplotlib")
    from bench.plot import roofline, style

    with style.settings():
        figure = roofline.draw([results_of()])
    assert len(figure.axes) == 2 and figure.axes[0].get_ylabel() == "TFLOP/s"
    lines = [line.get_xydata() for line in figure.axes[0].lines]
    roofs = [line for line in lines if len(line) == 3]
    # 700 TFLOP/s, reached at 3 and 9 TB/s; the slower one is of the largest cell
    assert sorted(roof[1][0] for roof in roofs) == pytest.approx([700 / 9, 700 / 3])
    assert all(roof[1][1] == roof[2][1] == 700 for roof in roofs)
    assert all(roof[0][1] / roof[0][0] == pytest.approx(roof[1][1] / roof[1][0]) for roof in roofs)
    marks = sorted(tuple(line[0]) for line in lines if len(line) == 1)
    assert len(marks) == 11
    assert marks[2] == pytest.approx((1.0, 0.125)) and marks[-1] == pytest.approx((64.0, 6.4))


@pytest.mark.parametrize("flops", [False, True])
def test_sizes_draw_each_contender_and_the_ceiling(flops: bool) -> None:
    pytest.importorskip("matplotlib")
    from bench.plot import sizes, style

    results = results_of(flops=flops)
    with style.settings():
        figure = sizes.draw([results])
    axes = figure.axes[0]
    assert axes.get_ylabel() == ("TFLOP/s" if flops else "GB/s")
    drawn = {tuple(xy) for line in axes.lines for xy in line.get_xydata()}
    x, y = ("flops", "tflops") if flops else ("traffic_bytes", "gbps")
    timed = [r for r in results["benchmarks"] if r["dtype"] == "float32" and "median_us" in r]
    assert {(row[x], row[y]) for row in timed} <= drawn
    # all lie left of the ridge of 233 flops a byte
    grey = [line for line in axes.lines if line.get_color() == style.GREY]
    assert [len(line.get_xdata()) for line in grey] == ([0] if flops else [4])
    assert {line.get_linestyle() for line in axes.lines if len(line.get_xdata()) > 1} == (
        {":"} if flops else {"-"}
    )
    assert sizes.size_of(3 * 2**20) == "3 MiB" and sizes.flops_of(2.5e9) == "2.5 GFLOP"


def test_contenders_look_different() -> None:
    pytest.importorskip("matplotlib")
    from bench.plot import style

    names = ["cpp", "no such", "peer", "eager", "compile", "torch", "sdpa", "liger", "quack"]
    names += ["cudnn", "flash", "efficient", "math", "flex", "varlen"]
    names += ["flash_attn 2", "flash_attn 3"]
    looks = style.looks(names, ["cpp"])
    assert looks["cpp"][0] == style.OURS and list(looks) == names
    for values in zip(*looks.values(), strict=True):
        assert len({*values}) == len(names)
    many = [f"peer {i}" for i in range(30)]
    assert list(style.looks(many, ())) == many


def test_files_are_the_same_on_any_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib as mpl

    picture = Picture("attention-sizes", "sizes", (results_of(),))
    names = ["a.svg", "a.png", "b.svg", "b.png"]
    command.draw(picture, [tmp_path / name for name in names[:2]])
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9}):
        command.draw(picture, [tmp_path / name for name in names[2:]])
    first = [(tmp_path / name).read_bytes() for name in names]
    assert first[0] == first[2] and first[1] == first[3]
    assert b"<dc:date>" not in first[0] and picture.is_drawn(tmp_path / "a.svg")
    assert picture.inputs.encode() in first[1]
    assert {path.name for path in tmp_path.iterdir()} == {*names}


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(tmp_path)]) == 2
    assert "holds no results; make some with python -m bench.cpu" in capsys.readouterr().err
    save(results_of("rms_norm", flops=False), tmp_path / "rms_norm.json")
    assert command.main([str(tmp_path), "--check"]) == 1
    assert "peers.svg is missing or of other results" in capsys.readouterr().err
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main([str(tmp_path)]) == 2
    assert "pip install -c constraints.txt '.[plot]'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([str(tmp_path), "--formats", "svg,gif"])
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert command.main([str(tmp_path), "--formats", "svg"]) == 0
    assert "rms_norm-sizes.svg" in capsys.readouterr().out
    assert command.main([str(tmp_path), "--check"]) == 0
    assert command.main([str(tmp_path), "--check", "--out", str(RESULTS)]) == 1
