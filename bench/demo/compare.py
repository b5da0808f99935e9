"""swathe beside transformers: the same prompts on the same weights, each in its own process."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.demo.bandwidth import read_gbps
from bench.remote import Remote, RemoteFailed

ROUNDS = 3
PREFILL = 512  # tokens
ENOUGH_S = 20.0  # no further round after this, on a machine that is slow or busy
EXACT = "float32"


@dataclass(frozen=True)
class Divergence:
    """Where a greedy text leaves the reference's, and how far apart each model put both tokens.

    A gap is the logit of the reference's token less that of the other.
    """

    dtype: str
    prompt: int
    equal_before: int
    reference_token: int
    other_token: int
    gap_in_reference: float
    gap_in_other: float


@dataclass
class Agreement:
    """Tokens and logits of one contender in one dtype beside the reference's."""

    equal_tokens: int = 0
    all_tokens: int = 0
    logit_difference: float = 0.0
    divergences: list[Divergence] = field(default_factory=list)


@dataclass
class Figures:
    """What was measured of one contender; the first contender is the others' reference.

    Bytes, seconds, and the root mean square distance of the logits from the reference's in fp32.
    `read_gbps` is what the machine reads, `of_read` how much of it decoding does.
    """

    library: str
    attention: str
    agreement: dict[str, Agreement] = field(default_factory=dict)
    logit_error: float = 0.0
    largest_logit: float = 0.0
    rounds: int = 0
    tokens_per_s: float = 0.0
    slowest: float = 0.0
    fastest: float = 0.0
    first_token_s: float = 0.0
    prefill_s: float = 0.0
    bytes_a_token: int = 0
    read_gbps: float = 0.0
    of_read: float = 0.0
    load_s: float = 0.0
    memory_before: int = 0
    peak: int = 0
    peak_gpu: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)


class ContenderFailed(RemoteFailed):
    """A contender's process ended before it answered; its own message is on stderr."""


class Contestant(Remote):
    """A contender's process; raises ContenderFailed where it fails."""

    def __init__(self, library: str, attention: str, directory: Path, device: str) -> None:
        arguments = (library, attention, str(directory), device)
        super().__init__(f"{library} ({attention})", "bench.demo.contender", *arguments)

    def answer(self, limit_s: float | None = None) -> dict[str, Any]:
        """As a Remote's, and what helps."""
        try:
            return super().answer(limit_s)
        except RemoteFailed as failed:
            raise ContenderFailed(f"{failed}. --no-compare leaves the comparison out") from None


class Comparison:
    """Contenders started early, so that they import their libraries meanwhile."""

    def __init__(
        self, contenders: Sequence[tuple[str, str]], directory: Path, device: str, dtype: str
    ) -> None:
        self.dtype, self.device = dtype, device
        self.figures = [Figures(*contender) for contender in contenders]
        self.remotes = [Contestant(*contender, directory, device) for contender in contenders]
        for remote in self.remotes:
            remote.start("warm_up")

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        for remote in self.remotes:
            remote.close()

    def run(self, prompts: Sequence[list[int]], new: int) -> list[Figures]:
        """Figures of every contender on token ids; `new` tokens are generated after each prompt.

        Loading comes first, one after the other and with the file in the page cache. Then tokens
        and logits, which also warm up, then up to ROUNDS interleaved rounds of `new` tokens after
        the first prompt for the times, ROUNDS more of a prompt of PREFILL tokens, then the peak of
        memory, and last the same in fp32 (tokens of the reference and of the last contender only).
        """
        pairs = list(zip(self.remotes, self.figures, strict=True))
        for remote, figures in pairs:
            figures.memory_before = remote.answer()["memory_before"]
        for remote, figures in pairs:
            figures.__dict__.update(remote.ask("load", dtype=self.dtype))
        everyone = range(len(pairs))
        self._tokens(prompts, new, self.dtype, everyone)
        logits = self._logits(prompts, self.dtype)
        self._times(prompts[0], new)
        self._prefill(prompts[0])
        for remote, figures in pairs:
            figures.__dict__.update(remote.ask("memory"))
        exact = logits[0]
        if self.dtype != EXACT:
            for remote in self.remotes:
                remote.ask("load", dtype=EXACT)
            self._tokens(prompts, new, EXACT, (0, everyone[-1]))
            exact = self._logits(prompts, EXACT)[0]
        for figures, theirs in zip(self.figures, logits, strict=True):
            figures.logit_error = float((theirs - exact).double().square().mean().sqrt())
            figures.largest_logit = float(theirs.abs().max())
        return self.figures

    def _tokens(
        self, prompts: Sequence[list[int]], new: int, dtype: str, which: Sequence[int]
    ) -> None:
        for index, prompt in enumerate(prompts):
            texts = {
                i: self.remotes[i].ask("generate", ids=prompt, new=new, endless=False)["tokens"]
                for i in which
            }
            for i, text in texts.items():
                agreement = self.figures[i].agreement.setdefault(dtype, Agreement())
                same = common_prefix(texts[0], text)
                agreement.equal_tokens += same
                agreement.all_tokens += max(len(texts[0]), len(text))
                if same < min(len(texts[0]), len(text)):
                    pair = (texts[0][same], text[same])
                    gaps = self._gaps(i, prompt + text[:same], *pair)
                    agreement.divergences.append(Divergence(dtype, index, same, *pair, *gaps))

    def _gaps(self, which: int, ids: list[int], a: int, b: int) -> tuple[float, float]:
        both = (self.remotes[0], self.remotes[which])
        first, other = (logits_of(remote, ids)[-1] for remote in both)
        return float(first[a] - first[b]), float(other[a] - other[b])

    def _logits(self, prompts: Sequence[list[int]], dtype: str) -> list[Tensor]:
        each = [torch.cat([logits_of(r, ids) for ids in prompts]) for r in self.remotes]
        for figures, theirs in zip(self.figures, each, strict=True):
            agreement = figures.agreement.setdefault(dtype, Agreement())
            agreement.logit_difference = float((theirs - each[0]).abs().max())
        return each

    def _times(self, prompt: list[int], new: int) -> None:
        taken: list[list[dict[str, Any]]] = [[] for _ in self.remotes]
        gbps = read_gbps(self.device)
        start = time.monotonic()
        for round_index in range(ROUNDS):
            if round_index and time.monotonic() - start > ENOUGH_S:
                break
            for turn in range(len(self.remotes)):
                which = (round_index + turn) % len(self.remotes)
                answer = self.remotes[which].ask("generate", ids=prompt, new=new, endless=True)
                assert len(answer["tokens"]) == new
                taken[which].append(answer)
        for figures, answers in zip(self.figures, taken, strict=True):
            rates = [answer["tokens_per_s"] for answer in answers]
            figures.rounds = len(rates)
            figures.tokens_per_s = statistics.median(rates)
            figures.slowest, figures.fastest = min(rates), max(rates)
            figures.first_token_s = statistics.median(a["first_token_s"] for a in answers)
            figures.read_gbps = gbps
            figures.of_read = figures.tokens_per_s * figures.bytes_a_token / 1e9 / gbps

    def _prefill(self, prompt: list[int]) -> None:
        ids = (prompt * PREFILL)[:PREFILL]
        taken: list[list[float]] = [[] for _ in self.remotes]
        for round_index in range(ROUNDS + 1):
            for turn in range(len(self.remotes)):
                which = (round_index + turn) % len(self.remotes)
                taken[which].append(self.remotes[which].ask("prefill", ids=ids)["prefill_s"])
        for figures, seconds in zip(self.figures, taken, strict=True):
            figures.prefill_s = statistics.median(seconds[1:])  # the first warms up


def logits_of(remote: Remote, ids: list[int]) -> Tensor:
    """Logits (T, V) in fp32 from a contender."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits.pt"
        remote.ask("logits", ids=ids, file=str(file))
        return torch.load(file, weights_only=True)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens agree."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
