"""Every type of the zoo under every treatment: the same model, and the very same after the undo.

What may end how stands in coverage.json (support/hf_zoo_coverage.py says how it is updated); the
summary of the run has the table. The classes are shares of the work for pytest-xdist.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from support.hf_zoo_coverage import LIST, PASSED, ZOO, absent, examine, judge, listed
from support.hf_zoo_treatments import TREATMENTS

# What 300 models of transformers warn of is theirs; what swathe warns of is an error here as well.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::swathe"),
]
SHARES = 5


def pairs(kind: str, share: int = 0, shares: int = 1) -> Any:
    """A parametrisation with every treatment of every `shares`-th type, one type after another."""
    names = sorted(ZOO[kind])[share::shares]
    both = [(kind, name, treatment) for name in names for treatment in TREATMENTS]
    return pytest.mark.parametrize(
        ("kind", "name", "treatment"), both, ids=[f"{name}-{t}" for _, name, t in both]
    )


class Treated:
    """One type and one treatment."""

    expected: ClassVar[dict[str, Any]] = listed()

    def test_is_the_same_model(
        self, kind: str, name: str, treatment: str, record_property: Any
    ) -> None:
        if reason := absent(ZOO[kind][name]) or TREATMENTS[treatment].missing():
            pytest.skip(reason)
        verdict = examine(ZOO[kind][name], TREATMENTS[treatment])
        record_property("zoo", [kind, name, treatment, *verdict])
        expected = self.expected.get(kind, {}).get(name, {}).get(treatment)
        failure = judge(verdict, expected)
        assert failure is None, f"{name} under {treatment} {failure} (see {LIST.name})"
        if verdict.ending != PASSED:
            pytest.skip(f"known: {verdict}")


@pairs("causal", 0, SHARES)
class TestCausalFirstFifth(Treated):
    """Language models."""


@pairs("causal", 1, SHARES)
class TestCausalSecondFifth(Treated):
    """Language models."""


@pairs("causal", 2, SHARES)
class TestCausalThirdFifth(Treated):
    """Language models."""


@pairs("causal", 3, SHARES)
class TestCausalFourthFifth(Treated):
    """Language models."""


@pairs("causal", 4, SHARES)
class TestCausalLastFifth(Treated):
    """Language models."""


@pairs("multimodal")
class TestMultimodal(Treated):
    """Read through their text alone."""


@pairs("encoder")
class TestEncoders(Treated):
    """Of text, images and sound."""
