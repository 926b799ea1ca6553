"""Settings are closed, presets load, and overrides say where they went wrong."""

from pathlib import Path

import pytest
import yaml

from components.config import describe, load_preset
from workflows.config import AblationConfig, PipelineConfig
from workflows.resolve import main


def test_overrides_are_read_as_yaml() -> None:
    config = load_preset(
        PipelineConfig,
        "quickstart",
        [
            "recommender.optim.lr=3e-4",
            "tokenizer.model.codebook_sizes=[8, 8]",
            "joint.paths.target=false",
            "joint.exploration.kind=ste",
            "joint.exploration={kind: none}",
        ],
    )
    assert config.recommender.optim.lr == 3e-4
    assert config.tokenizer.model.codebook_sizes == [8, 8]
    assert config.joint.exploration.kind == "none"


def test_unknown_keys_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"quickstart.yaml: settings that do not fit PipelineConfig:\n.*recomender"
    ):
        load_preset(PipelineConfig, "quickstart", ["recomender.loop.epochs=2"])
    with pytest.raises(ValueError, match=r"recommender.model.causal.widht: Extra inputs are not permitted"):
        load_preset(PipelineConfig, "quickstart", ["recommender.model.widht=2"])


def test_bounds_are_kept() -> None:
    with pytest.raises(ValueError, match=r"recommender.model.causal.dropout: Input should be less than 1"):
        load_preset(PipelineConfig, "quickstart", ["recommender.model.dropout=1.5"])


@pytest.mark.parametrize("wrong", ["recommender", "=3", "name.deep=1", "seed=[64"])
def test_overrides_that_make_no_sense(wrong: str) -> None:
    with pytest.raises(ValueError, match="override"):
        load_preset(PipelineConfig, "quickstart", [wrong])


def test_a_preset_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(
        FileNotFoundError, match="no preset 'quikstart': give a YAML file or one of .*quickstart"
    ):
        load_preset(PipelineConfig, "quikstart")


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recommender: {loop: [")
    with pytest.raises(ValueError, match=r"mine.yaml: not valid YAML"):
        load_preset(PipelineConfig, path)
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="a preset is a mapping of settings, got list"):
        load_preset(PipelineConfig, path)


def test_gradient_paths_that_causal_cannot_split_are_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="history and teacher_forcing on or off together"):
        load_preset(PipelineConfig, "quickstart", ["joint.paths.history=false"])


def test_codebooks_too_small_for_joint_training_are_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"joint.top_probability 0.5 must lie above 1/2"):
        load_preset(PipelineConfig, "quickstart", ["tokenizer.model.codebook_sizes=[64, 2]"])


DVAE = "tokenizer.model={kind: dvae}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([DVAE, "recommender.model={kind: tiger}"], "tiger reads SIDs of one length.*length=fixed"),
        ([DVAE, "sids.assignment=sinkhorn"], "sids.assignment sinkhorn .* a dvae does not have"),
        ([DVAE, "recommender.model.max_tokens=4"], "max_tokens 4 does not hold the longest SID.* 5 symbols"),
        (["sids.length=median"], "sids.length median chooses among learned lengths"),
        (["tokenizer.model={kind: dvae, length: fixed}", "sids.length=optimum"], "sids.length optimum"),
        (["recommender.model.max_tokens=3"], "max_tokens 3 does not hold the longest SID.* 4 symbols"),
    ],
)
def test_lengths_that_do_not_fit_together_are_refused_before_anything_runs(overrides, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_preset(PipelineConfig, "quickstart", overrides)


def test_a_dvae_trains_jointly_with_every_recommender_that_reads_its_names() -> None:
    fixed = "tokenizer.model={kind: dvae, length: fixed}"
    for tokenizer, kind in ((fixed, "tiger"), (fixed, "causal"), (DVAE, "causal")):
        config = load_preset(PipelineConfig, "quickstart", [tokenizer, f"recommender.model={{kind: {kind}}}"])
        config.check_joint()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["joint.exploration={kind: ste}"], "ste with forward=sample reads the codes drawn now"),
        (["joint.exploration={kind: gumbel, forward: sample}"], "gumbel with forward=sample"),
        (["sids.length=median"], "sids.length is median, joint.refresh.length argmax.*set both alike"),
        (["joint.refresh.assignment=sinkhorn"], "joint.refresh.assignment sinkhorn"),
    ],
)
def test_what_joint_training_of_a_dvae_cannot_do_is_refused_before_anything_runs(overrides, message) -> None:
    config = load_preset(PipelineConfig, "quickstart", [DVAE, *overrides])
    with pytest.raises(ValueError, match=message):
        config.check_joint()


def test_a_small_vocabulary_needs_no_wanted_top_probability() -> None:
    """The logits of a dvae have scales of their own."""
    load_preset(PipelineConfig, "quickstart", ["tokenizer.model={kind: dvae, vocabulary: 2, positions: 6}"])


def test_a_resolved_config_resolves_to_itself() -> None:
    config = load_preset(PipelineConfig, "quickstart")
    assert (
        PipelineConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
        == config
    )


def test_every_key_of_the_pipeline_is_explained() -> None:
    lines = describe(AblationConfig)
    assert [line for line in lines if ": " not in line and not line.endswith(":")] == []
    assert "joint.tokenizer_lr = 0.0001: " in "\n".join(lines)
    assert any(line.startswith("ingest.source[tabular].columns") for line in lines)
    assert any(line.startswith("arms.settings = {}: ") for line in lines)
    assert any(line.startswith("sasrec.model.dim = ") for line in lines)


def test_the_command_resolves_explains_and_refuses(capsys) -> None:
    assert main(["quickstart", "recommender.loop.epochs=2"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["recommender"]["loop"]["epochs"] == 2
    assert main(["--keys", "split"]) == 0
    assert all(line.startswith("split") for line in capsys.readouterr().out.splitlines())
    assert main(["--keys", "arms"]) == 0
    assert "arms.method = required: " in capsys.readouterr().out
    assert main(["--ablation", "ablation", "seeds=[7]"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seeds"] == [7]
    assert main(["ablation"]) == 2
    assert "arms: Extra inputs are not permitted" in capsys.readouterr().err
    assert main([]) == main(["--ablation"]) == 2
    assert main(["quickstart", "recommender.loop.epoch=2"]) == 2
    assert "recommender.loop.epoch: Extra inputs are not permitted" in capsys.readouterr().err


PLAIN = {"name": "plain", "method": "two_stage"}


def matrix(*arms: dict, **changes) -> AblationConfig:
    return AblationConfig.model_validate({"arms": [PLAIN, *arms]} | changes)


def joint(**settings) -> dict:
    return {
        "name": "new",
        "method": "joint",
        "settings": {k.replace("__", "."): v for k, v in settings.items()},
    }


def test_an_arm_changes_its_own_settings_and_takes_its_seed_everywhere() -> None:
    config = matrix(joint(joint__exploration={"kind": "frqud", "ratio": 2}, recommender__optim__lr="3e-4"))
    plain, new = (config.resolve(arm, 5) for arm in config.arms)
    assert (new.joint.exploration.kind, new.joint.exploration.ratio) == ("frqud", 2)
    assert new.recommender.optim.lr == 3e-4
    assert {recipe.tokenizer.seed for recipe in (plain, new)} == {5}
    assert plain.recommender.seed == plain.sasrec.seed == 5
    assert plain.recommender.optim == config.recommender.optim and plain.joint == config.joint


def test_resolving_survives_the_way_through_json() -> None:
    config = load_preset(AblationConfig, "ablation")
    again = AblationConfig.model_validate_json(config.model_dump_json())
    assert [again.resolve(arm, 1) for arm in again.arms] == [config.resolve(arm, 1) for arm in config.arms]


@pytest.mark.parametrize(
    ("arm", "rule"),
    [
        (
            joint(joint__exploraton={"kind": "none"}),
            r"arm 'new': joint.exploraton: Extra inputs are not permitted",
        ),
        (joint(joint__tokenizer_lr=-1), r"arm 'new': joint.tokenizer_lr: Input should be greater than 0"),
        (
            joint(joint__exploration__kind="sdud"),
            r"arm 'new': joint.exploration.sdud.noise: .* whole section",
        ),
        (joint(joint__paths__history=False), r"arm 'new': .*history and teacher_forcing on or off together"),
        (
            joint(joint__tokenizer_lr__deep=1),
            r"arm 'new': 'joint.tokenizer_lr.deep' runs through 'tokenizer_lr'",
        ),
        (
            joint(ingest__k_core=3),
            r"arm 'new': 'ingest.k_core' is not its to change; a joint arm may change tok",
        ),
        (joint(sasrec__batch_size=3), r"arm 'new': 'sasrec.batch_size' is not its to change"),
        (joint(recommender__seed=3), r"arm 'new': 'recommender.seed' would set a seed"),
        (joint(recommender={"seed": 3}), r"arm 'new': 'recommender' would set a seed"),
        (PLAIN, r"two arms are named 'plain'"),
        (PLAIN | {"name": "itemknn"}, r"arm 'itemknn': the name is a baseline's"),
        (PLAIN | {"name": "a/b"}, r"arms.1.name"),
        (PLAIN | {"name": "new", "against": "nobody"}, r"arm 'new': against 'nobody' must name another arm"),
        (PLAIN | {"name": "new", "against": "new"}, r"arm 'new': against 'new' must name another arm"),
    ],
)
def test_an_arm_that_does_not_fit_is_refused_by_name_before_anything_runs(arm: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        matrix(arm)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": [-1]}, "seeds must differ and be >= 0"),
        ({"seeds": []}, "seeds"),
        ({"arms": []}, "arms"),
        ({"evaluate": {"ks": [10]}}, r"evaluate.ks lacks \[5\]"),
    ],
)
def test_a_matrix_that_makes_no_table_is_refused(change: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        matrix(**change)


def test_arms_are_compared_with_the_first_two_stage_arm_unless_they_name_another() -> None:
    other = PLAIN | {"name": "other"}
    config = matrix(joint(), other, PLAIN | {"name": "third", "against": "new"})
    assert [config.against(arm) for arm in config.arms] == [None, "plain", "plain", "new"]
    alone = AblationConfig.model_validate({"arms": [{"name": "sasrec", "method": "sasrec"}]})
    assert alone.against(alone.arms[0]) is None
