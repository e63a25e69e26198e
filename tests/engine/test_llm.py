"""The offline API: vLLM's names and semantics on a tiny hybrid model."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from fresh_seed import fresh_seed
from greedy import is_greedy

from tasuki_common.errors import ConfigError, RequestError
from tasuki_engine import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("granite_hybrid", tmp_path_factory.mktemp("tiny"), fresh_seed())


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(
        model=str(folder),
        dtype="float32",
        device="cpu",
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        block_size=8,
        checkpoint_interval=32,
        enable_prefix_caching=True,
    )


def test_a_device_may_have_a_number(folder: Path) -> None:
    numbered = LLM(model=str(folder), device="cpu:0", max_model_len=64, max_num_seqs=2)
    (output,) = numbered.generate(["The relay"], GREEDY)
    assert is_greedy(folder, output.prompt_token_ids, output.outputs[0].token_ids)


def test_results_come_in_the_order_of_the_prompts(llm: LLM, folder: Path) -> None:
    prompts = [f"{'word ' * i}The relay" for i in range(12, 0, -1)]
    outputs = llm.generate(prompts, GREEDY)
    tokenizer = llm.get_tokenizer()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert (output.prompt, output.prompt_token_ids) == (prompt, tokenizer.encode(prompt))
        (completion,) = output.outputs
        assert completion.text == tokenizer.decode(completion.token_ids)
        assert completion.finish_reason == "length"
    first = outputs[0]
    assert is_greedy(folder, first.prompt_token_ids, first.outputs[0].token_ids)
    llm.engine.check_integrity()


def test_every_shape_of_prompt_gives_the_same_tokens(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("The relay")
    shapes = [
        "The relay",
        ["The relay"],
        ids,
        [ids],
        {"prompt_token_ids": ids},
        {"prompt": "The relay"},
    ]
    results = [llm.generate(shape, GREEDY) for shape in shapes]  # type: ignore[arg-type]
    assert {tuple(result[0].outputs[0].token_ids) for result in results} == {
        tuple(results[0][0].outputs[0].token_ids)
    }
    assert [result[0].prompt for result in results[2:5]] == [None] * 3


def test_one_sampling_params_per_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    outputs = llm.generate(["a", "b", "c"], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]
    with pytest.raises(RequestError, match="3 prompts and 2 sampling_params"):
        llm.generate(["a", "b", "c"], params[:2])


def test_samples_of_one_prompt_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=12, ignore_eos=True)
    first, second = (llm.generate("The relay", params)[0] for _ in range(2))
    tokens = [tuple(completion.token_ids) for completion in first.outputs]
    assert [completion.index for completion in first.outputs] == [0, 1, 2]
    assert len(set(tokens)) == 3
    assert tokens == [tuple(completion.token_ids) for completion in second.outputs]


def test_the_stop_token_is_in_token_ids_and_not_in_the_text(llm: LLM) -> None:
    plain = llm.generate("The relay", GREEDY)[0].outputs[0]
    stop = plain.token_ids[4]
    first = plain.token_ids.index(stop)
    params = SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=[stop], ignore_eos=True)
    ended = llm.generate("The relay", params)[0].outputs[0]
    assert ended.token_ids == plain.token_ids[: first + 1]
    assert ended.text == llm.get_tokenizer().decode(plain.token_ids[:first])
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)


def test_a_stop_string_ends_the_text_before_itself(llm: LLM) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    plain = llm.generate("There are three", long)[0].outputs[0]
    stop = plain.text[5:8]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=stop)
    ended = llm.generate("There are three", params)[0].outputs[0]
    assert ended.text == plain.text[: plain.text.index(stop)]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    assert len(ended.token_ids) < 40
    assert not llm.engine.has_work() or not llm.engine.step().outputs[0].token_ids
    llm.engine.check_integrity()


def test_logprobs_have_vllms_shape(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0.0, max_tokens=4, logprobs=2, prompt_logprobs=1, ignore_eos=True
    )
    output = llm.generate("The relay hands", params)[0]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for token_id, table in zip(
        output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
    ):
        assert table is not None
        assert token_id in table
        assert {entry.rank for entry in table.values()} >= {1}
    (completion,) = output.outputs
    assert completion.logprobs is not None
    total = 0.0
    for token_id, table in zip(completion.token_ids, completion.logprobs, strict=True):
        assert table[token_id].rank == 1
        assert len(table) == 2
        assert table[token_id].decoded_token == llm.get_tokenizer().token_text(token_id)
        total += table[token_id].logprob
    assert completion.cumulative_logprob is not None
    assert math.isclose(completion.cumulative_logprob, total)


def test_a_repeated_prompt_is_a_prefix_hit(llm: LLM) -> None:
    ids = [5 + i % 90 for i in range(101)]
    cached = [llm.generate(ids, GREEDY)[0].num_cached_tokens for _ in range(2)]
    assert cached == [0, 96]


def test_chat_renders_the_models_template(llm: LLM, folder: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    both = llm.chat([messages, messages], GREEDY)
    assert [one.prompt for one in both] == [output.prompt] * 2
    for one in (output, *both):
        assert is_greedy(folder, one.prompt_token_ids, one.outputs[0].token_ids)


def test_a_prompt_that_cannot_be_served_stops_all_before_any_work(llm: LLM) -> None:
    steps = llm.engine.stats().steps
    with pytest.raises(RequestError, match="257 tokens"):
        llm.generate([[5] * 10, [5] * 257], GREEDY)
    assert llm.engine.stats().steps == steps
    while llm.engine.has_work():
        llm.engine.step()
    assert llm.engine.stats().steps == steps
    llm.engine.check_integrity()


def test_an_interrupt_within_a_step_leaves_the_next_call_right(
    llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(range(3, 40))
    llm.generate([prompt], GREEDY)
    forward, steps = llm.engine.model.forward, 0

    def interrupted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*args)

    monkeypatch.setattr(llm.engine.model, "forward", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([list(range(5, 60))], GREEDY)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == 3
    assert is_greedy(folder, prompt, llm.generate([prompt], GREEDY)[0].outputs[0].token_ids)
    llm.engine.check_integrity()


def test_an_unknown_setting_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no setting max_modl_len"):
        LLM(model=str(folder), max_modl_len=5)
