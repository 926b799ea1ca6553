"""What joint training looks at: how codes are drawn, who pulls at them, and the state of the table.

Names with a slash are for plots and tables: ``group/level``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from components.seams import Quantized
from components.tokenizers.quantize import residual_codes
from components.tokenizers.sources import LiveSids


def gradient_figures(parts: Mapping[str, Tensor], codebooks: Sequence[Tensor]) -> dict[str, float]:
    """Measure by level what each part of the loss asks of the codebooks: norms, and a cosine.

    The cosine is that of the recommendation's gradient with the sum of all others: below 0 they pull apart.
    """
    gradients = {}
    for name, part in parts.items():
        found = torch.autograd.grad(part, codebooks, retain_graph=True, allow_unused=True)
        gradients[name] = [
            torch.zeros_like(book) if g is None else g for g, book in zip(found, codebooks, strict=True)
        ]
    figures = {}
    for level in range(len(codebooks)):
        for name, by_level in gradients.items():
            figures[f"codebook_gradient/{name}/level{level + 1}"] = float(by_level[level].norm())
        own = gradients["recommendation"][level]
        others = torch.stack([g[level] for name, g in gradients.items() if name != "recommendation"]).sum(
            dim=0
        )
        cosine = F.cosine_similarity(own.flatten(), others.flatten(), dim=0)
        figures[f"gradient_cosine/level{level + 1}"] = float(cosine)
    return figures


def exploration_figures(quantized: Quantized, table_UL: Tensor) -> dict[str, Tensor]:
    """Return by level how codes are drawn: agreements, top probability, who explores, and how much.

    Drawn against nearest says how much is explored: near 1/K codes are random, near 1 noise does nothing.
    """
    figures = {}
    for level, soft_UK in enumerate(quantized.probabilities):
        name = f"level{level + 1}"
        drawn, nearest = quantized.codes[:, level], quantized.greedy[:, level]
        noise_U = quantized.noise[:, level]
        figures[f"agree/drawn_nearest/{name}"] = (drawn == nearest).float().mean()
        figures[f"agree/nearest_table/{name}"] = (nearest == table_UL[:, level]).float().mean()
        figures[f"agree/drawn_table/{name}"] = (drawn == table_UL[:, level]).float().mean()
        figures[f"top_probability/{name}"] = soft_UK.detach().amax(dim=-1).mean()
        figures[f"hot_share/{name}"] = (noise_U > 0).float().mean()
        figures[f"noise/{name}"] = noise_U.mean()
    return figures


def table_figures(live: LiveSids) -> dict[str, float]:
    """Return the state of the table: codes in use and perplexity by level, collisions, largest bucket.

    A balanced table has balanced codes, however close its codewords have come to one another. So where the table is
    not made of nearest codes, their perplexity stands beside it: that one falls in a collapse.
    """
    sizes = live.space.codebook_sizes
    figures = perplexities("sids/perplexity", live.codes, sizes)
    if live.rule.assignment != "nearest":
        nearest_NL = residual_codes(live.latents(), list(live.tokenizer.codebooks))
        figures |= perplexities("sids/nearest_perplexity", nearest_NL, sizes)
    for level, code_N in enumerate(live.codes.T):
        figures[f"sids/codes_in_use/level{level + 1}"] = float(len(torch.unique(code_N)))
    buckets = torch.unique(live.codes, dim=0, return_counts=True)[1]
    figures["sids/distinct"] = float(len(buckets))
    figures["sids/colliding"] = float(buckets[buckets > 1].sum()) / len(live.codes)
    figures["sids/largest_bucket"] = float(buckets.max())
    return figures


def perplexities(name: str, codes_NL: Tensor, sizes: Sequence[int]) -> dict[str, float]:
    """Return the perplexity of the codes of each level as ``<name>/level1 ...``."""
    figures = {}
    for level, (size, code_N) in enumerate(zip(sizes, codes_NL.T, strict=True)):
        share_K = torch.bincount(code_N, minlength=size).double() / len(code_N)
        figures[f"{name}/level{level + 1}"] = float(torch.special.entr(share_K).sum().exp())
    return figures
