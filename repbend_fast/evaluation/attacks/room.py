"""How many sequences of a pass fit into a budget: an estimate from shapes (``evaluation/halving.py`` for when it errs).

The estimates err on the large side, by two to four times for small models.
"""

from __future__ import annotations

from dataclasses import dataclass

from repbend_fast.errors import UserError
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import causal_model, find_decoder
from repbend_fast.models.layers.varlen import MASKED, NAMES


@dataclass(frozen=True, slots=True)
class Widths:
    """What an estimate reads of a model. ``hidden``: the widest of the stream and of all heads; ``inner``: of the MLP,
    where a mixture of experts counts as one of the width that a token meets; ``cached``: of a position's keys and
    values; ``scores``: whether attention keeps its scores.
    """

    hidden: int
    inner: int
    heads: int
    cached: int
    scores: bool

    @classmethod
    def of(cls, model: CausalLM) -> Widths:
        """From the model's configuration."""
        shape = causal_model(model).config.get_text_config()
        heads = shape.num_attention_heads
        width = getattr(shape, "head_dim", None) or shape.hidden_size // heads
        groups = getattr(shape, "num_key_value_heads", None) or heads
        experts = getattr(shape, "num_experts_per_tok", None) or 1
        return cls(
            hidden=max(shape.hidden_size, heads * width),
            inner=max(getattr(shape, "intermediate_size", 0), experts * getattr(shape, "moe_intermediate_size", 0)),
            heads=heads,
            cached=2 * groups * width,
            scores=getattr(shape, "_attn_implementation", None)
            not in ("sdpa", "flash_attention_2", NAMES["sdpa"], MASKED),
        )


@dataclass(frozen=True, slots=True)
class PassCost:
    """Bytes of one sequence in a pass of a model.

    ``tokens``: positions that run; ``kept``: those that reach the head; ``earlier``: positions in the cache before
    them.
    """

    widths: Widths
    blocks: int
    vocabulary: int
    element: int

    @classmethod
    def of(cls, model: CausalLM) -> PassCost:
        """From the model's configuration."""
        causal = causal_model(model)
        return cls(
            widths=Widths.of(model),
            blocks=find_decoder(model).num_blocks,
            vocabulary=causal.config.get_text_config().vocab_size,
            element=causal.get_input_embeddings().weight.element_size(),
        )

    def forward(self, tokens: int, kept: int, earlier: int = 0) -> int:
        """Bytes without a graph."""
        return self._block(tokens, earlier) + self._head(kept) + self.cache(tokens + earlier)

    def backward(self, tokens: int, kept: int, earlier: int = 0, *, recompute: bool = False) -> int:
        """Bytes with a graph: every block's insides, or with ``recompute`` one block's and all blocks' inputs."""
        block = self._block(tokens, earlier, graph=True)
        inside = self.blocks * tokens * self.widths.hidden * self._size if recompute else (self.blocks - 1) * block
        return inside + 2 * block + self._head(kept) + (0 if recompute else self.cache(tokens + earlier))

    def cache(self, tokens: int) -> int:
        """Bytes of keys and values, twice while they grow in one block after the other."""
        return 2 * self.blocks * tokens * self.widths.cached * self._size

    def generation(self, prompt: int, new: int) -> int:
        """Bytes of one answer of ``new`` tokens."""
        return max(self.forward(prompt, 1), self.cache(prompt + new) + self._block(1, prompt + new) + self._head(1))

    @property
    def _size(self) -> int:
        # Beside 16-bit weights a block's temporaries are partly in 16 and partly in 32 bits.
        return self.element if self.element >= 4 else 3

    def _block(self, tokens: int, earlier: int, *, graph: bool = False) -> int:
        """Bytes at a block's fullest, or of all that it keeps for a graph; a mask in any case."""
        hidden, inner = self.widths.hidden, self.widths.inner
        rows = tokens * (14 * hidden + 4 * inner if graph else 6 * hidden + 3 * inner)
        squares = 1 + (3 * self.widths.heads if self.widths.scores else 0)
        return (rows + squares * tokens * (tokens + earlier)) * self._size

    def _head(self, kept: int) -> int:
        return 4 * kept * self.vocabulary * max(4, self.element)


def fitting(budget: int | None, each: int, wanted: int, what: str) -> int:
    """How many of ``wanted`` things of ``each`` bytes run at once.

    Raises:
        UserError: not one of them fits into ``budget``.
    """
    if budget is None:
        return wanted
    if each > budget:
        raise UserError(
            f"{what} needs about {_mib(each)} and the budget is {_mib(budget)}; raise memory.budget, shorten the "
            "prompts, or leave this attack out"
        )
    return max(1, min(wanted, budget // each))


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
