"""Finds the fastest kernel of every matrix product of a model, on the card it runs on.

    python benchmarks/tune_kernels.py --out kernels/tasuki_kernels/tuned/nvidia_h200.json

A product is measured where it stands: in the captured decode step of the whole model, so many
sequences at 1,024 tokens of context. What a kernel does to its neighbours, which start before it
has ended, counts as well as its own time. One product's choice is changed at a time and kept when
the step became shorter by more than the noise, twice. The output is a table as
`tasuki_kernels.tuning` reads it; entries of other shapes in it stay. Candidates are compiled by
several processes first.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import Pool
from pathlib import Path

import engine_gpu
import torch
import triton

from tasuki_common.sampling import SamplingParams
from tasuki_engine.request import EngineRequest
from tasuki_kernels import gemm
from tasuki_kernels.gemm import Activation, Plan
from tasuki_kernels.norm import RmsNorm

NOISE = 0.001
LOOKS = 3
"""At each product, for a choice counts together with its neighbours'."""
SECOND_LOOK = 6
"""Candidates of a product that are measured again once its neighbours have changed."""
MIN_COUNT = 4
"""Of several rows: rarer products, the head among them, stay with torch."""
DEVICE = "cuda"
SHARED_BYTES = 200 << 10
_by_table = gemm.plan_for


@dataclasses.dataclass(frozen=True)
class Product:
    """`rows` rows times weight [outputs, inputs].

    adds: into the residual; others follow a norm. float32: of the head, whose results are, and
    whose norm has its weight.
    """

    rows: int
    outputs: int
    inputs: int
    activation: Activation | None
    adds: bool
    float32: bool

    @property
    def key(self) -> str:
        """Its place in a table."""
        return "/".join(
            map(str, gemm.table_key(self.rows, self.outputs, self.inputs, self.activation))
        )


class Plans:
    """Stands in for `gemm.plan_for`: collects a step's products, and plans them as it is told."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.products: dict[Product, int] = {}
        """And how often a step has each."""
        self.chosen: dict[Product, Plan] = {}

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, *activation: Activation | None
    ) -> Plan:
        """Products that add have no activation to name."""
        outputs, inputs = weight.shape
        product = Product(
            gemm.rows_of_table(x.shape[0]),
            outputs,
            inputs,
            activation[0] if activation else None,
            adds=not activation,
            float32=outputs == self.vocab_size,
        )
        self.products[product] = self.products.get(product, 0) + 1
        return self.chosen.get(product) or _by_table(x, weight, *activation)


def candidates(product: Product) -> Iterator[Plan]:
    """Plans worth a measurement, torch's first."""
    yield Plan("torch", {})
    yield from (_vector_candidates if product.rows == 1 else _split_candidates)(product)


def _vector_candidates(product: Product) -> Iterator[Plan]:
    matrices = 2 if product.activation == "swiglu" else 1
    blocks = {triton.next_power_of_2(product.inputs), product.inputs & -product.inputs}
    for block in sorted(blocks):
        chunks = -(-product.inputs // block)
        for warps in (1, 2, 4, 8):
            for block_out in (1, 2, 4, 8):
                held = 2 * matrices * block_out * chunks * block // (32 * warps)
                if block >= 128 * warps and chunks <= 24 and 64 <= held <= 400:
                    constants = {"BLOCK_OUT": block_out, "BLOCK_IN": block, "num_warps": warps}
                    yield Plan("vector", constants)


def _split_candidates(product: Product) -> Iterator[Plan]:
    shapes = [(64, 64, 8), (64, 128, 5), (64, 128, 3), (64, 256, 4), (128, 128, 4)]
    if product.outputs <= 2048:
        shapes.append((32, 64, 8))
    for (block_out, block_in, most_stages), split in itertools.product(shapes, (1, 2, 4, 8)):
        programs = -(-product.outputs // block_out) * split
        part = product.inputs // split
        fitting = SHARED_BYTES // (2 * block_in * (block_out + product.rows))
        stages = min(fitting, part // block_in + 1, most_stages)
        if part * split != product.inputs or part % block_in or stages < 3:
            continue
        if programs < 96 or (programs > 300 and split > 1):
            continue
        for early, prefetch in ((0, 0), (1, 0), (1, 256)):
            constants = {
                "BLOCK_OUT": block_out,
                "BLOCK_IN": block_in,
                "SPLIT": split,
                "STAGES": stages,
                "EARLY": early,
                "PREFETCH": min(prefetch, part),
                "num_warps": 4,
            }
            yield Plan("split", constants)


class Step:
    """A model's decode step of so many sequences, to be captured as often as one likes."""

    def __init__(self, folder: Path, rows: int) -> None:
        bench = engine_gpu.Bench(folder, memory_share=0.6)  # the rest is for compiling processes
        self.rows = rows
        self.engine = bench.engine
        self.plans = Plans(bench.model.vocab_size)
        params = SamplingParams(temperature=0.0, max_tokens=engine_gpu.STEPS, ignore_eos=True)
        for number in range(rows):
            prompt = bench.prompt(engine_gpu.CONTEXT)
            request = EngineRequest(
                request_id=str(number), prompt_token_ids=prompt, sampling=params
            )
            self.engine.add_request(request)
        prompts_a_step = self.engine.plan.max_num_batched_tokens // engine_gpu.CONTEXT
        for _ in range(rows // prompts_a_step + 8):
            self.engine.step()
        # What the last step has left where graphs read: inputs of that many decodes.
        torch.cuda.synchronize()
        gemm.plan_for = self.plans
        self.run()

    @torch.inference_mode()
    def run(self) -> None:
        """Computes the same tokens again."""
        self.engine._runner._decode(self.rows)


def microseconds(run: Callable[[], None]) -> float:
    """Of one run, captured: the least of several replays."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    best = float("inf")
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 500.0)
    return best


def tune(step: Step, options: dict[Product, list[Plan]], deadline: float) -> tuple[float, float]:
    """Chooses a plan for each product; microseconds of a step before and after."""
    chosen = step.plans.chosen = {product: plans[0] for product, plans in options.items()}
    at_first = microseconds(step.run)
    for _ in range(LOOKS):
        for product, plans in options.items():
            taken: dict[int, float] = {}
            best = chosen[product]
            fastest = microseconds(step.run)
            for number, plan in enumerate(plans):
                if time.monotonic() > deadline:
                    break
                chosen[product] = plan
                taken[number] = microseconds(step.run)
                if taken[number] < fastest * (1.0 - NOISE):
                    again = max(taken[number], microseconds(step.run))
                    if again < fastest * (1.0 - NOISE):
                        best, fastest = plan, again
            chosen[product] = best
            # A second look is for those that came near.
            nearest = sorted(taken, key=lambda number: taken[number])[:SECOND_LOOK]
            options[product] = [plans[number] for number in nearest]
    return at_first, microseconds(step.run)


Job = tuple[int, Product, Plan]


def compile_all(pool: Pool, jobs: Sequence[Job], deadline: float) -> set[int]:
    """Numbers of the jobs whose kernels are in Triton's cache; by the deadline perhaps not all."""
    compiled = set()
    for number in pool.imap_unordered(compile_one, jobs, chunksize=1):
        compiled.add(number)
        if time.monotonic() > deadline:
            break
    return compiled


def compile_one(job: Job) -> int:
    """Runs it once, which leaves the compiled kernel in the cache."""
    number, product, plan = job

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device=DEVICE, dtype=torch.bfloat16)

    x, weight = empty(product.rows, product.inputs), empty(product.outputs, product.inputs)
    if product.adds:
        residual = empty(product.rows, product.outputs)
        gemm.add_linear_(residual, x, weight, scale=0.1, plan=plan)
    else:
        gemm.linear(
            x,
            weight,
            norm=RmsNorm(empty(product.inputs) if product.float32 else None, 1e-6),
            activation=product.activation,
            dtype=torch.float32 if product.float32 else None,
            plan=plan,
        )
    torch.cuda.synchronize()
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="table to write or to extend")
    parser.add_argument("--configs", type=Path, default=Path(__file__).parent / "model_configs")
    parser.add_argument("--models", nargs="+", default=list(engine_gpu.MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 32, 64])
    parser.add_argument("--processes", type=int, default=15, help="that compile candidates")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit; what is found is kept")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    table = json.loads(arguments.out.read_bytes()) if arguments.out.exists() else {}
    steps = list(itertools.product(arguments.rows, arguments.models))
    tuned: set[str] = set()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        pool.map(time.sleep, [1.0] * arguments.processes, chunksize=1)  # until all have started
        for left, (rows, model) in zip(range(len(steps), 0, -1), steps, strict=True):
            step = Step(arguments.configs / model, rows)
            share = (end - time.monotonic()) / left
            middle, deadline = time.monotonic() + 0.6 * share, time.monotonic() + share
            # Of a shape that two models have, the first one's choice stands.
            products = [
                product
                for product, count in step.plans.products.items()
                if product.key not in tuned and (rows == 1 or count >= MIN_COUNT)
            ]
            every = [(product, plan) for product in products for plan in candidates(product)]
            jobs = [(number, *job) for number, job in enumerate(every)]
            compiled = compile_all(pool, jobs, middle)
            options: dict[Product, list[Plan]] = {product: [] for product in products}
            for number, product, plan in jobs:
                if number in compiled or plan.kernel == "torch":
                    options[product].append(plan)
            at_first, fastest = tune(step, options, deadline)
            for product in products:
                plan = step.plans.chosen[product]
                for kernel in gemm.KERNELS:
                    table.setdefault(f"gemm_{kernel}", {}).pop(product.key, None)
                table[f"gemm_{plan.kernel}"][product.key] = dict(plan.constants)
                print(f"    {product.key}: {plan.kernel} {list(plan.constants.values())}")
                tuned.add(product.key)
            arguments.out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            print(
                f"{model}, {rows} rows: {fastest:.1f} us a step, torch's products {at_first:.1f}; "
                f"{len(compiled)} of {len(jobs)} candidates",
                flush=True,
            )
            gemm.plan_for = _by_table
            del step
            gc.unfreeze()
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
