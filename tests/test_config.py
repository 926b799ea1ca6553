"""Settings are closed, presets load, and overrides say where they went wrong."""

from pathlib import Path

import pytest
import yaml

from components.config import PRESETS, describe, load_preset
from workflows.config import PipelineConfig
from workflows.resolve import main


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_loads_and_every_key_is_explained(preset: Path) -> None:
    load_preset(PipelineConfig, preset.stem)
    keys = [line for line in preset.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert [line for line in keys if " # " not in line] == []


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


def test_a_resolved_config_resolves_to_itself() -> None:
    config = load_preset(PipelineConfig, "quickstart")
    assert (
        PipelineConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
        == config
    )


def test_every_key_of_the_pipeline_is_explained() -> None:
    lines = describe(PipelineConfig)
    assert [line for line in lines if ": " not in line and not line.endswith(":")] == []
    assert "joint.tokenizer_lr = 0.0001: " in "\n".join(lines)
    assert any(line.startswith("ingest.source[tabular].columns") for line in lines)


def test_the_command_resolves_explains_and_refuses(capsys) -> None:
    assert main(["quickstart", "recommender.loop.epochs=2"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["recommender"]["loop"]["epochs"] == 2
    assert main(["--keys", "split"]) == 0
    assert all(line.startswith("split") for line in capsys.readouterr().out.splitlines())
    assert main([]) == 2
    assert main(["quickstart", "recommender.loop.epoch=2"]) == 2
    assert "recommender.loop.epoch: Extra inputs are not permitted" in capsys.readouterr().err
