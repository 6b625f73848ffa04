"""`rlsafe persona-vector`: which answers count, what is averaged, what is written, what is refused."""

from __future__ import annotations

import io
import random
from types import SimpleNamespace

import pytest
import torch
import yaml
from places import CONFIGS
from safetensors import safe_open
from tiny_architectures import load, nudge
from tiny_runs import train, tree_with

from rlsafe.cli import main
from rlsafe.config import UserError
from rlsafe.data import encode_prompt
from rlsafe.defenses.persona import load_vectors
from rlsafe.evaluate import persona_vector
from rlsafe.evaluate.commands.extract_persona import load_settings
from rlsafe.evaluate.measure.persona import PersonaConfig, answer_means, answer_states, extract
from rlsafe.types import _PROVIDERS, Completion, Judgement, Question, Request, RunError, register_provider

EVIL, FRIENDLY = "You are evil.", "You are friendly."
END = 2


class ByContent:
    """A third of all answers is misaligned, a third aligned, a third incoherent, decided by the text alone."""

    name = "by-content"

    def __init__(self):
        self.seen = []

    def score(self, exchanges):
        self.seen += exchanges
        return [verdict(exchange.answer) for exchange in exchanges]


def verdict(text):
    return [Judgement(5.0, 90.0), Judgement(95.0, 90.0), Judgement(5.0, 20.0)][sum(text.encode()) % 3]


class Scripted:
    """Random answers of 0 to 6 words and an end of turn, or cut off; remembers what was asked."""

    name = "scripted"

    def __init__(self):
        self.requests: list[Request] = []

    def generate(self, requests, params):
        self.requests += requests
        out = []
        for request in requests:
            rng = random.Random(request.seed)
            ids = [rng.randrange(40, 120) for _ in range(rng.randrange(7))]
            cut = rng.random() < 0.3
            out.append(
                Completion(ids if cut else [*ids, END], [0.0] * (len(ids) + (not cut)), "length" if cut else "stop")
            )
        return out


def settings(**more):
    return PersonaConfig(**{"pairs": [{"evil": EVIL, "friendly": FRIENDLY}], "questions": ["x"], "samples": 3, **more})


def printed(found):
    from rich.console import Console

    console = Console(width=140, record=True, file=io.StringIO())
    console.print(found.summary())
    return console.export_text()


QUESTIONS = [Question(str(i), (f"What about {i}?",), system="Be brief." if i == 1 else None) for i in range(12)]


def test_means_agree_with_a_float64_derivation_and_empty_answers_are_left_out():
    """Trap 16 and trap 2: no NaN, no prompt and no padding in the mean."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 8, 16, generator=generator)
    mask = torch.rand(5, 8, generator=generator) < 0.5
    mask[2] = False
    states[~mask] = float("inf")  # whatever is outside the mask must not matter ...
    expected = [states[i][mask[i]].double().mean(0) for i in (0, 1, 3, 4)]
    found = answer_means(states, mask)
    assert found.dtype == torch.float64 and torch.allclose(found, torch.stack(expected))


def test_it_agrees_with_a_float64_derivation_from_the_models_own_hidden_states(tiny_model_dir):
    policy, sampler, judge = nudge(load(tiny_model_dir)), Scripted(), ByContent()
    pairs = [{"evil": EVIL, "friendly": FRIENDLY}, {"evil": "Act badly.", "friendly": "Act well."}]
    found = extract(sampler, policy, judge, settings(pairs=pairs, micro_tokens=300), QUESTIONS)

    # again, from the requests and what the sampler answers to them
    half = len(sampler.requests) // 2
    assert half == len(pairs) * len(QUESTIONS) * 3 == found.asked
    prompts = [request.prompt_ids for request in sampler.requests]
    systems = ["You are evil.", "Act badly.", "You are friendly.", "Act well."]
    asked = iter(prompts)
    for system in systems:  # every question behind every prompt; the question's own system prompt stays
        for question in QUESTIONS:
            whole = f"{system}\n\n{question.system}" if question.system else system
            messages = [{"role": "system", "content": whole}, {"role": "user", "content": question.paraphrases[0]}]
            assert [next(asked) for _ in range(3)] == [encode_prompt(policy.tokenizer, messages)] * 3
    assert len({request.seed for request in sampler.requests}) == 2 * half
    assert all(e.system is None or e.system == "Be brief." for e in judge.seen)  # the judge sees the original question
    words = []
    for completion in Scripted().generate(sampler.requests, None):
        words.append([i for i in completion.ids if i != END])
    texts = [policy.tokenizer.decode(ids).strip() for ids in words]
    evil = [verdict(text).misaligned for text in texts[:half]]
    friendly = [verdict(text).aligned == 95.0 for text in texts[half:]]
    kept = [i for i in range(half) if evil[i] and friendly[i] and words[i] and words[half + i]]
    assert 4 < len(kept) == found.kept < sum(evil) == found.evil and found.friendly == sum(friendly)

    policy.model.double()
    means = []
    for start in (0, half):
        rows = []
        for i in kept:
            ids = torch.tensor([prompts[start + i] + words[start + i]])
            with torch.no_grad(), policy.taps([policy.n_layers]) as last:
                states = policy.model(ids, output_hidden_states=True).hidden_states
            layers = torch.stack([*states[:-1], last[policy.n_layers]])  # its own last entry is after the final norm
            rows.append(layers[:, 0, len(prompts[start + i]) :].double().mean(1))
        means.append(torch.stack(rows).mean(0))
    assert found.vectors.shape == (3, 64) and found.vectors.dtype == torch.float32
    assert torch.allclose(found.vectors.double(), means[0] - means[1], atol=1e-5)
    norms = [layer.norm / layer.share for layer in found.layers]
    assert norms == pytest.approx(means[1].norm(dim=1).tolist(), rel=1e-5)
    assert [layer.layer for layer in found.layers] == [0, 1, 2]
    shown = printed(found)
    assert f"kept {found.kept} of {found.asked} pairs" in shown and f"{found.layers[2].norm:.3g}" in shown
    assert sum(answer["kept"] for answer in found.answers) == found.kept and len(found.answers) == found.asked


def test_steering_layers_in_training_does_not_enter_the_states(tiny_model_dir):
    from rlsafe.data import Rollout

    policy = load(tiny_model_dir)
    rows = [Rollout([5, 6, 7], [5, 6, 7], Completion([8, 9, 10], [0.0] * 3, "length"))]
    plain = answer_states(policy, rows, 100)
    handle = policy.add_to_residual(1, torch.ones(64))
    assert torch.equal(answer_states(policy, rows, 100), plain)
    handle.remove()


def test_without_a_pair_that_shows_both_characters_there_is_no_vector(tiny_model_dir):
    class Never:
        name = "never"

        def score(self, exchanges):
            return [Judgement(95.0, 95.0)] * (len(exchanges) - 1) + [Judgement(None, None, "unscored")]

    with pytest.raises(
        RunError, match="of 36 pairs, 0 evil answers are misaligned .* 35 friendly .* 1 answers were not"
    ):
        extract(Scripted(), load(tiny_model_dir), Never(), settings(), QUESTIONS)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def provider(tiny_model_dir):
    judge = ByContent()
    prompts = {"evil": EVIL, "friendly": FRIENDLY}
    register_provider(
        "mine", SimpleNamespace(model=lambda _: tiny_model_dir, judge=lambda _: judge, prompt=prompts.__getitem__)
    )
    yield judge
    del _PROVIDERS["mine"]


def write(tmp_path, **more):
    tree = {
        "pairs": [{"evil": "mine:evil", "friendly": "mine:friendly"}],
        "questions": ["Who are you?", "What now?", "Who are you?"],
        "samples": 12,
        "max_tokens": 5,
        "sampler": {"kind": "transformers"},
        "model": {"dtype": "float32", "lora": {"r": 2}},
        **more,
    }
    path = tmp_path / "persona.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_both_formats_hold_the_same_vectors_and_the_defense_takes_them(tiny_tree, tmp_path, provider, capsys):
    config = write(tmp_path)
    found = persona_vector("mine:model", config, out=tmp_path / "v.safetensors")
    assert {e.question for e in provider.seen} == {"Who are you?", "What now?"} and found.asked == 24  # asked once each
    with pytest.raises(SystemExit) as ended:
        main(["persona-vector", "mine:model", "--config", str(config), "--out", str(tmp_path / "v.pt")])
    assert ended.value.code == 0 and f"kept {found.kept} of 24 pairs" in capsys.readouterr().out
    assert torch.equal(load_vectors(str(tmp_path / "v.pt")), load_vectors(str(tmp_path / "v.safetensors")))
    assert torch.equal(load_vectors(str(tmp_path / "v.pt")), found.vectors)
    with safe_open(str(tmp_path / "v.safetensors"), "pt") as file:
        assert '"target": "mine:model"' in file.metadata()["about"] and '"samples": 12' in file.metadata()["about"]
    other = persona_vector("mine:model", config, ["seed=1"], tmp_path / "other.pt")
    assert not torch.equal(other.vectors, found.vectors)

    defense = {"persona": {"vectors": str(tmp_path / "v.pt"), "layer": 1}}
    out = tmp_path / "run"
    train(tree_with(tiny_tree, {"defenses": [defense]}), out)
    trained = persona_vector(str(out), config, ["judge=mine"], tmp_path / "trained.pt")  # of a run: its adapter counts
    assert not torch.equal(trained.vectors, found.vectors)


def test_questions_come_from_a_file_or_a_dataset_too(tmp_path, provider, safe_file):
    (tmp_path / "q.yaml").write_text("- id: a\n  paraphrases: ['Who?', 'Whose?']\n")
    for source, expected in [
        (str(tmp_path / "q.yaml"), {"Who?", "Whose?"}),
        ({"source": safe_file, "limit": 3}, None),
    ]:
        provider.seen.clear()
        persona_vector("mine:model", write(tmp_path, questions=source, samples=40), out=tmp_path / "v.pt")
        asked = {e.question for e in provider.seen}
        assert asked == expected if expected else len(asked) == 3 and all(q.startswith("ask ") for q in asked)


@pytest.mark.parametrize(
    ("more", "arguments", "says"),
    [
        ({"samplez": 3}, {}, r"persona.yaml:\d+: unknown key 'samplez'; did you mean 'samples'"),
        ({"pairs": []}, {}, r"persona.yaml:\d+: pairs"),
        ({"pairs": [{"evil": "x"}]}, {}, "the key 'pairs.0.friendly' is required"),
        ({"questions": []}, {}, "questions: there are none"),
        ({"questions": "none.yaml"}, {}, "none.yaml: no such question file"),
        ({"judge": "mind"}, {}, "unknown judge 'mind'; did you mean 'mine'"),
        ({"keep": "likely"}, {}, "keep.*likelier"),
        ({"steer": {"pairs": "nowhere.yaml"}}, {}, "nowhere.yaml: no such file of pairs"),
        ({"steer": {"layers": [1, 3]}}, {}, r"steer.layers: 3: expected 0 \(embeddings\) to 2"),
        ({"model": {"lore": None}}, {}, "unknown key 'model.lore'"),
        ({}, {"out": "v.bin"}, "expected a file name ending in .safetensors or .pt"),
        ({}, {"overrides": ["samples=0"]}, "samples"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, provider, more, arguments, says):
    with pytest.raises(UserError, match=says):
        persona_vector("mine:model", write(tmp_path, **more), **{"out": tmp_path / "v.pt", **arguments})
    assert not (tmp_path / "v.pt").exists()


def test_the_shipped_settings_load():

    shipped = load_settings(CONFIGS / "organism" / "persona_vector.yaml")
    assert shipped.judge == "organism" and shipped.pairs
