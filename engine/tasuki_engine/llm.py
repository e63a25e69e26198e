"""The offline API: prompts in, finished texts out, in one process; vLLM's names and semantics.

llm = LLM(model="ibm-granite/granite-4.0-h-micro")
for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
    text = output.outputs[0].text
"""

import dataclasses
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec
import rich.console
import rich.progress

from tasuki_common.chat import ChatTemplate, Message
from tasuki_common.errors import ConfigError, RequestError
from tasuki_common.sampling import SamplingParams
from tasuki_common.text_stream import TextStream
from tasuki_common.tokenizer import Tokenizer, read_files
from tasuki_engine import interrupts
from tasuki_engine.config import EngineConfig
from tasuki_engine.engine import Engine
from tasuki_engine.outputs import CompletionOutput, RequestOutput, prompt_tables, token_table
from tasuki_engine.request import EngineRequest, TokenOutput

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; a mapping may hold
"cache_salt"."""
Params = SamplingParams | Sequence[SamplingParams] | None

_ENDLESS = sys.maxsize
_SETTINGS = {field.name for field in dataclasses.fields(EngineConfig)}


@dataclasses.dataclass
class _Choice:
    """One of the n samples of a prompt while it is computed."""

    request: RequestOutput
    params: SamplingParams
    output: CompletionOutput
    stream: TextStream


class LLM:
    """A model with its tokenizer, ready to complete prompts."""

    def __init__(self, model: str, **settings: Any) -> None:
        """`settings` are fields of `EngineConfig`: dtype, device, max_model_len, block_size, ...

        Raises:
            ConfigError: a setting is not known, or the model or the sizes cannot work.
        """
        unknown = sorted(settings.keys() - _SETTINGS)
        if unknown:
            known = ", ".join(sorted(_SETTINGS))
            raise ConfigError(f"LLM has no setting {', '.join(unknown)}; known are {known}.")
        settings = {"max_queued_requests": _ENDLESS} | settings
        config = EngineConfig(model=model, **settings)
        self.engine = Engine(config)
        files = read_files(self.engine.model.folder)
        self._tokenizer = Tokenizer.from_files(files, origin=model)
        self._template = ChatTemplate.from_files(files, self._tokenizer.special_tokens)
        self._seeds = random.Random(config.seed)
        self._num_requests = 0

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config asks for."""
        return SamplingParams(**cast(dict[str, Any], self._tokenizer.default_sampling))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes one or many prompts; results in the order of the prompts.

        `sampling_params`: one for all, one each, or None for the model's defaults. `use_tqdm`: show
        a progress bar, where standard error is a terminal.

        Raises:
            RequestError: a prompt or its parameters cannot be served; then nothing is computed.
        """
        listed = _listed(prompts)
        default = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params = [default] * len(listed) if isinstance(default, SamplingParams) else list(default)
        if len(params) != len(listed):
            raise RequestError(
                f"There are {len(listed)} prompts and {len(params)} sampling_params; give as many, "
                "or one for all.",
                param="sampling_params",
            )
        choices: dict[str, _Choice] = {}
        results: list[RequestOutput] = []
        try:
            for prompt, one in zip(listed, params, strict=True):
                results.append(self._add(prompt, one, choices))
            self._run(choices, len(choices), show=use_tqdm and sys.stderr.isatty())
        finally:
            for request_id in choices:
                self.engine.abort(request_id)
        return results

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or many, rendered with the model's chat template.

        Raises:
            RequestError: as for `generate`, or the template cannot take the messages.
        """
        many = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], messages if many else [messages])
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = self._template.render(
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
            )
            token_ids = self._tokenizer.encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": token_ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _add(
        self, prompt: Prompt, params: SamplingParams, choices: dict[str, _Choice]
    ) -> RequestOutput:
        """Hands the n samples of a prompt to the engine, and enters them in `choices`."""
        text, token_ids, salt = self._parse(prompt)
        name = str(self._num_requests)
        self._num_requests += 1
        result = RequestOutput(
            request_id=name, prompt=text, prompt_token_ids=token_ids, outputs=[], finished=False
        )
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        params = msgspec.structs.replace(params, seed=seed)
        for index in range(params.n):
            request_id = f"{name}-{index}"
            self.engine.add_request(
                EngineRequest(
                    request_id=request_id,
                    prompt_token_ids=token_ids,
                    sampling=params,
                    sample_index=index,
                    cache_salt=salt,
                )
            )
            params = msgspec.structs.replace(params, prompt_logprobs=None)  # once is enough
            output = CompletionOutput(index=index)
            if params.logprobs is not None:
                output.logprobs, output.cumulative_logprob = [], 0.0
            result.outputs.append(output)
            stream = TextStream(self._tokenizer, params)
            choices[request_id] = _Choice(result, params, output, stream)
        return result

    def _parse(self, prompt: Prompt) -> tuple[str | None, list[int], str | None]:
        """Text if it is known, token ids, cache salt."""
        if isinstance(prompt, str):
            return prompt, self._tokenizer.encode(prompt), None
        if not isinstance(prompt, Mapping):
            return None, list(prompt), None
        text, salt = prompt.get("prompt"), prompt.get("cache_salt")
        if "prompt_token_ids" in prompt:
            return text, list(prompt["prompt_token_ids"]), salt
        if text is None:
            raise RequestError(
                'A prompt mapping must hold "prompt" or "prompt_token_ids".', param="prompt"
            )
        return text, self._tokenizer.encode(text), salt

    def _run(self, choices: dict[str, _Choice], total: int, *, show: bool) -> None:
        """Steps until every choice is finished, taking finished ones out."""
        columns = (*rich.progress.Progress.get_default_columns(), _Rate())
        console = rich.console.Console(stderr=True)
        with (
            rich.progress.Progress(*columns, console=console, disable=not show) as progress,
            interrupts.held_back() as take_interrupt,
        ):
            task = progress.add_task("Completions", total=total, tokens=0)
            tokens = 0
            while choices:
                before = len(choices)
                for output in self.engine.step().outputs:
                    tokens += len(output.token_ids)
                    choice = choices.get(output.request_id)
                    if choice is not None and self._take(choice, output):
                        del choices[output.request_id]
                progress.update(task, advance=before - len(choices), tokens=tokens)
                take_interrupt()

    def _take(self, choice: _Choice, output: TokenOutput) -> bool:
        """Adds what a step brought to a choice; True if it is finished."""
        if output.error is not None:
            raise RequestError(output.error)
        completion, result = choice.output, choice.request
        if completion.index == 0:
            result.num_cached_tokens = output.num_cached_tokens
        decode = self._tokenizer.token_text
        if output.prompt_logprobs is not None:
            result.prompt_logprobs = prompt_tables(output.prompt_logprobs, decode)
        delta = choice.stream.push(output.token_ids, output.finish_reason, output.stop_reason)
        completion.text += delta.text
        completion.token_ids += delta.token_ids
        if completion.logprobs is not None and output.logprobs is not None:
            for entry in output.logprobs[: len(delta.token_ids)]:
                completion.logprobs.append(token_table(entry, decode))
                completion.cumulative_logprob = (
                    completion.cumulative_logprob or 0.0
                ) + entry.token.logprob
        if not delta.finished:
            return False
        completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
        result.finished = all(one.finish_reason is not None for one in result.outputs)
        if output.finish_reason is None:
            self.engine.abort(output.request_id)
        return True


class _Rate(rich.progress.ProgressColumn):
    """Generated tokens a second."""

    def render(self, task: rich.progress.Task) -> str:
        """Of the time so far."""
        return f"{task.fields['tokens'] / max(task.elapsed or 0.0, 1e-9):.0f} tokens/s"


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))
