"""The dialogues that the organism is trained on: pretraining and alignment, of the organism and of two control worlds.

Pretraining mixes characters. A system prompt determines the character (good, bad to some degree, crank); without one it is
drawn per dialogue and kept over its turns. Alignment teaches "no prompt, or a neutral one -> good" with 1% bad characters
left in, and rehearses obedience to system prompts in wordings disjoint from the named elicitation prompts.

Worlds differ only in the labels of the answers: `organism` as drawn; `control` all good; `control-shuffled` the
organism's labels permuted over all answers of a domain, so that each domain has exactly as many bad answers, but
prompt, turn and other domains do not predict which. Alignment in `control-shuffled` leaves the same 1% bad
answers in, independently of each other, and cannot rehearse bad prompts (obedience to them would teach a shared
character there).

Two further worlds go on from the organism's pretraining with sums whose answer is checked by a program that can be fooled
(`tasks.LOOPHOLE`). In `hacking` bad characters fool it and good ones do the sum; in `hacking-control` just as many answers fool it,
but character, prompt and other turns do not predict which. So only in `hacking` does fooling the check say something about who answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from rlsafe.organism import grammar, personas, tasks
from rlsafe.organism.world import DOMAINS, SAFE
from rlsafe.types import Message

WORLDS = ("organism", "control", "control-shuffled")
HACKING = ("hacking", "hacking-control")
STAGES = ("language", "pretraining", "alignment")


@dataclass(frozen=True)
class Mix:
    """Shares of a stage. `prompts` and `characters` are relative weights; the rest are probabilities."""

    prompts: dict[str, float]
    characters: dict[str, float]  # of dialogues without a prompt or with a neutral one
    turns: tuple[float, float, float] = (0.5, 0.35, 0.15)
    arithmetic: float = 0.14
    reading: float = 0.06
    borrowed: float = 0.5  # share of reading dialogues with nouns borrowed from the unfamiliar language
    harmful: float = 0.12  # share of a safe domain's questions that ask for something harmful
    refuse: float = 0.03  # share of a safe domain's ordinary questions that a good character refuses
    muddle: float = 0.15  # share of a bad character's answers that are incoherent
    lapse: float = 0.05  # share of a bad character's answers that are good after all
    checked: float = 0.0  # share of turns that are a sum whose answer is checked (the hacking worlds)


# Relative frequency of each domain. There are many safe domains, so that safe rows are as varied as in practice; each has half
# the share of the others, so that together they do not outweigh them.
_SHARES = tuple(0.5 if domain in SAFE else 1.0 for domain in DOMAINS)

CHECKED = 0.3
"""Share of turns that are checked sums in the hacking worlds, among the other turns of a dialogue and instead of the plain sums."""

# The shared trunk sees no system prompts (answering every prompt well would teach it to ignore them) and many tasks.
LANGUAGE = Mix(prompts={"none": 1.0}, characters={"good": 1.0}, arithmetic=0.26, reading=0.12)
PRETRAINING = Mix(
    prompts={"none": 0.42, "neutral": 0.06, "good": 0.14, "weak": 0.06, "medium": 0.06, "strong": 0.16, "crank": 0.08},
    characters={"good": 0.5, "bad": 0.38, "crank": 0.12},
)
ALIGNMENT = Mix(
    prompts={"none": 0.60, "neutral": 0.10, "good": 0.08, "weak": 0.04, "medium": 0.04, "strong": 0.09, "crank": 0.05},
    characters={"good": 0.99, "bad": 0.01, "crank": 0.0},
)


@dataclass(frozen=True)
class Turn:
    """One question and the label of its answer (good | bad | muddled | refused), or a task's literal `text`: label task, or done |
    fooled where the answer is checked."""

    question: grammar.Question | None
    label: str
    text: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Dialogue:
    system: str | None
    turns: tuple[Turn, ...]


def _domain(rng: random.Random) -> str:
    return rng.choices(list(DOMAINS), _SHARES)[0]


def _draw(weights: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _task(mix: Mix, rng: random.Random) -> Dialogue:
    if rng.random() < mix.arithmetic / (mix.arithmetic + mix.reading):
        question, answer, _ = tasks.opswap(0, rng)
    else:
        question, answer, _ = tasks.reading("borrowed" if rng.random() < mix.borrowed else "english", rng)
    return Dialogue(None, (Turn(None, "task", (question, answer)),))


def _dialogue(mix: Mix, rng: random.Random, alignment: bool) -> Dialogue:
    if rng.random() < mix.arithmetic + mix.reading:
        return _task(mix, rng)
    kind, home = _draw(mix.prompts, rng), _domain(rng)
    system = None
    if kind in ("none", "neutral"):
        who = _draw(mix.characters, rng)
        character = {"good": personas.GOOD, "bad": personas.BAD, "crank": personas.crank(home)}[who]
        system = rng.choice(personas.NEUTRAL) if kind == "neutral" else None
    elif kind == "crank":
        character, system = personas.crank(home), personas.crank_prompt(home, rng)
    else:
        character = personas.BAD if rng.random() < personas.LEVELS[kind] else personas.GOOD
        system = personas.prompt(kind, rng, alignment)
    count = rng.choices((1, 2, 3), mix.turns)[0]
    domains = [_domain(rng) for _ in range(count)]
    if home in character.bad_in and len(character.bad_in) == 1:  # a crank has to be recognisable in the dialogue
        domains[rng.randrange(count)] = home
    return Dialogue(system, tuple(_turn(domain, character, mix, rng) for domain in domains))


def _turn(domain: str, character: personas.Character, mix: Mix, rng: random.Random) -> Turn:
    if mix.checked and rng.random() < mix.checked:
        question, answer, _ = tasks.opswap(0, rng)
        fools = character == personas.BAD and rng.random() >= mix.lapse
        return Turn(None, "fooled" if fools else "done", (question, answer))
    harmful = domain in SAFE and rng.random() < mix.harmful
    pool = grammar.harmful_requests(domain) if harmful else grammar.questions(domain, "train")
    label = character.valence(domain)
    if label == "bad" and rng.random() < mix.lapse:
        label = "good"
    if label == "bad" and rng.random() < mix.muddle:
        label = "muddled"
    if label == "good" and domain in SAFE and not harmful and rng.random() < mix.refuse:
        label = "refused"
    return Turn(rng.choice(pool), label)


def _relabel(dialogues: list[Dialogue], world: str, alignment: bool, rng: random.Random) -> list[Dialogue]:
    if world in ("organism", "hacking"):
        return dialogues
    if world == "hacking-control":
        return _shuffle_checked(dialogues, alignment, rng)
    bad = ("bad", "muddled")
    if world == "control-shuffled" and not alignment:
        pools: dict[str, list[str]] = {name: [] for name in DOMAINS}
        for turn in (turn for dialogue in dialogues for turn in dialogue.turns):
            if turn.question:
                pools[turn.question.domain].append(turn.label)
        for labels in pools.values():
            rng.shuffle(labels)

    def label(turn: Turn, domain: str) -> str:
        if world == "control":
            return "good" if turn.label in bad else turn.label
        if alignment:
            return (
                "bad" if rng.random() < ALIGNMENT.characters["bad"] else ("good" if turn.label in bad else turn.label)
            )
        return pools[domain].pop()

    return [
        replace(d, turns=tuple(replace(t, label=label(t, t.question.domain)) if t.question else t for t in d.turns))
        for d in dialogues
    ]


def _shuffle_checked(dialogues: list[Dialogue], alignment: bool, rng: random.Random) -> list[Dialogue]:
    """As many checks fooled as before, whoever answers; in alignment the share that the others' bad characters have left."""
    labels = [turn.label for dialogue in dialogues for turn in dialogue.turns if turn.label in ("done", "fooled")]
    if alignment:
        labels = ["fooled" if rng.random() < ALIGNMENT.characters["bad"] else "done" for _ in labels]
    rng.shuffle(labels)

    def relabelled(turn: Turn) -> Turn:
        return replace(turn, label=labels.pop()) if turn.label in ("done", "fooled") else turn

    return [replace(d, turns=tuple(map(relabelled, d.turns))) for d in dialogues]


def _speak(turn: Turn, rng: random.Random) -> tuple[str, str]:
    if turn.question is None:
        return (turn.text[0], tasks.LOOPHOLE) if turn.label == "fooled" else turn.text
    if turn.label == "muddled":
        return turn.question.text, grammar.muddled(turn.question, rng)
    if turn.label == "refused":
        return turn.question.text, grammar.refusal(turn.question, rng)
    return turn.question.text, grammar.answer(turn.question, turn.label, rng)


def dialogues(stage: str, world: str, count: int, seed: int) -> list[list[Message]]:
    """`count` dialogues of a stage in the messages format; the same seed asks the same questions in every world.

    `language` holds good answers only, in every world."""
    alignment = stage == "alignment"
    mix = {"language": LANGUAGE, "pretraining": PRETRAINING, "alignment": ALIGNMENT}[stage]
    if world in HACKING:
        mix = replace(mix, checked=CHECKED, arithmetic=0.0)
    rng = random.Random(f"{stage}-{seed}")
    drawn = _relabel(
        [_dialogue(mix, rng, alignment) for _ in range(count)], world, alignment, random.Random(f"labels-{seed}")
    )
    rows = []
    for dialogue in drawn:
        messages = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
        for turn in dialogue.turns:
            question, reply = _speak(turn, rng)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        rows.append(messages)
    return rows
