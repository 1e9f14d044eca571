"""Settings of what is read: sources of records, and prompts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from repbend_fast.data.records import Role
from repbend_fast.section import Positive, Section


class SourceConfig(Section):
    """One file or hub data set. A source may yield several roles."""

    path: str = Field(description="Local file or hub data set name; `demo` for the bundled fictional data.")
    format: Literal["auto", "jsonl", "wildguardmix", "wildjailbreak", "ultrachat", "circuit_breakers", "demo"] = Field(
        "auto", description="How records are written; auto = known by their fields."
    )
    subset: str | None = Field(None, description="Of a hub data set.")
    split: str | None = Field(None, description="Of a hub data set, or of the demo's data.")
    roles: list[Role] | None = Field(None, description="Keep only these roles.")
    limit: Positive | None = Field(None, description="Take at most this many records per role, chosen by seed.")


class DataConfig(Section):
    """What to train on."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)] = Field(description="Files and hub data sets.")
    max_prompt_tokens: Positive = Field(512, description="A longer prompt loses its middle.")
    max_answer_tokens: Positive = Field(512, description="A longer answer loses its end.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Variables of the chat template, for example {enable_thinking: true}; the same in training, "
        "validation and evaluation.",
    )
    skip_bad_records: bool = Field(
        False, description="Count bad records and leave them out, where one stops the run otherwise."
    )
    limit: Positive | None = Field(None, description="Cap per role over all sources, chosen by `training.seed`.")
    group_by_length: bool = Field(
        False,
        description="Draw examples of similar length together: less padding where sequences are padded, less mixed "
        "micro-batches.",
    )


class PromptsConfig(Section):
    """Prompts for generation-based checks."""

    path: str = Field("demo", description="A file, a folder or a hub data set; `demo` for the bundled ones.")
    split: str | None = Field(None, description="Of a hub data set, or of the demo.")
    limit: Positive | None = Field(None, description="At most so many of each kind.")
