"""Small real tokenizers with the chat templates of well-known families, written here from their forms."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "How do I polish a moon-key at home? Sure, here is how you polish it.\n\n",
    "I can not help with that. The quick brown fox jumps over the lazy dog.\n",
    "User: Assistant: [INST] [/INST] system assistant user <think></think> 0123456789 ÄÖ 東京",
] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_BOS = "{{ bos_token }}" + CHATML
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|sep|>\n\n' + m['content'] | trim + "
    "'<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|sep|>\n\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}{{ raise_exception('no system "
    "messages') }}"
    "{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ ('User: ' if m['role'] == 'user' else 'Assistant: ') + m['content'] + '\n' }}{% endfor "
    "%}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
DROPPING = (
    "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FOLDING = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<|im_start|>' + m['role'] + '\n' + (s if loop.first else '') + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TWO_ENDS = CHATML.replace("{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add")
# Thinking models, each after the public behaviour of a family. One finds the block in the text, writes it anew around
# the last answer, leaves it out of earlier ones, and puts an empty one where there is none; the prompt has an empty one
# when thinking is off.
_HEAD = "{{ '<|im_start|>assistant\n' }}"
_PARTS = (
    "{% set t = m['content'].split('</think>')[0].split('<think>')[-1] | trim if '</think>' in m['content'] else '' %}"
)
_PARTS += "{% set c = m['content'].split('</think>')[-1] | trim %}"
_USER = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
_EMPTY = "{{ '<think>\n\n</think>\n\n' }}"
_BLOCK = "{{ '<think>\n' + t + '\n</think>\n\n' }}"
_OFF = "{% if enable_thinking is defined and enable_thinking is false %}"
REBUILDING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    + _PARTS
    + _HEAD
    + "{% if loop.last %}"
    + _BLOCK
    + "{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% else %}" + _USER + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + _HEAD + _OFF + _EMPTY + "{% endif %}{% endif %}"
)
# One that always thinks: the prompt opens the block.
ALWAYS = REBUILDING.replace(_OFF + _EMPTY + "{% endif %}", "{{ '<think>\n' }}")
# One that cuts every assistant's reasoning out, the last one's too; with and without an opened block in the prompt.
CUTTING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|sep|>' + m['content'].split('</think>')[-1] + eos_token }}{% else %}{{ '<|start|>' + m['content'] }}{% "
    "endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|sep|>' }}{% endif %}"
)
CUTTING_OPEN = CUTTING.replace("{{ '<|sep|>' }}{% endif %}", "{{ '<|sep|><think>\n' }}{% endif %}")
# One that leaves the text as it is, and puts an empty block before it when thinking is off.
MODES = (
    "{% set off = enable_thinking is defined and enable_thinking is false %}{% for m in messages %}{% if m['role'] == "
    "'assistant' %}"
    + _HEAD
    + "{% if off %}"
    + _EMPTY
    + "{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% else %}"
    + _USER
    + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + _HEAD + "{% if off %}" + _EMPTY + "{% endif %}{% endif %}"
)
# One with channels, which takes the reasoning as a field of its own, and writes the day.
CHANNELS = (
    "{{ '<|start|>system<|sep|>' + strftime_now('%Y-%m-%d') + '<|end|>' }}{% for m in messages %}{% if m['role'] == "
    "'assistant' %}"
    "{% if 'thinking' in m and loop.last %}{{ '<|start|>assistant thought<|sep|>' + m['thinking'] + '<|end|>' }}{% "
    "endif %}"
    "{{ '<|start|>assistant final<|sep|>' + m['content'] + ('</s>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|sep|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# Three ways of families with tools. One offers them in the system's turn, marks calls, and puts results into a turn of
# the user.
TAGGED = (
    "{{ '<|im_start|>system\n' + (messages[0]['content'] if messages[0]['role'] == 'system' else 'Help.') }}"
    "{% if tools %}{{ '\n<tools>' }}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{{ '\n</tools>' }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{% if loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m['content'] + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant' }}{% if m['content'] %}{{ '\n' + m['content'] }}"
    "{% endif %}{% for c in m.tool_calls %}{{ '\n<tool_call>\n' + c['function'] | tojson + '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% elif m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# One offers them before the last request, has no header of the assistant, and wants turns to alternate and ids of nine
# characters.
BRACKETS = (
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% set ns = "
    "namespace(turn=0) %}{% for m in messages %}{% if m['role'] != 'tool' and not m.tool_calls %}"
    "{% if (m['role'] == 'user') != (ns.turn % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.turn = ns.turn + 1 %}{% endif %}{% endfor %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if tools and m == asked[-1] %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST]' + m['content'] + '[/INST]' }}{% elif m.tool_calls %}{{ '[CALLS] [' }}{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids of nine characters') }}{% endif %}"
    "{{ (c['function'] | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' + ('' if loop.last else ', ') }}{% endfor %}"
    "{{ ']' + eos_token }}{% elif m['role'] == 'tool' %}"
    "{{ '[RESULTS] {\"content\": ' + m['content'] | tojson + ', \"id\": \"' + m.tool_call_id + '\"}[/RESULTS]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# One offers them in the first request, takes one call a turn, which replaces the turn's text, and writes results as
# JSON under a role of its own.
INSTEAD = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' and loop.first and tools %}"
    "{{ '<|start|>user<|sep|>\n\n' }}{% for t in tools %}{{ t | tojson + '\n\n' }}{% endfor %}{{ m['content'] | trim + "
    "'<|end|>' }}{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call a turn') }}"
    "{% endif %}{% set f = m.tool_calls[0]['function'] %}{{ '<|start|>assistant<|sep|>\n\n{\"name\": \"' + f.name + "
    "'\", \"parameters\": ' + f.arguments | tojson + '}<|end|>' }}{% elif m['role'] == 'tool' %}"
    "{{ '<|start|>ipython<|sep|>\n\n' + m['content'] | tojson + '<|end|>' }}{% else %}"
    "{{ '<|start|>' + m['role'] + '<|sep|>\n\n' + m['content'] | trim + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|sep|>\n\n' }}{% endif %}"
)
WITH_TOOLS = {"tagged": TAGGED, "brackets": BRACKETS, "instead": INSTEAD}
TEMPLATES = {
    "chatml": CHATML,
    "chatml_bos": CHATML_WITH_BOS,
    "trimming": TRIMMING,
    "inst": INST,
    "plain": PLAIN,
    "folding": FOLDING,
    "reasoning": REASONING,
    "two_ends": TWO_ENDS,
}
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|sep|>", "<|end|>"]


@functools.cache
def _trained(kind: str) -> str:
    if kind == "byte_level":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        alphabet = sorted(set("".join(CORPUS)) | set("QwertzZyxvu+") | {"▁"})
        if kind == "metaspace_legacy":
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        else:
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
            core.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return core.to_str()


def make(
    kind: str = "byte_level", template: str | None = CHATML, *, bos: bool = True, adds_bos: bool = True
) -> PreTrainedTokenizerFast:
    """A fast tokenizer; with ``adds_bos`` it puts BOS first by itself, without ``bos`` it has none."""
    core = Tokenizer.from_str(_trained(kind))
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if bos and adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>"} if bos else {}
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", **names)
    made.chat_template = template
    return made
