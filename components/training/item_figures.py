"""What an IntRR recommender makes of its items: do their walks through the codebooks still tell them apart?

Names with a slash are for plots and tables: ``group/level``.
"""

import torch
from torch import Tensor

from components.recommenders.intrr import ROWS, Intrr
from components.training.loop import Halt

HEAD = 0.2
"""Share of the trained items, most training events first, that are the head; the half with fewest are the rare ones."""
PATHS = "items/distinct_paths"
REMEDY = "raise recommender.model.alignment, or take assignment=soft and product=scaled"
"""What holds walks apart."""


@torch.no_grad()
def item_figures(recommender: Intrr, symbols_NS: Tensor, counts_N: Tensor) -> dict[str, float]:
    """Describe the items that have training events.

    Parameters
    ----------
    recommender : Intrr
        In evaluation mode.
    symbols_NS : Tensor
        (N, S) long, the SID table.
    counts_N : Tensor
        (N,) training events.

    Returns
    -------
    dict of str to float
        Where items walk (``reads`` is ran), by level: ``items/agree_sid``, share of items whose best symbol is that of
        their SID; ``items/top_probability`` and ``items/entropy`` (nats), means over items; levels that none of these
        SIDs reaches are left out. And ``items/distinct_paths``, how many different paths of best symbols there are, as
        a share of the items.
        Where items have a vector of their own: ``items/uid_norm/head`` and ``/rare``, mean lengths. Empty otherwise.
    """
    item_ids = counts_N.nonzero()[:, 0]
    figures: dict[str, float] = {}
    if recommender.config.reads == "ran":
        figures |= _walks(recommender, item_ids, symbols_NS[item_ids])
    if recommender.config.has_uids:
        norms = recommender.uids[item_ids[counts_N[item_ids].argsort(descending=True, stable=True)]].norm(
            dim=1
        )
        figures["items/uid_norm/head"] = float(norms[: max(1, round(HEAD * len(norms)))].mean())
        figures["items/uid_norm/rare"] = float(norms[len(norms) // 2 :].mean())
    return figures


def _walks(recommender: Intrr, item_ids: Tensor, symbols_US: Tensor) -> dict[str, float]:
    """Let all items walk, and compare where they go with their SIDs."""
    space = recommender.space
    present_US = symbols_US >= 0
    sums = torch.zeros(3, space.num_steps, device=symbols_US.device)
    paths = []
    for part, symbols in zip(torch.split(item_ids, ROWS), torch.split(symbols_US, ROWS), strict=True):
        steps = []
        for step, log_p in enumerate(recommender.walk(part, symbols).log_p):
            here = symbols[:, step] >= 0
            best = log_p.argmax(dim=-1) + space.starts[step]
            agrees, top = best == symbols[:, step], log_p.amax(dim=-1).exp()
            entropy = -(log_p.exp() * log_p).sum(dim=-1)
            sums[:, step] += torch.stack([(value * here).sum() for value in (agrees, top, entropy)])
            steps.append(best.masked_fill(~here, -1))
        paths.append(torch.stack(steps, dim=1))
    counts = present_US.sum(dim=0)
    names = ("items/agree_sid", "items/top_probability", "items/entropy")
    figures = {
        f"{name}/level{step + 1}": float(sums[which, step] / counts[step])
        for which, name in enumerate(names)
        for step in range(space.num_steps)
        if counts[step]
    }
    figures[PATHS] = len(torch.unique(torch.cat(paths), dim=0)) / len(item_ids)
    return figures


def check_paths(epoch: int, figures: dict[str, float], least: float) -> None:
    """Halt training if too few paths are left for the items; name the epoch and the figure.

    Parameters
    ----------
    epoch : int
        Number of the epoch that ended.
    figures : dict
        Those of ``item_figures``, with whatever else was validated.
    least : float
        Least share of distinct paths.
    """
    share = figures.get(PATHS)
    if share is not None and share < least:
        raise Halt(
            f"epoch {epoch}: the items' walks through the codebooks collapse, {share:.1%} of the paths differ, below "
            f"recommender.min_paths {least:g}; {REMEDY}",
            figures,
        )
