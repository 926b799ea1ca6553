"""Histories as strings of symbols: which symbol of which item stands where in a padded row.

Every user has a row of their own, with the padding on the right, so the causal mask alone keeps users apart. Laid
end to end in long rows they would need no padding, but attention would be paid across the borders between users only
to be masked away: a row of k users costs about k times the scores that they cost apart. Padding is kept small
instead, by batches of rows that have like numbers of symbols (``data.batches``).

Shapes: B batch, T items of the longest history, N symbols of the longest row.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Strings(NamedTuple):
    """Where the symbols of a batch of histories stand; place and step are 0 in padding."""

    place: Tensor
    """(B, N) long, which item of the history a symbol belongs to, the oldest being 0."""
    step: Tensor
    """(B, N) long, which symbol of its item it is: code by code from 0, then the suffix."""
    present: Tensor
    """(B, N) bool, True where there is a symbol."""
    length: Tensor
    """(B,) long, symbols of each row."""


def lay_out(counts_BT: Tensor, present_BT: Tensor) -> Strings:
    """Lay the symbols of each history side by side, oldest item first.

    Parameters
    ----------
    counts_BT : Tensor
        (B, T) long, symbols of each item, at least 1; not read where no item is.
    present_BT : Tensor
        (B, T) bool, where there is an item; histories are left-aligned.

    Returns
    -------
    Strings
        As wide as the longest row has symbols.
    """
    ends_BT = (counts_BT * present_BT).cumsum(dim=1)
    length = ends_BT[:, -1]
    at_N = torch.arange(int(length.max()), device=counts_BT.device)
    present = at_N < length[:, None]
    # The item of a symbol is the first that ends behind it.
    place = torch.searchsorted(ends_BT, at_N.expand(len(length), -1).contiguous(), right=True)
    place = place.masked_fill(~present, 0)
    begins_BT = ends_BT - counts_BT
    step = (at_N - begins_BT.gather(1, place)).masked_fill(~present, 0)
    return Strings(place, step, present, length)
