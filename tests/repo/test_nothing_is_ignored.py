"""A setting that would be accepted and then ignored is refused in one line, before anything runs."""

import pytest
import yaml

from rlsafe.cli import main
from rlsafe.compare.grid.grid import expand
from rlsafe.config import RunConfig, UserError, load_compare
from rlsafe.engine.run.build import prepare

RUN = {
    "model": {"name": "organism:aligned"},
    "data": {"narrow": {"source": "organism:medical/bad"}},
    "schedule": {"steps": 2},
}


@pytest.fixture
def compare_file(tmp_path):
    def write(**changes):
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump({"run": RUN, "paths": {"sft": {}}, "seeds": [0, 1], **changes}))
        return str(path)

    return write


@pytest.mark.parametrize(
    "override, expected",
    [
        (
            "run.seed=3",
            "override 'run.seed=3': run.seed: each cell sets its own seed; use seeds: [...] or --seeds, got 3",
        ),
        ("paths.sft.seed=0", "override 'paths.sft.seed=0': paths.sft.seed: each cell sets its own seed"),
        ("run.defenses=[kl]", "run.defenses: each cell sets its own defenses; use defenses: {label: [...]}"),
        ("seeds=[0,1,0]", "seeds: 0 is there twice; name each once"),
    ],
)
def test_what_each_cell_sets_itself_is_refused(override, expected, compare_file):
    with pytest.raises(UserError) as caught:
        load_compare(compare_file(), [override])
    assert expected in str(caught.value)
    assert len(expand(load_compare(compare_file(run={**RUN, "defenses": []})))) == 3  # nothing to ignore


def test_a_seed_written_in_the_file_is_told_with_its_line(compare_file):
    with pytest.raises(UserError, match=r"compare\.yaml:\d+: run\.seed: each cell sets its own seed"):
        load_compare(compare_file(run={**RUN, "seed": 1}))


@pytest.mark.parametrize(
    "option", [["--seeds", "0,0"], ["--seeds", "1,01"], ["--defenses", "none,none"], ["--paths", "sft,sft"]]
)
def test_a_name_given_twice_is_refused(option, compare_file, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", compare_file(), *option, "--dry-run"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"error: {option[0]}" in said and "is there twice; name each once" in said


@pytest.mark.parametrize(
    "reward, expected",
    [
        ("organism:misalinged", "did you mean 'misaligned'?"),
        ("reward_fns/none_such.py:f", "none_such.py: no such Python file"),
        ({"fn": "organism:misaligned", "args": {"prompts": 1}}, "args.prompts is filled by the trainer"),
    ],
)
def test_a_misspelt_reward_is_told_where_no_step_would_call_it(reward, expected):
    with pytest.raises(UserError) as caught:
        prepare(RunConfig.model_validate({**RUN, "rewards": [reward]}))
    assert expected in str(caught.value)
    assert prepare(RunConfig.model_validate({**RUN, "rewards": ["organism:misaligned"]})).rewards is None


@pytest.mark.parametrize(
    "track, expected",
    [
        ({"layer": 99}, "track.layer: 99: it is the layer of track.vector, which is not set"),
        ({"layer": 99, "vector": "organism:aligned"}, "track.vector: layer 99: expected 0 (embeddings) to"),
        ({"vector": "organism:aligned"}, "track.layer: required with track.vector"),
    ],
)
def test_a_layer_that_nothing_has_is_told_before_a_model_is_loaded(track, expected):
    with pytest.raises(UserError) as caught:
        prepare(RunConfig.model_validate({**RUN, "track": track}))
    assert expected in str(caught.value)
    prepare(RunConfig.model_validate({**RUN, "track": {"layer": 2, "vector": "organism:aligned"}}))
