"""The loop: resuming changes nothing, patience stops, the best state is kept."""

import pytest
import torch
from torch import nn

from components.training.loop import Halt, LoopConfig, cosine, fit


def _problem(seed: int = 0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, cosine(optimizer, 2, 40), torch.Generator().manual_seed(seed)


def _run(config: LoopConfig, scores, resume=None, problem=None, **hooks):
    model, optimizer, schedule, generator = problem or _problem()
    data = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))

    def batches(epoch: int):
        yield from data[torch.randperm(64, generator=generator)].split(16)

    def step(x):
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    return fit(
        {"model": model},
        optimizer,
        schedule,
        batches,
        step,
        lambda epoch: {"score": scores(epoch)},
        config,
        select="score",
        generator=generator,
        resume=resume,
        **hooks,
    )


def test_resuming_repeats_an_unbroken_run() -> None:
    config = LoopConfig(epochs=6, log_every=1)
    whole, states, broken = [], [], []
    _run(config, float, log=lambda step, values: whole.append((step, dict(values))), save=states.append)
    result = _run(
        config,
        float,
        resume=states[2],
        problem=_problem(seed=5),
        log=lambda step, values: broken.append((step, dict(values))),
    )
    start = next(i for i, (step, _) in enumerate(whole) if step == broken[0][0])
    assert broken == whole[start:]
    assert (result.epoch, result.step) == (6, 24)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resuming_restores_the_stream_that_dropout_draws_from_on_a_gpu() -> None:
    states: list = []
    _run(LoopConfig(epochs=1), float, save=states.append)
    after = torch.cuda.get_rng_state()
    torch.rand(10, device="cuda")
    _run(LoopConfig(epochs=1), float, resume=states[0])
    assert torch.equal(torch.cuda.get_rng_state(), after)


def test_a_finished_run_resumes_to_its_result() -> None:
    states = []
    first = _run(LoopConfig(epochs=2), float, save=states.append)
    again = _run(LoopConfig(epochs=2), float, resume=states[-1])
    assert again.step == first.step
    assert torch.equal(again.best["model"]["0.weight"], first.best["model"]["0.weight"])


def test_every_step_is_in_a_logged_mean_even_where_epochs_are_shorter_than_the_interval() -> None:
    logged: dict[int, list[int]] = {}
    for every in (1, 3, 50):
        steps: list[int] = []
        _run(
            LoopConfig(epochs=2, log_every=every),
            float,
            log=lambda step, values, steps=steps: steps.append(step) if "train/loss" in values else None,
        )
        logged[every] = steps
    assert logged == {1: [*range(1, 9)], 3: [3, 4, 6, 8], 50: [4, 8]}


def test_patience_stops_and_the_best_epoch_is_kept() -> None:
    seen = []

    def score(epoch: int) -> float:
        seen.append(epoch)
        return -abs(epoch - 3)

    result = _run(LoopConfig(epochs=20, patience=2), score)
    assert seen == [1, 2, 3, 4, 5]
    assert (result.epoch, result.metrics) == (3, {"score": 0})


def test_zero_everywhere_still_yields_a_state() -> None:
    result = _run(LoopConfig(epochs=3, validate_every=2), lambda epoch: 0.0)
    assert result.epoch == 2


def test_a_loss_that_is_not_finite_stops_with_its_step() -> None:
    problem = _problem()
    with torch.no_grad():
        problem[0][0].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan; lower the learning rate"):
        _run(LoopConfig(epochs=3, log_every=3), float, problem=problem)


def test_schedule_warms_up_and_ends_at_zero() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = cosine(optimizer, 4, 20)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert schedule.get_last_lr()[0] == pytest.approx(0.0)


def _halts_at(epoch: int):
    def score(number: int) -> float:
        if number == epoch:
            raise Halt(f"enough at {number}", {"perplexity": 1.0})
        return float(number)

    return score


def test_a_halt_returns_the_best_state_before_it_and_saves_nothing_of_its_own() -> None:
    states, logged = [], []
    result = _run(
        LoopConfig(epochs=8, validate_every=2),
        _halts_at(6),
        save=states.append,
        log=lambda step, values: logged.append(dict(values)),
    )
    assert result.halted == (6, "enough at 6")
    assert (result.epoch, result.metrics) == (4, {"score": 4.0})
    assert [state["epoch"] for state in states] == [2, 4]
    assert logged[-1]["epoch"] == 6 and logged[-1]["perplexity"] == 1.0
    resumed = _run(LoopConfig(epochs=8, validate_every=2), _halts_at(6), resume=states[-1])
    assert (resumed.halted, resumed.epoch) == (result.halted, 4)
    assert torch.equal(resumed.best["model"]["0.weight"], result.best["model"]["0.weight"])


def test_a_halt_before_anything_was_validated_is_the_callers_to_handle() -> None:
    with pytest.raises(Halt, match="enough at 1"):
        _run(LoopConfig(epochs=3), _halts_at(1))
    assert _run(LoopConfig(epochs=2), _halts_at(5)).halted is None
