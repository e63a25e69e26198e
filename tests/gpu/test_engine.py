"""The same engine on CUDA: float32 gives the CPU's tokens, bfloat16 stays within a stated bound."""

import random
from pathlib import Path

import pytest
import tiny_models
import torch
from draw_margins import SAFE, draw_margin
from fresh_seed import fresh_seed
from relay import compute_hand_over, greedy, run

from tasuki_common.messages import Ticket
from tasuki_engine import LLM, SamplingParams
from tasuki_engine.config import EngineConfig
from tasuki_engine.engine import Engine
from tasuki_engine.outputs import RequestOutput
from tasuki_engine.request import EngineRequest
from tasuki_transfer.giver import Giver
from tasuki_transfer.taker import Taker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]

ON_CPU = {"device": "cpu", "cpu_threads": 2}  # several tests beside each other do not spin
ON_CUDA = {"device": "cuda", "num_blocks": 2000}
FLOAT32_BOUND = 1e-3  # other summation orders; transformers against our CPU path is held to 1e-4
BFLOAT16_BOUND = 0.25  # eight bits of mantissa through logits that spread by several units


def prompts(seed: int) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    lengths = [1, 2, 17, 64, 255, 257, 500, 700]
    return [
        {"prompt_token_ids": [draw.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(length)]}
        for length in lengths
    ]


def complete(folder: str, seed: int, **settings: object) -> list[RequestOutput]:
    sampling = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, logprobs=5)
    llm = LLM(model=folder, max_num_batched_tokens=256, **settings)
    first = llm.generate(prompts(seed), sampling, use_tqdm=False)
    again = llm.generate(prompts(seed), sampling, use_tqdm=False)
    assert again[-1].num_cached_tokens == (700 - 1) // 16 * 16
    if settings["dtype"] == "float32":
        assert [r.outputs[0].token_ids for r in again] == [r.outputs[0].token_ids for r in first]
    llm.engine.check_integrity()
    return first


def sampled_logprobs(result: RequestOutput) -> list[float]:
    output = result.outputs[0]
    assert output.logprobs is not None
    pairs = zip(output.token_ids, output.logprobs, strict=True)
    return [table[token].logprob for token, table in pairs]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_float32_on_cuda_gives_the_tokens_of_the_cpu(family, tmp_path):
    seed = fresh_seed()
    folder = str(tiny_models.make(family, tmp_path, seed))
    on_cpu = complete(folder, seed, dtype="float32", **ON_CPU)
    on_cuda = complete(folder, seed, dtype="float32", **ON_CUDA)
    for cpu, cuda in zip(on_cpu, on_cuda, strict=True):
        assert cuda.outputs[0].token_ids == cpu.outputs[0].token_ids
        assert sampled_logprobs(cuda) == pytest.approx(sampled_logprobs(cpu), abs=FLOAT32_BOUND)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_an_engine_computes_on_the_device_it_is_given(tmp_path):
    seed = fresh_seed()
    folder = str(tiny_models.make("granite_hybrid", tmp_path, seed))
    expected = complete(folder, seed, dtype="float32", **ON_CPU)
    try:
        found = complete(folder, seed, dtype="float32", **{**ON_CUDA, "device": "cuda:1"})
    finally:
        torch.cuda.set_device(0)
    for one, other in zip(found, expected, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


# Between experts that stand at a tie, bfloat16 rightly chooses otherwise.
@pytest.mark.parametrize("family", [f for f in tiny_models.FAMILIES if not f.endswith("moe")])
def test_bfloat16_on_cuda_stays_within_its_bound(family, tmp_path):
    seed = fresh_seed()
    folder = str(tiny_models.make(family, tmp_path, seed))
    on_cpu = complete(folder, seed, dtype="float32", **ON_CPU)
    half = complete(folder, seed, dtype="bfloat16", **ON_CUDA)
    first = [
        abs(sampled_logprobs(cpu)[0] - sampled_logprobs(cuda)[0])
        for cpu, cuda in zip(on_cpu, half, strict=True)
        if cpu.outputs[0].token_ids[0] == cuda.outputs[0].token_ids[0]
    ]
    assert first
    assert max(first) <= BFLOAT16_BOUND


def test_what_a_step_offers_to_others_is_written(tmp_path):
    folder = str(tiny_models.make("granite_hybrid", tmp_path, fresh_seed()))
    engine = Engine(
        EngineConfig(model=folder, device="cuda", num_blocks=2000, max_num_batched_tokens=64)
    )
    prompt = prompts(fresh_seed())[-1]["prompt_token_ids"]
    engine.add_request(EngineRequest(request_id="p", prompt_token_ids=prompt, hand_over=True))
    others = torch.cuda.Stream()
    read = {}
    ahead = 0
    while engine.has_work():
        spans = [span for report in engine.step().hand_overs for span in report.spans]
        ahead += len(engine._in_flight)
        with torch.cuda.stream(others):  # which waits for nobody
            for span in spans:
                read[span.pool, span.index] = engine.regions()[span.pool][span.index].clone()
    torch.cuda.synchronize()
    assert ahead, "no step was launched before the one in front of it was collected"
    assert len(read) == 43 + 1
    for (pool, index), bytes_then in read.items():
        assert torch.equal(bytes_then, engine.regions()[pool][index])


def test_random_tokens_on_cuda_are_those_of_the_cpu(tmp_path):
    seed = fresh_seed()
    folder = str(tiny_models.make("qwen3", tmp_path, seed))
    kinds = [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.05, "top_p": 0.999},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"logit_bias": {5: 3.0}, "min_tokens": 20},
        {"temperature": 0.0, "frequency_penalty": 0.8, "logprobs": 2},
        {"temperature": 0.0},
    ]
    params = [
        SamplingParams(seed=i, max_tokens=40, ignore_eos=True, **kind)
        for i, kind in enumerate(kinds)
    ]
    answers = []
    for where in (ON_CPU, ON_CUDA):
        llm = LLM(model=folder, dtype="float32", **where)
        found = llm.generate(prompts(seed), params, use_tqdm=False)
        answers.append([result.outputs[0].token_ids for result in found])
        llm.engine.check_integrity()
    for on_cpu, on_cuda, prompt, each in zip(*answers, prompts(seed), params, strict=True):
        margin = draw_margin(Path(folder), prompt["prompt_token_ids"], on_cpu, each)
        assert margin > -SAFE
        assert on_cuda == on_cpu or margin < 2 * FLOAT32_BOUND


def test_decodes_run_in_graphs_whatever_the_batch_shrinks_to(tmp_path):
    seed = fresh_seed()
    folder = str(tiny_models.make("granite_hybrid", tmp_path, seed))
    given = prompts(seed) * 3
    lengths = [8 * (i % 12) + 1 for i in range(len(given))]
    answers = []
    for where in (ON_CPU, ON_CUDA):
        llm = LLM(model=folder, dtype="float32", **where)
        params = [greedy(length) for length in lengths]
        for _ in range(2):
            found = llm.generate(given, params, use_tqdm=False)
            answers.append([result.outputs[0].token_ids for result in found])
        if where is ON_CUDA:
            assert len(llm.engine._runner._graphs._graphs) >= 4
    assert answers[0] == answers[1] == answers[2] == answers[3]


@pytest.mark.parametrize("family", ["granite_hybrid", "qwen3"])
def test_short_rests_run_in_graphs_whatever_their_length(family, tmp_path):
    seed = fresh_seed()
    folder = str(tiny_models.make(family, tmp_path, seed))
    draw = random.Random(seed)
    shared = [draw.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(330)]
    given = [
        shared[: draw.randrange(1, 330)]
        + [draw.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(draw.randrange(1, 30))]
        for _ in range(24)
    ]
    answers = []
    for where in (ON_CPU, ON_CUDA):
        llm = LLM(model=folder, dtype="float32", **where)
        found = [llm.generate([{"prompt_token_ids": p}], greedy(4))[0] for p in given * 3]
        answers.append([result.outputs[0].token_ids for result in found])
        if where is ON_CUDA:
            assert len(llm.engine._runner._prompt_graphs._graphs) >= 2
        llm.engine.check_integrity()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family", ["granite_hybrid", "qwen3", "mistral"])
async def test_a_prefix_handed_over_by_tcp_between_cuda_pools_gives_the_tokens_of_the_cpu(
    family, tmp_path
):
    seed = fresh_seed()
    folder = str(tiny_models.make(family, tmp_path, seed))
    prompt = prompts(seed)[-1]["prompt_token_ids"]
    sampling = greedy(64, logprobs=1)
    here, there = (
        Engine(EngineConfig(model=folder, device="cuda", dtype="float32", num_blocks=500))
        for _ in range(2)
    )
    reports = compute_hand_over(here, "moved", prompt)
    shared = {"fingerprint": here.fingerprint, "key": b"a key of sixteen or more bytes"}
    giver = Giver(
        regions=here.regions(),
        incarnation="first",
        backends=["tcp"],
        lease_seconds=30.0,
        on_end=lambda request_id, outcome: here.release(request_id),
        generation=here.generation,
        **shared,
    )
    taker = Taker(regions=there.regions(), backends=["tcp"], **shared)
    await giver.start("127.0.0.1", 0)
    ticket = Ticket(pod="giver", **giver.open("moved", reports[-1].num_tokens))
    giver.offer("moved", [span for report in reports for span in report.spans])
    giver.complete("moved")
    reservation = there.reserve("moved", prompt, reports[-1].num_tokens)
    assert reservation is not None
    await taker.pull(ticket, reservation.wanted, 30.0)
    there.commit("moved")
    request = EngineRequest(
        request_id="after", prompt_token_ids=prompt, sampling=sampling, prefix_id="moved"
    )
    moved = run(there, [request])["after"]
    assert moved.num_cached_tokens == reports[-1].num_tokens
    await taker.close()
    await giver.close()

    on_cpu = Engine(EngineConfig(model=folder, dtype="float32", **ON_CPU))
    alone = EngineRequest(request_id="alone", prompt_token_ids=prompt, sampling=sampling)
    expected = run(on_cpu, [alone])["alone"]
    assert moved.token_ids == expected.token_ids
    assert [one.token.logprob for one in moved.logprobs] == pytest.approx(
        [one.token.logprob for one in expected.logprobs], abs=FLOAT32_BOUND
    )
