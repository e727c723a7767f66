"""A few rows of the attention map at a time, for what no statistic of one pass holds.

The probabilities are made again from the queries and keys of a call that a capture served, so memory grows with the
number of keys and not with its square.

B sequences   H heads   Q query rows   K keys   R rows of one block
"""

from __future__ import annotations

from torch import Tensor

from attncap import reference
from attncap.adapters.served import ServedCall
from attncap.validation import check_extras, check_options

# Probabilities that one block holds of all heads together.
_BLOCK = 1 << 21


def rows_at_once(heads: int, keys: int) -> int:
    """How many rows of so many heads and keys a block should have."""
    return max(1, _BLOCK // max(1, heads * keys))


def row_block(call: ServedCall, sequence: int, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
    """((H, R, K) float64 the probabilities of rows start .. stop - 1 of a sequence; (H, R) those of no key, or None).

    None where the call has no learned sink.
    """
    one = slice(sequence, sequence + 1)
    query, key = call.query[one, :, start:stop], call.key[one]
    options = check_options(
        causal=call.causal,
        scale=call.scale,
        window=call.window,
        softcap=call.softcap,
        query_offset=call.query_offset + start,
        head_dim=query.shape[-1],
    )
    mask = _mask_of(call, one, start, stop)
    extras = check_extras(query, key, attn_mask=mask, sink_logits=call.sink_logits)
    prob, null = reference.probabilities(query.double(), key.double(), options, extras)
    return prob[0], None if null is None else null[0]


def _mask_of(call: ServedCall, one: slice, start: int, stop: int) -> Tensor | None:
    """The part of the mask that these rows have."""
    mask = call.attn_mask
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    mask = mask if mask.shape[0] == 1 else mask[one]
    return mask if mask.shape[2] == 1 else mask[:, :, start:stop]
