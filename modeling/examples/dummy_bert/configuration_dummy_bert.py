"""DummyBertConfig: BERT's fields, and how positions enter."""

from __future__ import annotations

from typing import ClassVar, Literal

from swathe.modeling.families.bert.configuration_bert import BertConfig

PositionKind = Literal["absolute", "relative_key", "relative_key_query"]


class DummyBertConfig(BertConfig):
    """Configuration of a DummyBert.

    `position_embedding_type`: "absolute" adds a learned vector to each token, the relative kinds a
    learned term to each score, see relative_positions.py.
    """

    model_type: ClassVar[str] = "dummy_bert"

    position_embedding_type: PositionKind = "absolute"

    @classmethod
    def legacy_keys(cls) -> tuple[str, ...]:
        """None: what was a key of BERT's older files is a field here."""
        return ()
