"""Chat templates in the styles of well-known models, rendered by us and by transformers."""

import json
from typing import Any

import pytest
import tiny_tokenizers
from hypothesis import given, settings, strategies as st
from transformers import PreTrainedTokenizerFast

from tasuki_common.chat import ChatTemplate
from tasuki_common.errors import ConfigError, RequestError
from tasuki_common.tokenizer import Tokenizer

TEMPLATES = {
    "turns": """
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}
""",
    "instructions": """{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.first and system else '') + message.content
            + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "tools": """{% set found = namespace(last=none) %}
{% if tools %}
<|start|>tools
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
{{ tools | tojson(indent=2) }}
<|end|>
{% endif %}
{% for message in messages %}
  {% if message.role == 'skipped' %}{% continue %}{% endif %}
  {% if message.role == 'last' %}{% break %}{% endif %}
  {% set found.last = message %}
<|start|>{{ message.role }}{{ ' ' ~ message.name if message.name is defined else '' }}
{% generation %}
{{ message.content if message.content is string else '' }}
{% endgeneration %}
  {% for call in message.tool_calls or [] %}
{{ call.function.name }}({{ call.function.arguments | tojson }})
  {% endfor %}
<|end|>
{% endfor %}
{{ found.last.role if found.last else 'nobody' }}{{ unknown_name }}
{% if add_generation_prompt %}<|start|>assistant
{% endif %}
""",
    "documents": """{% if documents is defined and documents %}
{% for document in documents %}[{{ document.title }}] {{ document['text'] | upper }}
{% endfor %}{% endif %}
{% for m in messages %}{{ m.role | capitalize }}: {{ m.content.strip().split('</think>')[-1] }}
{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{{- dict(a=1).items() | list }}{{ messages | map(attribute='role') | join(',') }}
{{- strftime_now('%d %b %Y') ~ strftime_now('%Z') }}
{%- macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('é<&>') }}
""",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's <now> & überall",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
DOCUMENTS = [{"title": "One", "text": "first"}, {"title": "Zwei", "text": "größer"}]


def ours(template: str) -> ChatTemplate:
    files = tiny_tokenizers.files("byte_level")
    special = Tokenizer.from_files(files).special_tokens
    return ChatTemplate({"default": template}, special)


def theirs(template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizers.inner("byte_level"),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        chat_template=template,
    )


def messages() -> st.SearchStrategy[list[dict[str, Any]]]:
    content = st.text(max_size=20)
    system = st.lists(content.map(lambda c: {"role": "system", "content": c}), max_size=1)
    pair = st.tuples(content, content).map(
        lambda t: [{"role": "user", "content": t[0]}, {"role": "assistant", "content": t[1]}]
    )
    turns = st.lists(pair, max_size=3).map(lambda pairs: [m for two in pairs for m in two])
    last = content.map(lambda c: [{"role": "user", "content": c}])
    return st.tuples(system, turns, last).map(lambda parts: [*parts[0], *parts[1], *parts[2]])


@pytest.mark.parametrize("style", TEMPLATES)
@settings(max_examples=40)
@given(chat=messages(), generation=st.booleans(), tools=st.booleans(), documents=st.booleans())
def test_prompts_are_those_of_transformers(
    style: str, chat: list[dict[str, Any]], generation: bool, tools: bool, documents: bool
) -> None:
    options: dict[str, Any] = {"add_generation_prompt": generation}
    options |= {"tools": TOOLS} if tools else {}
    options |= {"documents": DOCUMENTS} if documents else {}
    expected = theirs(TEMPLATES[style]).apply_chat_template(chat, tokenize=False, **options)
    assert ours(TEMPLATES[style]).render(chat, **options) == expected


@pytest.mark.parametrize("style", ["turns", "instructions"])
@pytest.mark.parametrize("final", ["The answer", "The answer is ", "  x\n", "é"])
def test_a_continued_message_is_left_open_as_transformers_leaves_it(style: str, final: str) -> None:
    chat = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": final}]
    expected = theirs(TEMPLATES[style]).apply_chat_template(
        chat, tokenize=False, continue_final_message=True
    )
    rendered = ours(TEMPLATES[style]).render(
        chat, continue_final_message=True, add_generation_prompt=False
    )
    assert rendered == expected
    assert chat[-1]["content"] == final


def test_extra_arguments_reach_the_template_and_cannot_replace_the_messages() -> None:
    chat = [{"role": "user", "content": "hi"}]
    template = ours(TEMPLATES["documents"])
    kwargs = {"enable_thinking": False, "messages": [], "tools": 3}
    assert "<think></think>" in template.render(chat, chat_template_kwargs=kwargs)
    assert "User: hi" in template.render(chat, chat_template_kwargs=kwargs)


def test_a_request_may_bring_its_template_or_name_one() -> None:
    files = {
        "tokenizer_config.json": json.dumps(
            {
                "chat_template": [
                    {"name": "default", "template": "plain"},
                    {"name": "tool_use", "template": "with tools"},
                    {"name": "rag", "template": "with documents"},
                ]
            }
        ).encode()
    }
    template = ChatTemplate.from_files(files, {})
    chat = [{"role": "user", "content": "hi"}]
    assert template.render(chat) == "plain"
    assert template.render(chat, tools=TOOLS) == "with tools"
    assert template.render(chat, chat_template="rag") == "with documents"
    assert template.render(chat, chat_template="{{ messages[0].content }}!") == "hi!"


def test_the_jinja_file_wins_over_the_tokenizer_config() -> None:
    files = {
        "chat_template.jinja": b"from the file",
        "tokenizer_config.json": b'{"chat_template": "from the config"}',
    }
    chat = [{"role": "user", "content": "hi"}]
    assert ChatTemplate.from_files(files, {}).render(chat) == "from the file"
    del files["chat_template.jinja"]
    assert ChatTemplate.from_files(files, {}).render(chat) == "from the config"
    with pytest.raises(ConfigError, match="must be a string or a list"):
        ChatTemplate.from_files({"tokenizer_config.json": b'{"chat_template": [1]}'}, {})


def test_a_list_of_text_parts_reads_as_one_string() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    template = ours(TEMPLATES["turns"])
    single = template.render([{"role": "user", "content": [parts[0]]}])
    assert single == template.render([{"role": "user", "content": "one"}])
    both = template.render([{"role": "user", "content": parts}])
    assert both == template.render([{"role": "user", "content": "one\ntwo"}])


def test_tool_arguments_are_objects_to_the_template() -> None:
    call = {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Łódź"}'}}
    chat = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert 'weather({"city": "Łódź"})' in ours(TEMPLATES["tools"]).render(chat)
    assert isinstance(call["function"], dict)
    assert call["function"]["arguments"] == '{"city": "Łódź"}'


@pytest.mark.parametrize(
    ("chat", "param"),
    [
        (["hi"], "messages[0]"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        (
            [
                {"role": "user", "content": "a"},
                {"role": "user", "content": [{"type": "image_url"}]},
            ],
            "messages[1].content[0].type",
        ),
        ([{"role": "user", "content": [7]}], "messages[0].content[0].type"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 1}]}],
            "messages[0].content[0].text",
        ),
        ([{"role": "user", "content": "a", "tool_calls": 3}], "messages[0].tool_calls"),
        (
            [{"role": "user", "content": "a", "tool_calls": [{}]}],
            "messages[0].tool_calls[0].function",
        ),
        (
            [{"role": "user", "tool_calls": [{"function": {"arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_messages_that_are_wrong_are_named(chat: list[Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        ours(TEMPLATES["turns"]).render(chat)
    assert caught.value.param == param
    assert param in str(caught.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (TEMPLATES["instructions"], "Roles must alternate"),
        ("{% for %}", "chat template"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ messages[0].content.x.y }}", "chat template"),
        ("{{ (1).__class__.__mro__ }}", "chat template"),
        ("{% set _ = messages.append(1) %}", "chat template"),
        ("{% for i in range(10**9) %}{% endfor %}", "chat template"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' | nofilter }}", "chat template"),
    ],
)
def test_a_template_that_fails_is_the_requests_error(template: str, words: str) -> None:
    chat = [{"role": "assistant", "content": "hi"}]
    with pytest.raises(RequestError, match=words) as caught:
        ours(template).render(chat)
    assert caught.value.param == "messages"
    with pytest.raises(RequestError, match=words) as caught:
        ours("x").render(chat, chat_template=template)
    assert caught.value.param == "chat_template"


@pytest.mark.parametrize(
    ("chat", "generation"),
    [
        ([], False),
        ([{"role": "assistant", "content": None}], False),
        ([{"role": "assistant", "content": "hi"}], True),
    ],
)
def test_what_cannot_be_continued_is_refused(chat: list[Any], generation: bool) -> None:
    with pytest.raises(RequestError) as caught:
        ours(TEMPLATES["turns"]).render(
            chat, continue_final_message=True, add_generation_prompt=generation
        )
    assert caught.value.param == "continue_final_message"


def test_a_model_without_template_says_so() -> None:
    with pytest.raises(RequestError, match="no default chat template"):
        ChatTemplate.from_files({}, {}).render([{"role": "user", "content": "hi"}])
