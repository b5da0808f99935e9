"""One verdict for a type and a treatment, the table of all of them, and the list of what passed.

tests/hf/coverage.json holds, by type and treatment, "passed" or the verdict with its reason. What
passed there must pass; what does not must fail in the same way. After a change for the better:

    cd tests && python -m support.hf_zoo_coverage [--treatment NAME] [type ...]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import swathe
from support.hf_zoo import Entry, build
from support.hf_zoo_judge import (
    LUCKY,
    RATIO,
    RUNS,
    Reading,
    belongings,
    changed,
    differences,
    read,
    read_gold,
    runs_of,
)
from support.hf_zoo_others import ENCODERS, MULTIMODAL
from support.hf_zoo_treatments import TREATMENTS, Treatment
from support.hf_zoo_types import CAUSAL, OLDER

LIST = Path(__file__).parents[1] / "hf" / "coverage.json"
ZOO: dict[str, dict[str, Entry]] = {
    "causal": CAUSAL,
    "multimodal": MULTIMODAL,
    "encoder": ENCODERS,
}
# how a treatment may end: refused before anything changed, or failed
UPDATE = "python -m support.hf_zoo_coverage"
PASSED, LEFT, RAISED, WRONG, UNDONE = "passed", "left", "raised", "wrong", "not undone"


class Verdict(NamedTuple):
    """How it ended, the reason where it did not pass, and what the treatment says it did."""

    ending: str
    reason: str = ""
    note: str = ""

    def __str__(self) -> str:
        text = self.note if self.ending == PASSED else self.reason
        return f"{self.ending}: {text}" if text else self.ending


@dataclass(frozen=True)
class Reference:
    """The untouched model's readings and keys, and what its own forward replaces of it."""

    own: Reading
    gold: Reading
    keys: list[str]
    volatile: set[str]


@lru_cache(maxsize=1)
def reference(kind: str, name: str) -> Reference:
    """What the entry's model is measured against, over every run that it can take."""
    entry = ZOO[kind][name]
    model = build(entry)
    runs = runs_of(entry, model, RUNS)
    fresh = belongings(model)
    own = read(model, runs, entry.lacks)
    volatile = changed(fresh, belongings(model))
    bad = [n for n, v in own.items() if not v.isfinite().all()]
    assert not bad, f"{name}: {bad[:3]} is not finite without any treatment"
    gold = read_gold(build(entry), runs, entry.lacks)
    return Reference(own, gold, list(model.state_dict()), volatile)


def examine(entry: Entry, treatment: Treatment) -> Verdict:
    """Apply, run, undo; the first thing that is not as it should be is the verdict."""
    known = reference(entry.kind, entry.model_type)
    model = build(entry)
    before = belongings(model)
    try:
        note = treatment.apply(model) or ""
    except Exception as error:  # noqa: BLE001  (whatever it raises is its verdict)
        kept = changed(before, belongings(model))
        return Verdict(RAISED if kept else LEFT, _named(error))
    try:
        wrong = _wrong(entry, model, treatment.runs, known)
        if wrong:
            return Verdict(WRONG, wrong, note)
        treatment.undo(model)
    except swathe.UnsupportedFeature as error:
        return Verdict(LEFT, _named(error), note)
    except Exception as error:  # noqa: BLE001
        return Verdict(RAISED, _named(error), note)
    left = sorted(changed(before, belongings(model)) - known.volatile)
    return (
        Verdict(UNDONE, f"{left[:3]} is not as before", note) if left else Verdict(PASSED, "", note)
    )


def _wrong(entry: Entry, model: Any, wanted: tuple[str, ...], known: Reference) -> str:
    """The worst of what a treated model computes otherwise, "" for nothing."""
    runs = runs_of(entry, model, wanted)
    if list(model.state_dict()) != known.keys:
        return "the state dict has other keys"
    found = read(model, runs, entry.lacks)
    own = {n: v for n, v in known.own.items() if n.split(":")[0] in runs}
    ratio = LUCKY if "steady rounding" in entry.lacks else RATIO
    off = differences(found, own, known.gold, ratio)
    return " and ".join([*off[:1], *([f"{len(off) - 1} more"] if off[1:] else [])])


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def summary(reports: Iterable[Any]) -> list[str]:
    """The table of a run of pytest, from its reports' properties; empty without the zoo."""
    found = [value for one in reports for name, value in one.user_properties if name == "zoo"]
    return table((kind, name, by, Verdict(*rest)) for kind, name, by, *rest in found)


def listed() -> dict[str, Any]:
    """The committed list: {kind: {type: {treatment: verdict}}}, and its transformers.

    What ends otherwise in an older one that is tested too stands in coverage-<major.minor>.json.
    """
    made = json.loads(LIST.read_text()) if LIST.exists() else {}
    minor = ".".join(transformers.__version__.split(".")[:2])
    older = LIST.with_name(f"{LIST.stem}-{minor}.json")
    if older.exists() and transformers.__version__ != made.get("transformers"):
        for kind, types in json.loads(older.read_text()).items():
            for name, verdicts in types.items():
                made.setdefault(kind, {}).setdefault(name, {}).update(verdicts)
    return made


def absent(entry: Entry) -> str | None:
    """Why the installed transformers, other than the list's, cannot have the entry; else None."""
    name = entry.config or entry.model_type
    if name not in transformers.CONFIG_MAPPING:
        return f"transformers {transformers.__version__} has no {name}"
    if transformers.__version__ != listed().get("transformers") and entry.model_type in OLDER:
        return f"in transformers {transformers.__version__} it {OLDER[entry.model_type]}"
    return None


def judge(verdict: Verdict, expected: str | None) -> str | None:
    """Why a verdict fails the suite, None where it does not.

    What is listed as passed must pass, in the list's transformers with no fewer modules patched.
    Anything else may only end as the list says it does; its reason may change its wording.
    """
    if expected is None:
        return None if verdict.ending == PASSED else f"is not listed, and {verdict}"
    same = transformers.__version__ == listed().get("transformers", transformers.__version__)
    fewer = same and verdict.ending == PASSED and _patched(str(verdict)) < _patched(expected)
    if fewer or verdict.ending not in (PASSED, ending(expected)):
        return f"was listed as {expected!r}, and now {verdict}"
    return None


def ending(listed: str) -> str:
    """The first word of a listed verdict."""
    return listed.split(":")[0]


def _patched(verdict: str) -> int:
    """How many modules a passed verdict says were patched."""
    found = re.match(rf"{PASSED}: (\d+) patched", verdict)
    return int(found[1]) if found else 0


def table(given: Iterable[tuple[str, str, str, Verdict]]) -> list[str]:
    """Lines for people: counts by kind and treatment, then what did not pass, then what is new."""
    rows = list(given)
    lines = [f"transformers {transformers.__version__}"]
    old = listed()
    for kind in ZOO:
        for treatment in dict.fromkeys(t for k, _, t, _ in rows if k == kind):
            seen = [v for k, _, t, v in rows if (k, t) == (kind, treatment)]
            counts = Counter(v.ending for v in seen)
            text = ", ".join(f"{n} {ending}" for ending, n in counts.most_common())
            lines.append(f"  {kind:10} {treatment:10} {len(seen):4} types: {text}")
    failed = [row for row in rows if row[3].ending != PASSED]
    lines += [f"  {name} {treatment}: {verdict}" for _, name, treatment, verdict in failed]
    new = [
        f"{name} {treatment}"
        for kind, name, treatment, verdict in rows
        if verdict.ending == PASSED
        and ending(old.get(kind, {}).get(name, {}).get(treatment, "")) != PASSED
    ]
    if new:
        lines.append(f"  {len(new)} new, to be listed with {UPDATE}: {', '.join(new[:20])}")
    return lines


def update(names: Collection[str], treatments: Collection[str]) -> list[str]:
    """Examine the types and rewrite the list; returns its table."""
    made = listed()
    if made.get("transformers", transformers.__version__) != transformers.__version__:
        raise SystemExit(f"{LIST.name} is of transformers {made['transformers']}: install that")
    rows = []
    for kind, entries in ZOO.items():
        for name, entry in entries.items():
            if names and name not in names:
                continue
            for treatment in TREATMENTS.values():
                if treatment.missing() or (treatments and treatment.name not in treatments):
                    continue
                verdict = examine(entry, treatment)
                rows.append((kind, name, treatment.name, verdict))
                made.setdefault(kind, {}).setdefault(name, {})[treatment.name] = str(verdict)
    lines = table(rows)
    made["transformers"] = transformers.__version__
    LIST.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    return lines


def main(arguments: list[str]) -> None:
    """`[--treatment NAME] [type ...]`: examine and rewrite the list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--treatment", action="append", default=[], choices=TREATMENTS)
    parser.add_argument("types", nargs="*")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print("\n".join(update(given.types, given.treatment)))


if __name__ == "__main__":
    main(sys.argv[1:])
