"""The engine on one GPU beside vLLM's figures and the card's roof.

    python benchmarks/engine_gpu.py [--models a,b] [--cells x,y] [--json FILE] [--plot PNG]

Configurations are the published ones (`model_configs/`), weights random, outputs greedy to their
full length, everything in one process. Cells:
    decode-B     ms a step with B sequences at context 1,024: (time for 129 tokens - for 1) / 128
    prefill-NxL  prompt tokens a second of N prompts of L tokens, to the first token of each
    ttft         ms to the first token of an 8,256-token prompt, never seen and seen before
    workload     tokens a second of 256 requests, input and output lengths uniform in 100 to 1,024
    start        seconds from the start of a process, weights on disk, to its first token
Every cell is measured several times after a warm-up and the median counts. A roof is the bytes that
must move over the card's copy rate or the operations over its matrix rate, whichever takes longer.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import math
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import random_models
import torch
import triton
from safetensors.torch import save_file

from tasuki_common.sampling import SamplingParams
from tasuki_engine.config import EngineConfig
from tasuki_engine.engine import Engine
from tasuki_engine.model_config import ModelConfig
from tasuki_engine.request import EngineRequest

COPY_RATE, MATRIX_RATE = 4.3e12, 780e12
"""Of an H200, measured: bytes and bf16 operations a second."""
MODELS = ("qwen3-0.6b", "qwen3-8b", "granite-h-micro", "nemotron-h-8b")
DECODES, CONTEXT, STEPS = (1, 32, 128, 256), 1024, 128
PREFILLS = ((1, 2048), (1, 8192), (16, 2048), (8, 8192))
TTFT_TOKENS = 8256
CELL_SECONDS = 5.0
VLLM: dict[str, tuple[float, ...]] = {
    "decode-1": (1.667, 5.163, 5.450, 4.561),
    "decode-32": (2.656, 6.771, 6.817, 7.231),
    "decode-128": (5.789, 11.30, 13.41, 13.69),
    "decode-256": (10.17, 19.12, 20.53, 23.90),
    "prefill-1x2048": (145452, 40705, 16026, 19466),
    "prefill-1x8192": (256480, 38584, 50830, 37732),
    "prefill-16x2048": (380177, 42678, 71737, 39452),
    "prefill-8x8192": (275716, 38267, 75461, 38951),
    "ttft-miss": (37.3, 213, 142.7, 221),
    "ttft-hit": (8.2, 10.9, 45.2, 36.5),
    "start": (64, 55, 170, 150),
}
"""vLLM 0.24.0 on one H200, 2026-11-22, in the order of MODELS."""
GOALS: dict[str, tuple[float, ...]] = {
    "decode-1": (0.8, 4.3, 2.1, 4.1),
    "decode-32": (1.8, 6.2, 3.8, 6.2),
    "decode-256": (9.2, 16, 14, 19),
    "prefill-8x8192": (300e3, 40e3, 90e3, 43e3),
    "ttft-miss": (31, 205, 110, 200),
    "ttft-hit": (5, 9, 10, 12),
    "start": (20, 20, 20, 20),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a model's tokens cost: parameters, and bytes and operations per token or sequence."""

    weight_bytes: float
    kv_bytes: float
    state_bytes: float
    matrix_ops: float
    attention_ops: float
    """Per token and token of context."""

    @classmethod
    def of(cls, fields: ModelConfig, engine: Engine) -> "Work":
        shapes = random_models.shapes(fields)
        embedding = next(math.prod(s) for n, s in shapes.items() if "embed" in n)
        params = sum(math.prod(shape) for shape in shapes.values())
        tied = "lm_head.weight" not in shapes
        read = params - (0 if tied else embedding)
        layers = fields.layer_types().count("attention")
        heads = int(fields.get("num_attention_heads")) * fields.head_dim
        return cls(
            weight_bytes=2 * read,
            kv_bytes=engine.plan.block_bytes / engine.config.block_size,
            state_bytes=engine.plan.slot_bytes,
            matrix_ops=2 * (read - embedding),
            attention_ops=4 * heads * layers,
        )

    def step_ms(self, sequences: int, context: int) -> float:
        moved = self.weight_bytes + sequences * (self.kv_bytes * context + 2 * self.state_bytes)
        return 1e3 * moved / COPY_RATE

    def prompt_ms(self, tokens: int) -> float:
        return 1e3 * tokens * (self.matrix_ops + self.attention_ops * tokens / 2) / MATRIX_RATE


class Bench:
    """One engine, and requests that are all different."""

    def __init__(
        self, folder: Path, state_dtype: torch.dtype | None = None, **settings: object
    ) -> None:
        device = torch.device("cuda")
        self.fields = ModelConfig.read(folder)
        self.model = random_models.build(folder, device, state_dtype=state_dtype)
        self.engine = Engine(
            EngineConfig(model=str(folder), device="cuda", **settings),  # type: ignore[arg-type]
            self.model,
        )
        self.work = Work.of(self.fields, self.engine)
        self._draw = random.Random(0)
        self._count = 0
        gc.collect()
        gc.freeze()  # as a pod does

    def prompt(self, length: int) -> list[int]:
        """Tokens never used before."""
        return self._draw.choices(range(self.model.vocab_size), k=length)

    def run(self, prompts: list[list[int]], lengths: list[int]) -> float:
        """Seconds to complete all of them."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        for prompt, length in zip(prompts, lengths, strict=True):
            self._count += 1
            params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
            request = EngineRequest(
                request_id=str(self._count), prompt_token_ids=prompt, sampling=params
            )
            self.engine.add_request(request)
        tokens = 0
        while self.engine.has_work():
            for output in self.engine.step().outputs:
                assert output.error is None, output.error
                tokens += len(output.token_ids)
        assert tokens == sum(lengths)
        return time.perf_counter() - started


Found = dict[str, tuple[float, float]]
"""By cell: the figure, and its roof."""


def first_token(folder: Path) -> None:
    """One request on a fresh engine, weights from `folder`."""
    engine = Engine(EngineConfig(model=str(folder), device="cuda"))
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    engine.add_request(
        EngineRequest(request_id="first", prompt_token_ids=[1] * 128, sampling=params)
    )
    while engine.has_work():
        engine.step()


def start(configs: Path, repeats: int) -> Found:
    """Seconds; the first process fills the kernel cache and the page cache and does not count."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(configs / "config.json", folder)
        fields = ModelConfig.read(folder)
        tensors = random_models.tensors(fields, torch.device("cuda"), torch.bfloat16)
        on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
        save_file(on_host, folder / "model.safetensors")
        del tensors, on_host
        torch.cuda.empty_cache()

        def once() -> float:
            started = time.perf_counter()
            subprocess.run([sys.executable, __file__, "--first-token", name], check=True)
            return time.perf_counter() - started

        return {"start": (_median(once, repeats), math.nan)}


def decode(bench: Bench, sequences: int, repeats: int) -> Found:
    """ms a step."""

    def once() -> float:
        prompts = [bench.prompt(CONTEXT) for _ in range(sequences)]
        one = bench.run(prompts, [1] * sequences)
        prompts = [bench.prompt(CONTEXT) for _ in range(sequences)]
        many = bench.run(prompts, [STEPS + 1] * sequences)
        return 1e3 * (many - one) / STEPS

    # Every batch size on the way down has its graph before the time counts.
    short = [bench.prompt(64) for _ in range(sequences)]
    bench.run(short, [2 + i for i in range(sequences)])
    roof = bench.work.step_ms(sequences, CONTEXT + STEPS // 2)
    return {f"decode-{sequences}": (_median(once, repeats), roof)}


def prefill(bench: Bench, count: int, length: int, repeats: int) -> Found:
    """Tokens a second."""

    def once() -> float:
        prompts = [bench.prompt(length) for _ in range(count)]
        return count * length / bench.run(prompts, [1] * count)

    roof = 1e3 * length / bench.work.prompt_ms(length)
    return {f"prefill-{count}x{length}": (_median(once, repeats), roof)}


def ttft(bench: Bench, repeats: int) -> Found:
    """ms; the second time all but the last tokens are found. Two rounds warm up: a short rest runs
    in a graph from its third time on."""
    found: dict[str, list[float]] = {"ttft-miss": [], "ttft-hit": []}
    for repeat in range(repeats + 2):
        prompt = bench.prompt(TTFT_TOKENS)
        for values in found.values():
            milliseconds = 1e3 * bench.run([prompt], [1])
            if repeat >= 2:
                values.append(milliseconds)
    roofs = {"ttft-miss": bench.work.prompt_ms(TTFT_TOKENS), "ttft-hit": bench.work.step_ms(1, 0)}
    return {cell: (statistics.median(values), roofs[cell]) for cell, values in found.items()}


def workload(bench: Bench, repeats: int) -> Found:
    """Output tokens a second of the workload that small engines publish."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    lengths = [rng.randint(100, 1024) for _ in range(256)]

    def once() -> float:
        shifted = [[(token + bench._count) % bench.model.vocab_size for token in prompt]
                   for prompt in prompts]  # fmt: skip
        return sum(lengths) / bench.run(shifted, lengths)

    return {"workload": (_median(once, repeats), math.nan)}


def _median(once: Callable[[], float], repeats: int) -> float:
    """Of so many, or of those that CELL_SECONDS leave time for; one to warm up does not count."""
    once()
    values: list[float] = []
    started = time.perf_counter()
    while not values or (len(values) < repeats and time.perf_counter() - started < CELL_SECONDS):
        values.append(once())
    return statistics.median(values)


def cells(bench: Bench, wanted: list[str], repeats: int) -> Found:
    """All cells whose names begin with one of `wanted`."""
    todo: list[tuple[str, Callable[[], Found]]] = []
    for sequences in DECODES:
        todo.append((f"decode-{sequences}", lambda n=sequences: decode(bench, n, repeats)))  # type: ignore[misc]
    for count, length in PREFILLS:
        cell = f"prefill-{count}x{length}"
        todo.append((cell, lambda n=count, m=length: prefill(bench, n, m, repeats)))  # type: ignore[misc]
    todo.append(("ttft", lambda: ttft(bench, repeats)))
    todo.append(("workload", lambda: workload(bench, 1)))
    found: Found = {}
    for name, measure in todo:
        if any(name == each or name.startswith(f"{each}-") for each in wanted):
            found |= measure()
    return found


def line(model: str, cell: str, value: float, roof: float) -> str:
    """One row of the table."""
    place = MODELS.index(model)
    peer, goal = VLLM.get(cell), GOALS.get(cell)
    slower = cell.startswith(("decode", "ttft", "start"))
    gain = (
        "" if peer is None else f"{(peer[place] / value if slower else value / peer[place]):.2f}x"
    )
    met = "" if goal is None else ("met" if (value <= goal[place]) == slower else "MISSED")
    figures = [value, roof, peer[place] if peer else math.nan, goal[place] if goal else math.nan]
    columns = "".join(f"{figure:>12,.3f}" if abs(figure) < 1000 else f"{figure:>12,.0f}"
                      for figure in figures)  # fmt: skip
    return f"{model:<17}{cell:<17}{columns}  {gain:>6}  {met}"


def measure(model: str, folder: Path, options: argparse.Namespace) -> Found:
    """All cells of a model, printed as they come."""
    wanted, results = options.cells.split(","), Found()
    if "start" in wanted:  # alone on the device
        results |= start(folder, options.repeats)
        print(line(model, "start", *results["start"]), flush=True)
        wanted.remove("start")
    if not wanted:
        return results
    state_dtype = getattr(torch, options.state_dtype) if options.state_dtype else None
    bench = Bench(folder, state_dtype, max_num_batched_tokens=options.step_tokens)
    spec = bench.model.cache_spec.state
    print(f"# {model}: state {spec.ssm_dtype if spec else 'none'}, {bench.engine.plan}")
    for each in wanted:
        found = cells(bench, [each], options.repeats)
        results |= found
        for cell, (value, roof) in found.items():
            print(line(model, cell, value, roof), flush=True)
    bench.engine.check_integrity()
    return results


def plot(path: Path, results: dict[str, Found]) -> None:
    """Milliseconds a decode step beside vLLM's and the roof, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(results), figsize=(3 * len(results), 3.2), squeeze=False
    )
    for axes, (model, found) in zip(panels[0], results.items(), strict=True):
        measured = [batch for batch in DECODES if f"decode-{batch}" in found]
        values, roofs = zip(*(found[f"decode-{batch}"] for batch in measured), strict=True)
        peers = [VLLM[f"decode-{batch}"][MODELS.index(model)] for batch in measured]
        for name, figures, style in (
            ("vLLM 0.24", peers, "s--"),
            ("tasuki", values, "o-"),
            ("roof", roofs, "k:"),
        ):
            axes.plot(measured, figures, style, label=name)
        axes.set_xscale("log", base=2)
        axes.set(title=model, xlabel="sequences at context 1,024", ylim=(0, None))
        axes.set_xticks(measured, [str(batch) for batch in measured], fontsize=7)
    panels[0][0].set_ylabel("ms a step")
    panels[0][0].legend()
    figure.savefig(path, dpi=130, bbox_inches="tight")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", type=Path, default=Path(__file__).parent / "model_configs")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--cells", default="start,decode,prefill,ttft,workload")
    parser.add_argument("--state-dtype", choices=("float32", "bfloat16"), help="of all models")
    parser.add_argument("--step-tokens", type=int, help="prompt tokens a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="of the decode cells")
    parser.add_argument("--first-token", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_token:
        first_token(options.first_token)
        return
    print(
        f"{torch.cuda.get_device_name()}, {datetime.date.today()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, "
        "bfloat16\n"
        f"{'model':<17}{'cell':<17}{'tasuki':>12}{'roof':>12}{'vLLM 0.24':>12}{'goal':>12}"
    )
    results: dict[str, Found] = {}
    for model in options.models.split(","):
        results[model] = measure(model, options.configs / model, options)
        gc.unfreeze()
        gc.collect()
        torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.plot:
        plot(options.plot, results)


if __name__ == "__main__":
    main()
