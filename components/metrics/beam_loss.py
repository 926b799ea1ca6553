"""What a beam search misses of the exact ranking."""

from collections.abc import Callable
from typing import Any

import numpy as np

from components.artifacts import SequenceSplit
from components.metrics.ranking import contributions, ranks_in_lists
from components.metrics.report import EvaluateConfig, RankFn
from components.seams import Ranking

USERS = 2000
"""Test users that are looked at, evenly spaced: exact scores of all items cost more than a beam."""


def beam_loss(
    beam: Callable[[bool], Ranking], exact: RankFn, split: SequenceSplit, config: EvaluateConfig
) -> list[dict[str, Any]]:
    """Rank some test users exactly, and look what of it the beam has found.

    Parameters
    ----------
    beam : callable
        Exclude seen items? -> the beam's lists of all test users.
    exact : callable
        What ranks exactly.
    split : SequenceSplit
        Where the test users come from.
    config : EvaluateConfig
        Treatments of seen items, and the length of lists.

    Returns
    -------
    list of dict
        One for each treatment of ``seen`` items: ``users``; ``found``, the mean share of the exact list that the beam's
        list holds, both ``config.beams`` long; and recall and NDCG at 10, or at the length of a shorter list, by both.
    """
    spaced = np.unique(np.linspace(0, len(split.test) - 1, min(USERS, len(split.test))).astype(int))
    frame, cut = split.test[spaced], min(10, config.beams)
    names = [f"R@{cut}", f"N@{cut}"]
    rows = []
    for seen in config.blocks:
        excluded = seen == "excluded"
        lists = {
            "beam": beam(excluded).items.cpu().numpy()[spaced],
            "exact": exact(frame, excluded).items.cpu().numpy(),
        }
        wanted = lists["exact"] >= 0
        found = (lists["exact"][:, :, None] == lists["beam"][:, None, :]).any(axis=2) & wanted
        row = {"seen": seen, "users": len(frame), "found": float(found.sum() / wanted.sum())}
        for name, items in lists.items():
            ranks = ranks_in_lists(items, frame["target"].to_numpy().astype(np.int64))
            means = contributions(ranks, names).mean(axis=0)
            row |= {f"{metric} {name}": float(mean) for metric, mean in zip(names, means, strict=True)}
        rows.append(row)
    return rows
