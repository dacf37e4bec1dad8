"""Compute the two products of an attention, query with key and probabilities with values, on quantized operands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantizers import Quantizer
from .quantized import HoldsQuantizers


class QuantAttentionProducts(HoldsQuantizers):
    """Computes attention without its projections, with `Q` four quantizers of their own:

        p      = softmax(Q(query) Q(key)^T * scaling + mask)
        output = dropout(Q(p)) Q(value)

    Dropout comes after `Q`: its factor `1 / (1 - dropout)` would push probabilities out of the range that inference
    has. Where a quantizer is `None` its operand stays in float; with none at all this is the attention that
    transformers calls eager.

    It is a child of the attention module that it computes for, so its scales are stored and trained with the model.

    Attributes:
        path (`str`): Dotted name inside the model, for error messages.
    """

    def __init__(
        self,
        query_quantizer: Quantizer | None,
        key_quantizer: Quantizer | None,
        probability_quantizer: Quantizer | None,
        value_quantizer: Quantizer | None,
    ):
        super().__init__()
        self.path = ""
        self.query_quantizer = query_quantizer
        self.key_quantizer = key_quantizer
        self.probability_quantizer = probability_quantizer
        self.value_quantizer = value_quantizer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: `(batch, heads, queries, width)`.
            key: `(batch, key_value_heads, keys, width)`, with `heads` a multiple of `key_value_heads`.
            value: `(batch, key_value_heads, keys, value_width)`.
            attention_mask: Added to the scores before the softmax, position biases included; broadcasts against
                `(batch, heads, queries, keys)`.
            scaling: Factor on the scores; `width ** -0.5` by default.
            dropout: Probability, in training.
            softcap: Scores become `softcap * tanh(score / softcap)` before the mask.

        Returns:
            Output `(batch, queries, heads, value_width)`, and the probabilities of its product,
            `(batch, heads, queries, keys)`.
        """
        query, key, value = (
            _quantized(operand, quantizer)
            for operand, quantizer in (
                (query, self.query_quantizer),
                (key, self.key_quantizer),
                (value, self.value_quantizer),
            )
        )
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # grouped queries: neighbouring heads share a key and a value
            key, value = (operand.repeat_interleave(groups, dim=1) for operand in (key, value))
        scores = torch.matmul(query, key.mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if attention_mask is not None:
            scores = scores + attention_mask
        probabilities = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        probabilities = _quantized(probabilities.to(query.dtype), self.probability_quantizer)
        probabilities = F.dropout(probabilities, p=dropout, training=self.training)
        return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


def _quantized(operand: Tensor, quantizer: Quantizer | None) -> Tensor:
    return operand if quantizer is None else quantizer(operand)
