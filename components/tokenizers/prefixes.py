"""How well the beginning of a name describes its item, in one measure for all tokenizers.

Shapes: N items, T positions of the longest name, D content width, Z latent width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from components.config import require
from components.tokenizers.dvae import Dvae
from components.tokenizers.rkmeans import RkMeans
from components.tokenizers.rqvae import RqVae


@torch.no_grad()
def prefix_errors(tokenizer: RqVae | RkMeans | Dvae, x_ND: Tensor, codes_NT: Tensor) -> Tensor:
    """Return the squared error of every item after its first l codes, between unit vectors.

    Only the direction counts, so that tokenizers of different scale and loss compare: the error is
    2 (1 - cosine), from 0 to 4.

    Parameters
    ----------
    tokenizer : RqVae, RkMeans or Dvae
        The one that made the codes.
    x_ND : Tensor
        Content vectors.
    codes_NT : Tensor
        Codes long, -1 behind the last of a shorter name.

    Returns
    -------
    Tensor
        (N, T) float32; column l - 1 belongs to l codes; NaN where the name is shorter than l.

    Raises
    ------
    ValueError
        Vectors and codes are of different catalogues.
    """
    require(
        len(x_ND) == len(codes_NT),
        f"{len(x_ND)} content vectors, {len(codes_NT)} names: they are of different catalogues",
    )
    known = codes_NT.clamp(min=0)
    parts = []
    for x_BD, codes_BT in zip(torch.split(x_ND, 8192), torch.split(known, 8192), strict=True):
        match tokenizer:
            case Dvae():
                rebuilt_BTD = tokenizer.decode(tokenizer.table[codes_BT])
            case RkMeans():
                rebuilt_BTD = _sums(tokenizer, codes_BT)
            case RqVae():
                rebuilt_BTD = tokenizer.decoder(_sums(tokenizer, codes_BT))
        parts.append(
            (F.normalize(rebuilt_BTD, dim=-1) - F.normalize(x_BD, dim=-1)[:, None]).square().sum(dim=-1)
        )
    return torch.cat(parts).masked_fill(codes_NT < 0, torch.nan)


def _sums(tokenizer: RqVae | RkMeans, codes_BT: Tensor) -> Tensor:
    """Return the sum of the first l codewords, (B, T, Z), for every l."""
    words = [codebook_KZ[code] for codebook_KZ, code in zip(tokenizer.codebooks, codes_BT.T, strict=True)]
    return torch.stack(words, dim=1).cumsum(dim=1)
