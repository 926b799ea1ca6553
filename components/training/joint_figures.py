"""What joint training looks at: how codes are drawn, who pulls at them, and the state of the table.

Names with a slash are for plots and tables: ``group/level``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from components.seams import Quantized
from components.tokenizers.live_dvae import LiveSource


def gradient_figures(parts: Mapping[str, Tensor], codebooks: Mapping[str, Tensor]) -> dict[str, float]:
    """Measure what each part of the loss asks of each codebook, by its name: norms, and a cosine.

    The cosine is that of the recommendation's gradient with the sum of all others: below 0 they pull apart.
    """
    books, gradients = list(codebooks.values()), {}
    for name, part in parts.items():
        found = torch.autograd.grad(part, books, retain_graph=True, allow_unused=True)
        gradients[name] = [
            torch.zeros_like(book) if g is None else g for g, book in zip(found, books, strict=True)
        ]
    figures = {}
    for level, book_name in enumerate(codebooks):
        for name, by_level in gradients.items():
            figures[f"codebook_gradient/{name}/{book_name}"] = float(by_level[level].norm())
        own = gradients["recommendation"][level]
        others = torch.stack([g[level] for name, g in gradients.items() if name != "recommendation"]).sum(
            dim=0
        )
        cosine = F.cosine_similarity(own.flatten(), others.flatten(), dim=0)
        figures[f"gradient_cosine/{book_name}"] = float(cosine)
    return figures


def exploration_figures(quantized: Quantized, table_UL: Tensor) -> dict[str, Tensor]:
    """Return by level how codes are drawn: agreements, top probability, who explores, and how much.

    Drawn against nearest says how much is explored: near 1/K codes are random, near 1 noise does nothing. Of a level
    only items count whose SID reaches it; NaN where none does.
    """
    figures = {}
    for level, soft_UK in enumerate(quantized.probabilities):
        name = f"level{level + 1}"
        drawn, nearest = quantized.codes[:, level], quantized.greedy[:, level]
        noise_U = quantized.noise[:, level]
        top_U = soft_UK.detach().amax(dim=-1)
        by_item = {
            "agree/drawn_nearest": drawn == nearest,
            "agree/nearest_table": nearest == table_UL[:, level],
            "agree/drawn_table": drawn == table_UL[:, level],
            "top_probability": top_U,
            "hot_share": noise_U > 0,
            "noise": noise_U,
        }
        ended_U = table_UL[:, level] < 0
        for figure, value_U in by_item.items():
            figures[f"{figure}/{name}"] = value_U.float().masked_fill(ended_U, torch.nan).nanmean()
    return figures


def table_figures(live: LiveSource) -> dict[str, float]:
    """Return the state of the table: codes in use and perplexity by level, collisions, largest bucket, lengths.

    Of a level only items count whose SID reaches it. A balanced table has balanced codes, however close its codewords
    have come to one another, and where names get shorter fewer items are left to spread. So where the table is not made
    of nearest codes on all levels, the perplexity of these stands beside it: that one falls in a collapse.
    """
    sizes = live.space.codebook_sizes
    figures = perplexities("sids/perplexity", live.codes, sizes)
    nearest_NL = live.nearest()
    if nearest_NL is not None:
        figures |= perplexities("sids/nearest_perplexity", nearest_NL, sizes)
    for level, code_N in enumerate(live.codes.T):
        figures[f"sids/codes_in_use/level{level + 1}"] = float(len(torch.unique(code_N[code_N >= 0])))
    buckets = torch.unique(live.codes, dim=0, return_counts=True)[1]
    figures["sids/distinct"] = float(len(buckets))
    figures["sids/colliding"] = float(buckets[buckets > 1].sum()) / len(live.codes)
    figures["sids/largest_bucket"] = float(buckets.max())
    if not live.space.one_length:
        length_N = (live.codes >= 0).sum(dim=1)
        figures["sids/length"] = float(length_N.float().mean())
        for length in range(1, live.space.num_levels + 1):
            figures[f"sids/length_share/{length}"] = float((length_N == length).float().mean())
    return figures


def perplexities(name: str, codes_NL: Tensor, sizes: Sequence[int]) -> dict[str, float]:
    """Return the perplexity of the codes of each level as ``<name>/level1 ...``; 0 where no SID has one."""
    figures = {}
    for level, (size, code_N) in enumerate(zip(sizes, codes_NL.T, strict=True)):
        used = code_N[code_N >= 0]
        share_K = torch.bincount(used, minlength=size).double() / max(1, len(used))
        figures[f"{name}/level{level + 1}"] = (
            float(torch.special.entr(share_K).sum().exp()) if len(used) else 0.0
        )
    return figures
