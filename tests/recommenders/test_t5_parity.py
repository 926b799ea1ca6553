"""Our stacks are T5: with copied weights they give what transformers gives."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from components.recommenders.backbones import DecoderStack, EncoderStack, StackConfig
from components.recommenders.tiger import Tiger, TigerConfig
from components.seams import BatchTokens, ItemTokens, SequenceBatch, SymbolSpace
from components.tokenizers.trie import build_trie

transformers = pytest.importorskip("transformers")

CONFIG = TigerConfig(dim=32, layers=3, heads=3, head_dim=8, hidden=48, dropout=0.0, max_history=60)
SPACE = SymbolSpace((5, 4), 3)


@pytest.fixture(scope="module")
def decode(benchmark_script) -> ModuleType:
    return benchmark_script("decode")


@pytest.fixture(scope="module")
def pair(decode: ModuleType) -> tuple[Tiger, torch.nn.Module]:
    """A Tiger with weights large enough that every part matters, and its twin."""
    torch.manual_seed(0)
    model = Tiger(CONFIG, SPACE).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif "bias.table" in name:
                weight.normal_()
            else:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return model, decode.as_transformers(model)


def right_padded(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random vectors, and a random mask with at least one token a row."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, length, CONFIG.dim, generator=generator)
    present = torch.randint(1, length + 1, (batch, 1), generator=generator)
    present[0] = length
    return x, torch.arange(length) < present


@torch.no_grad()
def test_encoder_equals_t5(pair: tuple[Tiger, torch.nn.Module]) -> None:
    model, t5 = pair
    x, mask = right_padded(6, 200)  # past max_distance 128, so that the last bucket is used too
    expected = t5.encoder(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
    found = model.encoder(x, mask)
    assert float((found - expected)[mask].abs().max()) <= 1e-5


@torch.no_grad()
def test_decoder_equals_t5(pair: tuple[Tiger, torch.nn.Module]) -> None:
    model, t5 = pair
    memory, mask = right_padded(6, 37)
    y = torch.randn(6, 150, CONFIG.dim)
    expected = t5.decoder(
        inputs_embeds=y, encoder_hidden_states=memory, encoder_attention_mask=mask.long(), use_cache=False
    ).last_hidden_state
    assert float((model.decoder(y, memory, mask) - expected).abs().max()) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_relative_bias_equals_t5(pair: tuple[Tiger, torch.nn.Module], part: str) -> None:
    model, t5 = pair
    bias = getattr(model, part).bias
    theirs = getattr(t5, part).block[0].layer[0].SelfAttention
    position = torch.arange(400)
    assert torch.equal(bias(position, position), theirs.compute_bias(400, 400))


@torch.no_grad()
def test_the_comparison_can_fail(pair: tuple[Tiger, torch.nn.Module]) -> None:
    """A control: stacks with other weights are far away."""
    _, t5 = pair
    config = StackConfig(dim=32, layers=3, heads=3, head_dim=8, hidden=48, dropout=0.0)
    x, mask = right_padded(6, 20)
    expected = t5.encoder(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
    assert float((EncoderStack(config).eval()(x, mask) - expected)[mask].abs().max()) > 0.1
    expected = t5.decoder(inputs_embeds=x, encoder_hidden_states=x, use_cache=False).last_hidden_state
    found = DecoderStack(config).eval()(x, x, torch.ones_like(mask))
    assert float((found - expected).abs().max()) > 0.1


@torch.no_grad()
def test_whole_model_and_beams_equal_t5(pair: tuple[Tiger, torch.nn.Module], decode: ModuleType) -> None:
    """Loss and rankings of transformers on histories of unequal length."""
    model, t5 = pair
    table = decode.random_table(25, SPACE, torch.Generator().manual_seed(2))
    items = torch.randint(25, (6, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(9) < torch.tensor([1, 9, 4, 2, 7, 3])[:, None]
    batch = SequenceBatch(torch.arange(25), items, mask, torch.tensor([0, 3, 24, 7, 7, 1]))

    hard = ItemTokens(table)
    labels = table[batch.target] + decode.OFFSET
    logits = t5(
        input_ids=(table[items] + decode.OFFSET).flatten(1),
        attention_mask=mask.repeat_interleave(3, dim=1).long(),
        labels=labels,
    ).logits
    steps = []
    for step in range(3):  # our softmax runs over the symbols of a step
        first, end = (edge + decode.OFFSET for edge in SPACE.range(step))
        steps.append(torch.nn.functional.cross_entropy(logits[:, step, first:end], labels[:, step] - first))
    found = model.loss(batch, BatchTokens(hard, hard, hard))
    torch.testing.assert_close(found.steps, torch.stack(steps), rtol=0, atol=1e-5)

    ranking = decode.ours(model, batch, table, build_trie(table), 8)
    symbols, scores = decode.theirs(t5, batch, table, decode.prefix_function(table), 8, renormalize=True)
    assert torch.equal(table[ranking.items], symbols)
    torch.testing.assert_close(ranking.scores, scores, rtol=0, atol=1e-5)
