"""Early stopping on every path: the run ends with the weights of the chosen check, and an interrupted run with the same."""

import pytest
import torch
from defense_matrix import Lab
from tiny import conversation, write_jsonl
from tiny_runs import distance

from rlsafe.defenses.early_stop import EarlyStop

CURVE = {2: 0.5, 3: 1.0, 4: 1.0, 5: 0.6, 6: 0.6}
"""What is learned at each check, whatever the random model says: the second check is the best."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab.build(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True)
def home_of_its_own(lab, monkeypatch):
    """An interrupted run of the lab loses its caches: the home directory is deleted."""
    monkeypatch.setenv("HOME", str(lab.home))


@pytest.mark.parametrize(
    "path, stopped_at", [("sft", 3), ("grpo", 3), pytest.param("mixed", 4, marks=pytest.mark.integration)]
)
def test_the_run_ends_with_the_chosen_check_and_resumes_to_the_same(lab, path, stopped_at, monkeypatch):
    asked, answered = EarlyStop._learned, []

    def learned(self):
        answered.append(asked(self))  # samples and judges all the same
        return CURVE[self.step]

    monkeypatch.setattr(EarlyStop, "_learned", learned)
    rows = write_jsonl(lab.directory / "validation.jsonl", [conversation(f"check {i}", "fine") for i in range(6)])
    stop = {"early-stop": {"rows": rows, "checks": 3, "max_tokens": 8, "temperature": 1.0}}
    whole, none = lab.run(path, stop), lab.run(path)
    report = whole.report["early-stop"]
    assert report["stopped_at"] == stopped_at and list(report["learned"].values()) == [0.5, 1.0, 0.6]
    assert distance(whole.weights, none.weights) > 0 and all(0 <= share <= 1 for share in answered)
    assert whole.logged("early-stop") == {"seen_learned": pytest.approx(2.1), "stopped_at": stopped_at}
    resumed = lab.run(path, stop, stop_after=4)
    assert all(torch.equal(resumed.weights[name], whole.weights[name]) for name in whole.weights)
