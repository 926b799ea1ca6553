"""Users per CPU-second: our beam search against ``transformers`` generate with a prefix function.

Both sides run the same T5 with the same weights on the same users, interleaved, in one process on one thread,
and must return the same rankings. CPU time is counted, not wall time, so a busy machine changes little.

    python benchmarks/decode.py --batches 2 --repetitions 5
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
from machine import processor
from torch import Tensor
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from components.recommenders.layers import Attention, FeedForward
from components.recommenders.tiger import Tiger, TigerConfig
from components.seams import Catalogue, Ranking, SequenceBatch, SymbolSpace
from components.tokenizers.trie import PrefixTrie, build_trie

SHAPE = TigerConfig(dim=128, layers=4, heads=6, head_dim=64, hidden=1024, dropout=0.0, max_history=20)
SPACE = SymbolSpace((256, 256, 256), 256)
ITEMS, USERS, HISTORY, BEAMS = 12_101, 32, 20, 20
RESULT = Path(__file__).parent / "results" / "decode.md"

# In the shared vocabulary of transformers' T5, row 0 is padding and begin, symbol v is row v + 1.
OFFSET = 1


def random_table(items: int, space: SymbolSpace, generator: torch.Generator) -> Tensor:
    """Return (N, S) distinct SIDs: random codes, suffixes counted within equal codes."""
    codes = torch.stack(
        [torch.randint(k, (items,), generator=generator) for k in space.codebook_sizes], dim=1
    )
    bucket = torch.unique(codes, dim=0, return_inverse=True)[1]
    order = bucket.sort(stable=True).indices
    size = torch.bincount(bucket)
    suffix = torch.empty_like(bucket)
    suffix[order] = torch.arange(items) - (size.cumsum(0) - size)[bucket[order]]
    starts = torch.tensor(space.starts)
    return torch.cat([codes, suffix[:, None]], dim=1) + starts


def random_model(config: TigerConfig, space: SymbolSpace) -> Tiger:
    """Return a Tiger with random weights whose scores differ as clearly as those of a trained one."""
    model = Tiger(config, space).eval()
    with torch.no_grad():
        model.symbols.weight.mul_(10)
        model.begin.mul_(10)
    return model


def as_transformers(model: Tiger) -> T5ForConditionalGeneration:
    """Copy a Tiger into transformers' T5, over one vocabulary of all symbols."""
    config, rows = model.config, model.space.num_symbols + OFFSET
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=rows,
            d_model=config.dim,
            d_kv=config.head_dim,
            d_ff=config.hidden,
            num_layers=config.layers,
            num_heads=config.heads,
            dropout_rate=0.0,
            feed_forward_proj="relu",
            tie_word_embeddings=False,  # tied, transformers would scale the logits by dim ** -0.5
            pad_token_id=0,
            decoder_start_token_id=0,
            eos_token_id=None,
        )
    ).eval()
    with torch.no_grad():
        t5.shared.weight.copy_(torch.cat([model.begin[None], model.symbols.weight]))
        t5.lm_head.weight.copy_(t5.shared.weight)
        for ours, theirs in ((model.encoder, t5.encoder), (model.decoder, t5.decoder)):
            theirs.block[0].layer[0].SelfAttention.relative_attention_bias.weight.copy_(
                ours.bias.table.weight
            )
            theirs.final_layer_norm.weight.copy_(ours.norm.weight)
            for layer, block in zip(ours.layers, theirs.block, strict=True):
                _copy_attention(layer.attention, block.layer[0].SelfAttention)
                block.layer[0].layer_norm.weight.copy_(layer.attention_norm.weight)
                if ours is model.decoder:
                    _copy_attention(layer.cross, block.layer[1].EncDecAttention)
                    block.layer[1].layer_norm.weight.copy_(layer.cross_norm.weight)
                _copy_feed_forward(layer.feed_forward, block.layer[-1].DenseReluDense)
                block.layer[-1].layer_norm.weight.copy_(layer.forward_norm.weight)
    return t5


def _copy_attention(ours: Attention, theirs: torch.nn.Module) -> None:
    for mine, other in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        getattr(theirs, other).weight.copy_(getattr(ours, mine).weight)


def _copy_feed_forward(ours: FeedForward, theirs: torch.nn.Module) -> None:
    theirs.wi.weight.copy_(ours.up.weight)
    theirs.wo.weight.copy_(ours.down.weight)


def prefix_function(table: Tensor) -> Callable[[int, Tensor], list[int]]:
    """Return the usual dict trie as transformers asks for it."""
    children: dict[tuple[int, ...], list[int]] = {}
    known = set()
    for sid in (table + OFFSET).tolist():
        for step in range(len(sid)):
            if tuple(sid[: step + 1]) not in known:
                known.add(tuple(sid[: step + 1]))
                children.setdefault(tuple(sid[:step]), []).append(sid[step])
    return lambda _, written: children[tuple(written[1:].tolist())]


def ours(model: Tiger, batch: SequenceBatch, table: Tensor, trie: PrefixTrie, beams: int) -> Ranking:
    """Rank with this project's beam search."""
    with torch.inference_mode():
        return model.rank(batch, Catalogue(table, trie), beams, exclude_seen=False)


def theirs(
    t5: T5ForConditionalGeneration,
    batch: SequenceBatch,
    table: Tensor,
    allowed: Callable[[int, Tensor], list[int]],
    beams: int,
    *,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """Generate (B, W, S) symbols and their (B, W) scores with transformers.

    With ``renormalize`` a step is normalised over the allowed symbols, as our scores are; the usual call
    leaves it out, so it is not part of what is timed.
    """
    steps = table.shape[1]
    with torch.inference_mode():
        written = t5.generate(
            (table[batch.unique[batch.items]] + OFFSET).flatten(1),
            attention_mask=batch.mask.repeat_interleave(steps, dim=1).long(),
            prefix_allowed_tokens_fn=allowed,
            generation_config=GenerationConfig(
                num_beams=beams,
                num_return_sequences=beams,
                max_new_tokens=steps,
                length_penalty=0.0,
                do_sample=False,
                renormalize_logits=renormalize,
                pad_token_id=0,
                decoder_start_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            ),
        )
    symbols = written.sequences[:, 1:].view(-1, beams, steps) - OFFSET
    return symbols, written.sequences_scores.view(-1, beams)


def random_batch(users: int, history: int, items: int, generator: torch.Generator) -> SequenceBatch:
    """Return full histories of random items."""
    drawn = torch.randint(items, (users, history), generator=generator)
    unique, inverse = torch.unique(drawn, return_inverse=True)
    return SequenceBatch(unique, inverse, torch.ones_like(drawn, dtype=torch.bool), inverse[:, 0])


def _cpu_seconds(run: Callable[[], object]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


def _row(name: str, seconds: list[float], users: int) -> str:
    middle = statistics.median(seconds) / users
    fastest, slowest = min(seconds) / users, max(seconds) / users
    return f"| {name} | {1 / middle:.1f} | {1e3 * middle:.1f} | {1e3 * fastest:.1f}-{1e3 * slowest:.1f} |"


def main() -> None:
    """Check that both sides agree, time them in turn, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=2, help=f"batches of {USERS} users (default 2)")
    parser.add_argument("--repetitions", type=int, default=5, help="times each batch is ranked (default 5)")
    parser.add_argument("--commit", default="not given", help="commit to name in the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    table = random_table(ITEMS, SPACE, generator)
    trie, allowed = build_trie(table), prefix_function(table)
    model = random_model(SHAPE, SPACE)
    t5 = as_transformers(model)
    batches = [random_batch(USERS, HISTORY, ITEMS, generator) for _ in range(arguments.batches)]

    # This also warms both sides up.
    ranking = ours(model, batches[0], table, trie, BEAMS)
    symbols, scores = theirs(t5, batches[0], table, allowed, BEAMS, renormalize=True)
    same = float((table[ranking.items] == symbols).all(dim=-1).float().mean())
    apart = float((ranking.scores - scores).abs().max())
    if same < 1 or apart > 1e-3:
        raise SystemExit(f"the two sides disagree: {same:.2%} of places equal, scores {apart:.1e} apart")

    mine: list[float] = []
    other: list[float] = []
    for _ in range(arguments.repetitions):
        for batch in batches:
            mine.append(_cpu_seconds(lambda batch=batch: ours(model, batch, table, trie, BEAMS)))
            other.append(
                _cpu_seconds(lambda batch=batch: theirs(t5, batch, table, allowed, BEAMS, renormalize=False))
            )
    ratio = statistics.median(other) / statistics.median(mine)

    lines = [
        "# Constrained beam search, users per CPU-second",
        "",
        "| decoder | users per CPU-second | ms per user, median | range |",
        "|---|---|---|---|",
        _row("`Tiger.rank`", mine, USERS),
        _row("`transformers` generate, prefix function on a dict trie", other, USERS),
        "",
        f"Ratio of medians: **{ratio:.1f}x**. Both return the same {BEAMS} items for each of {USERS} users; "
        f"scores differ by at most {apart:.0e}.",
        "",
        f"Shape: T5, d_model {SHAPE.dim}, {SHAPE.layers}+{SHAPE.layers} layers, {SHAPE.heads} heads x "
        f"{SHAPE.head_dim}, d_ff {SHAPE.hidden}; {ITEMS:,} items, {SPACE.num_steps} steps of 256; {HISTORY} "
        f"items ({HISTORY * SPACE.num_steps} tokens) of history; {BEAMS} beams, batches of {USERS} users; "
        f"random weights and SIDs, seed 0. One thread, CPU time, {len(mine)} runs a side, interleaved.",
        "",
        f"Machine: {processor()}. Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}. Date: {date.today().isoformat()}. "
        f"Commit: {arguments.commit}. Command: `python benchmarks/decode.py --batches {arguments.batches} "
        f"--repetitions {arguments.repetitions}`.",
    ]
    print("\n".join(lines))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
