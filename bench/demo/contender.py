"""One model of one library, and what is asked of it, in a process of its own (bench.remote)."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.demo.bandwidth import bytes_a_token
from bench.remote import serve_here


class Stopwatch:
    """A streamer for either library's generate that keeps when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt first, then each token, on the CPU, so the device has finished it."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""

    def figures(self) -> dict[str, float]:
        """Seconds to the first token and tokens per second after it."""
        prompt, first, *rest = self.times
        rate = len(rest) / (rest[-1] - first) if rest else 0.0
        return {"first_token_s": first - prompt, "tokens_per_s": rate}


class Contender:
    """A library ("transformers" or "swathe") with one attention backend, on one checkpoint."""

    def __init__(self, library: str, attention: str, directory: str, device: str) -> None:
        self.library, self.attention = library, attention
        self.directory, self.device = directory, torch.device(device)
        self.model: Any = None

    def warm_up(self) -> dict[str, Any]:
        """Import the library; its own loading is not part of a model's."""
        self.auto = auto_class(self.library)
        return {"memory_before": resident_bytes("VmRSS"), "threads": torch.get_num_threads()}

    def load(self, dtype: str) -> dict[str, Any]:
        """Load the checkpoint in `dtype` and put it on the device; seconds."""
        self.model = None
        wanted: dict[str, Any] = {
            "dtype": getattr(torch, dtype),
            "attn_implementation": self.attention,
        }
        start = time.perf_counter()
        if self.library == "swathe":
            self.model = self.auto.from_pretrained(
                self.directory, device_map=self.device, progress=False, **wanted
            )
        else:
            self.model = self.auto.from_pretrained(self.directory, **wanted).to(self.device)
            self.model.eval()
        self._wait()
        seconds = time.perf_counter() - start
        return {"load_s": seconds, "bytes_a_token": bytes_a_token(self.model)}

    def generate(self, ids: list[int], new: int, endless: bool) -> dict[str, Any]:
        """Greedy tokens after `ids`, at most `new`; `endless` goes on behind an end of text."""
        prompt = torch.tensor([ids], device=self.device)
        watch = Stopwatch()
        options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "streamer": watch}
        if self.library == "swathe":
            out = self.model.generate(prompt, eos_token_id=[] if endless else None, **options)
        else:
            stored = self.model.generation_config.eos_token_id
            self.model.generation_config.eos_token_id = None if endless else stored
            out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            self.model.generation_config.eos_token_id = stored
        return {"tokens": out[0, len(ids) :].tolist(), **watch.figures()}

    @torch.no_grad()
    def logits(self, ids: list[int], file: str) -> dict[str, Any]:
        """Logits (T, V) of `ids` in fp32, written to `file`."""
        logits = self.model(torch.tensor([ids], device=self.device)).logits[0]
        torch.save(logits.float().cpu(), file)
        return {}

    @torch.no_grad()
    def prefill(self, ids: list[int]) -> dict[str, Any]:
        """Seconds for a prompt: its keys and values cached, logits of the last position."""
        prompt = torch.tensor([ids], device=self.device)
        start = time.perf_counter()
        self.model(prompt, use_cache=True, logits_to_keep=1)
        self._wait()
        return {"prefill_s": time.perf_counter() - start}

    def memory(self) -> dict[str, Any]:
        """Peak bytes: resident in the process, and allocated on the GPU (0 without one)."""
        on_gpu = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return {"peak": resident_bytes("VmHWM"), "peak_gpu": on_gpu}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def auto_class(library: str) -> Any:
    """AutoModelForCausalLM of a library."""
    if library == "swathe":
        import swathe

        return swathe.AutoModelForCausalLM
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, mapped files included."""
    # ru_maxrss would also count the parent's memory, which a new process shares for a moment
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    serve_here(Contender(*sys.argv[1:]))
