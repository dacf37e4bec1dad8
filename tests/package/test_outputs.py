"""The logits in what classifiers return."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from hf_saq.outputs import logits_of

LOGITS = torch.arange(6.0).reshape(2, 3)


class Named:
    logits = LOGITS


@pytest.mark.parametrize(
    "output",
    [LOGITS, ImageClassifierOutput(logits=LOGITS), {"logits": LOGITS}, Named(), (LOGITS, None), [LOGITS]],
    ids=lambda output: type(output).__name__,
)
def test_they_are_found(output):
    assert logits_of(output, may_be_first=True) is LOGITS
    if isinstance(output, (tuple, list)):
        with pytest.raises(ValueError, match="or an output with `logits`\\."):
            logits_of(output)
    else:
        assert logits_of(output) is LOGITS


@pytest.mark.parametrize(
    "output",
    [None, {}, (), (None, LOGITS), {"logits": None}, {"out": LOGITS}, BaseModelOutput(last_hidden_state=LOGITS)],
    ids=repr,
)
def test_what_has_none_is_refused(output):
    with pytest.raises(ValueError, match=f"returns a {type(output).__name__} without `logits`; expected a classifier"):
        logits_of(output, may_be_first=True)
