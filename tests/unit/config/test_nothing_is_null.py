"""`defenses:` with every line below it commented out is a null in YAML: it means none of them, as an empty list does."""

from __future__ import annotations

import pytest
import yaml

from rlsafe.config import UserError, load_run


@pytest.fixture
def load(tiny_tree, tmp_path):
    def loaded(*overrides: str, **sections):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(tiny_tree | sections, sort_keys=False))
        return load_run(file, overrides)

    return loaded


@pytest.mark.parametrize(
    ("override", "read", "empty"),
    [
        ("defenses=null", lambda config: config.defenses, []),
        ("plugins=null", lambda config: config.plugins, []),
        ("evaluate.scale=null", lambda config: config.evaluate.scale, []),
        ("evaluate.cues=null", lambda config: config.evaluate.cues, {}),
        ("evaluate.judges=null", lambda config: config.evaluate.judges, {}),
        ("track.to=null", lambda config: config.track.to, []),
        ("track.to=none", lambda config: config.track.to, []),
    ],
)
def test_a_list_or_mapping_that_is_null_is_empty(load, override, read, empty):
    assert read(load(override)) == empty


def test_a_bare_heading_in_the_file_is_an_empty_list(load):
    assert load(defenses=None).defenses == []


@pytest.mark.parametrize("override", ["schedule.phases=null", "data=null", "model.name=null"])
def test_what_cannot_be_nothing_stays_an_error(load, override):
    with pytest.raises(UserError, match=override.partition("=")[0]):
        load(override)
