"""Presets load as what they are, explain themselves, and hold the published schedule where they claim to."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from components.config import PRESETS, load_preset
from components.recommenders.build import build_recommender
from components.seams import SymbolSpace
from components.tokenizers.build import build_tokenizer
from workflows.config import AblationConfig, Arm, PipelineConfig, Recipe

ALL = sorted(path.stem for path in PRESETS.glob("*.yaml"))


class Published(NamedTuple):
    """What the paper's runs on one data set were made with; the recipe that all sets share stands in the tests."""

    pretraining_batch: int
    pretraining_commitment: float
    epochs: int
    patience: int
    beams: int
    evaluation_batch: int
    tau: float
    fixed_lr: float
    """Tokenizer rate of the gradient fix; all other rows have 1e-5."""
    rho: float
    sigma: float
    lam: float
    both: tuple[float, float, float] | None
    """rho, sigma and lambda of SDUD+FrqUD; None where another loss was used, which is not built."""
    ablated: bool
    """Whether "no decay" and "no Gumbel noise" were published."""
    naive: bool
    """Whether naive STE has a figure."""
    users: int


# fmt: off
PUBLISHED = {
    "beauty":
        Published(1024, .25, 120, 15, 20, 32, 2.0, 1e-5, 1.5, 2.0, 1.7, None, True, True, 22_363),
    "instruments":
        Published(2048, .25, 100, 15, 20, 32, 2.0, 2e-5, 2.0, 1.0, 1.8, (1.5, 1.5, 1.8), False, True, 24_772),
    "yelp":
        Published(4096, .50, 200, 20, 80, 16, 1.5, 2e-6, 1.1, 2.0, 1.7, (1.1, 2.0, 1.0), False, False, 30_431),
}
# fmt: on


def load(name: str) -> PipelineConfig:
    raw = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    return load_preset(AblationConfig if "arms" in raw else PipelineConfig, name)


def ablation(name: str) -> AblationConfig:
    config = load(name)
    assert isinstance(config, AblationConfig)
    return config


def recipes(name: str) -> dict[str, tuple[Arm, Recipe]]:
    config = ablation(name)
    return {arm.name: (arm, config.resolve(arm, config.seeds[0])) for arm in config.arms}


@pytest.mark.parametrize("name", ALL)
def test_a_preset_loads_and_bears_its_name(name: str) -> None:
    assert load(name).name == name


@pytest.mark.parametrize("name", ALL)
def test_every_key_of_a_preset_says_what_it_is(name: str) -> None:
    lines = (PRESETS / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ") and any(line.startswith("# Command:   make ") for line in lines)
    keys = [line for line in lines if line.strip() and not line.startswith("#")]
    assert [line for line in keys if " # " not in line] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tokenizer_is_pretrained_as_published(name: str) -> None:
    published, stage = PUBLISHED[name], load(name).tokenizer
    model = stage.model
    assert model.kind == "rqvae"
    assert (model.codebook_sizes, model.hidden, model.latent_dim) == ([256] * 3, [2048, 1024, 512], 256)
    assert model.sinkhorn is not None
    balanced = set(model.sinkhorn.levels) or {1, 2, 3}
    assert (model.sinkhorn.epsilon, model.sinkhorn.iterations, balanced) == (0.003, 50, {1, 2, 3})
    assert (model.commitment, model.kmeans_iterations) == (published.pretraining_commitment, 100)
    assert model.revive_every is None
    assert (stage.lr, stage.weight_decay, stage.loop.epochs) == (1e-3, 1e-4, 10_000)
    assert (stage.batch_size, stage.keep) == (published.pretraining_batch, "collision_rate")
    assert stage.keep_from * stage.loop.epochs <= 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recommender_is_trained_as_published(name: str) -> None:
    published, stage = PUBLISHED[name], load(name).recommender
    model = stage.model
    assert (model.kind, model.layers, model.dim, model.heads, model.head_dim) == ("tiger", 6, 128, 4, 64)
    assert (model.hidden, model.dropout, model.max_history) == (512, 0.1, 50)
    assert (stage.optim.lr, stage.optim.weight_decay, stage.optim.warmup_steps) == (1e-3, 0.05, 500)
    assert (stage.batch_size, stage.loop.clip_norm, stage.loop.validate_every) == (256, 1.0, 1)
    assert (stage.loop.epochs, stage.loop.patience) == (published.epochs, published.patience)
    assert (stage.validation.users, stage.validation.beams) == (published.users, published.beams)
    assert stage.validation.batch_size == published.evaluation_batch


@pytest.mark.parametrize("name", PUBLISHED)
def test_evaluation_and_tables_are_as_published(name: str) -> None:
    published, config = PUBLISHED[name], ablation(name)
    assert config.seeds == [2020]
    assert (config.split.protocol, config.split.max_history, config.ingest.repeats) == (
        "leave_one_out",
        50,
        "keep",
    )
    evaluate = config.evaluate
    assert (evaluate.seen, evaluate.ks, evaluate.beams) == (["kept"], [1, 5, 10], published.beams)
    assert config.sids.suffix_size == 256
    for rule in (config.sids, config.joint.refresh):
        assert (rule.assignment, rule.epsilon, rule.iterations) == ("sinkhorn", 0.003, 50)
    assert config.joint.refresh.every == 1


def wanted_explorations(published: Published) -> dict[str, dict[str, Any]]:
    """What each joint arm explores with: one arm for each published row that can be built."""
    tau = published.tau
    frequency = {"kind": "frqud", "noise": 1.0, "momentum": 0.99, "ratio": published.rho}
    deviation = {"scaling": "scaled", "sigma_lr": 1e-3}
    # The row of Beauty has no lambda: the arm takes that of SDUD and the same first noise.
    rho, sigma, lam = published.both or (published.rho, 2.0, published.lam)
    wanted: dict[str, dict[str, Any]] = {
        "historical frqud": {**frequency, "scope": "item"},
        "historical sdud": {
            "kind": "sdud",
            "sigma": published.sigma,
            "lam": published.lam,
            **deviation,
        },
        "historical sdud_frqud": {
            "kind": "sdud_frqud",
            "sigma": sigma,
            "lam": lam,
            **deviation,
            "ratio": rho,
            "momentum": 0.99,
            "scope": "item",
        },
    }
    if published.ablated:
        wanted |= {"historical gumbel": {"kind": "gumbel", "noise": 1.0}, "historical none": {"kind": "none"}}
    if published.naive:
        wanted["ste"] = {"kind": "ste"}
    wanted["frqud"] = {**frequency, "scope": "level"}
    forward = {"ste": "sample"}
    return {
        arm: {"tau": tau, "forward": forward.get(arm, "table"), **settings}
        for arm, settings in wanted.items()
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_there_is_one_arm_for_each_published_row_with_its_noise(name: str) -> None:
    arms = recipes(name)
    assert [arm for arm, (entry, _) in arms.items() if entry.method == "two_stage"] == ["two-stage"]
    assert [arm for arm, (entry, _) in arms.items() if entry.method == "sasrec"] == ["sasrec"]
    joint = {arm: recipe for arm, (entry, recipe) in arms.items() if entry.method == "joint"}
    found = {arm: recipe.joint.exploration.model_dump() for arm, recipe in joint.items()}
    assert found == wanted_explorations(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_routing_rates_and_scales_are_those_of_the_release_that_made_the_row(name: str) -> None:
    base = ablation(name)
    for arm, (entry, recipe) in recipes(name).items():
        # An arm changes nothing but this: model, schedule and tokenizer stay what the tests above have seen.
        assert {key.partition(".")[0] for key in entry.settings} <= {"joint"}, arm
        assert recipe.recommender == base.recommender.model_copy(update={"seed": 2020})
        if entry.method != "joint":
            continue
        joint = recipe.joint
        historical = arm.startswith("historical ")
        assert joint.routing == ("historical" if historical else "end_to_end"), arm
        assert joint.logit_scale == (None if historical else 1.0), arm
        assert joint.tokenizer_lr == (PUBLISHED[name].fixed_lr if arm == "frqud" else 1e-5), arm
        assert joint.paths.model_dump() == {
            "history": True,
            "teacher_forcing": True,
            "target": True,
            "target_weight": 1.0,
        }
        weights = (joint.recommendation_weight, joint.codebook_weight, joint.commitment_weight)
        assert (*weights, joint.latent_reconstruction_weight, joint.suffix_cost) == (1, 1, 0.25, 1, 0)
        assert (joint.top_probability, joint.tokenizer_weight_decay) == (0.011, 0.05)
        assert (joint.train_encoder, joint.residual, joint.collapse) == (False, "sampled", None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_models_have_the_published_numbers_of_weights(name: str) -> None:
    config = load(name)
    with torch.device("meta"):
        tokenizer = build_tokenizer(config.tokenizer.model, 4096)
        recommender = build_recommender(config.recommender.model, SymbolSpace((256,) * 3, 256))

    def weights(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert round(weights(tokenizer.encoder) / 1e6, 2) == 11.14
    assert sum(p.numel() for p in tokenizer.codebooks) == 196_608
    # Published: 4.63 million trained, 0.56 of them in adapters that nothing uses.
    assert round(weights(recommender) / 1e6, 2) == 4.07


def test_beauty_cpu_is_a_smaller_matrix_on_the_data_of_beauty() -> None:
    full, small = ablation("beauty"), ablation("beauty-cpu")
    assert (small.ingest, small.split) == (full.ingest, full.split)
    assert small.tokenizer.model.codebook_sizes == full.tokenizer.model.codebook_sizes
    assert (small.tokenizer.model.kind, small.recommender.model.kind) == ("rkmeans", "causal")
    assert (small.seeds, small.evaluate.seen) == ([0], ["kept", "excluded"])
    assert [(arm.name, arm.method) for arm in small.arms] == [
        ("sasrec", "sasrec"),
        ("two-stage", "two_stage"),
        ("gumbel", "joint"),
        ("frqud", "joint"),
    ]
    kinds = {arm: recipe.joint.exploration.kind for arm, (_, recipe) in recipes("beauty-cpu").items()}
    assert (kinds["gumbel"], kinds["frqud"]) == ("gumbel", "frqud")


@pytest.mark.parametrize("name", [*PUBLISHED, "beauty-cpu"])
def test_data_that_cannot_be_shipped_is_read_from_a_folder_that_the_user_fills(name: str) -> None:
    source = load(name).ingest.source
    assert source.kind == "tabular"
    folder = Path("data") / name.removesuffix("-cpu")
    for file in filter(None, (source.interactions, source.items)):
        assert Path(file.path).parent == folder
