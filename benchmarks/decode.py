"""Decode rate of the engine on the CPU beside transformers with its cache, in one process and run.

    python benchmarks/decode.py [--model FOLDER] [--threads 1] [--repeats 5] [--plot FILE.png]

Greedy, float32, 64-token prompts, equally many threads. A rate is (tokens - 1) of each sequence
over the time beyond that of a first token alone; the two take turns, and medians count.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tasuki_engine import LLM, SamplingParams

DEMO = Path(__file__).parent.parent / "examples" / "models" / "demo"
PROMPT_TOKENS = 64
BATCHES = (1, 16)
GOALS = {"alone": 2.0, "16 together, to its one": 10.0}

Generate = Callable[[list[list[int]], int], list[list[int]]]


def engine_generate(llm: LLM) -> Generate:
    """Continues prompts by so many tokens with the engine."""

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        # As min_new_tokens does: the end token is masked, not passed over.
        params = SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def transformers_generate(model: Any) -> Generate:
    """The same with transformers' own loop and cache."""

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=0,
            )
        tokens: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return tokens

    return generate


def rate(generate: Generate, prompts: list[list[int]], count: int) -> float:
    """Decoded tokens a second, over all prompts."""
    started = time.perf_counter()
    generate(prompts, 1)
    first = time.perf_counter() - started
    started = time.perf_counter()
    generate(prompts, count)
    whole = time.perf_counter() - started
    return len(prompts) * (count - 1) / (whole - first)


def measure(
    generators: dict[str, Generate], vocab_size: int, count: int, repeats: int
) -> dict[str, dict[int, list[float]]]:
    """Rates by generator and batch size; the first round warms up and does not count."""
    rates: dict[str, dict[int, list[float]]] = {name: {} for name in generators}
    for batch in BATCHES:
        for repeat in range(repeats + 1):
            shape = (batch, PROMPT_TOKENS)
            prompts = torch.randint(8, vocab_size, shape).tolist()
            for name, generate in generators.items():
                found = rate(generate, prompts, count)
                if repeat:
                    rates[name].setdefault(batch, []).append(found)
    return rates


def equal_tokens(generators: dict[str, Generate], vocab_size: int) -> bool:
    """Whether all generators continue a prompt alike."""
    prompts = torch.randint(8, vocab_size, (2, PROMPT_TOKENS)).tolist()
    answers = [generate(prompts, 32) for generate in generators.values()]
    return all(answer == answers[0] for answer in answers)


def ratios(medians: dict[str, dict[int, float]]) -> dict[str, float]:
    """The engine's rates over those of transformers."""
    ours, theirs = medians["tasuki"], medians["transformers"]
    return {
        "alone": ours[1] / theirs[1],
        "16 together, to its 16": ours[16] / theirs[16],
        "16 together, to its one": ours[16] / theirs[1],
    }


def table(medians: dict[str, dict[int, float]], found: dict[str, float]) -> str:
    """What was found, for people."""
    lines = [f"{'tokens/s':<26}{'alone':>10}{'16 together':>14}"]
    for name, by_batch in medians.items():
        lines.append(f"{name:<26}{by_batch[1]:>10.0f}{by_batch[16]:>14.0f}")
    lines.append("")
    for name, value in found.items():
        goal = f"  (goal {GOALS[name]:g}x)" if name in GOALS else ""
        lines.append(f"{name:<26}{value:>9.1f}x{goal}")
    return "\n".join(lines)


def plot(medians: dict[str, dict[int, float]], path: Path) -> None:
    """Bars of the rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for place, (name, by_batch) in enumerate(medians.items()):
        at = [index + 0.38 * (place - 0.5) for index in range(len(BATCHES))]
        bars = axes.bar(at, [by_batch[batch] for batch in BATCHES], 0.36, label=name)
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(range(len(BATCHES)), ["1 sequence", "16 sequences"])
    axes.set_ylabel("decoded tokens/s")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="writes the results here")
    parser.add_argument("--plot", type=Path, help="writes a PNG here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    llm = LLM(
        model=str(options.model),
        dtype="float32",
        device="cpu",
        cpu_threads=options.threads,
        enable_prefix_caching=False,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    torch.set_num_threads(options.threads)
    generators = {
        "transformers": transformers_generate(model.eval()),
        "tasuki": engine_generate(llm),
    }
    vocab_size = model.config.vocab_size
    same = equal_tokens(generators, vocab_size)
    rates = measure(generators, vocab_size, options.tokens, options.repeats)
    medians = {
        name: {batch: statistics.median(values) for batch, values in by_batch.items()}
        for name, by_batch in rates.items()
    }
    found = ratios(medians)
    print(
        f"{options.model.name}, float32, {options.threads} thread(s) of {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}, {datetime.date.today()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; greedy tokens equal: {same}\n"
    )
    print(table(medians, found))
    if options.json:
        options.json.write_text(json.dumps({"rates": rates, "ratios": found}, indent=1))
    if options.plot:
        plot(medians, options.plot)


if __name__ == "__main__":
    sys.exit(main())
