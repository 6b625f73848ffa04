"""The defenses of one run as one: prompt hooks are applied in order, penalties added, activation contexts nested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from rlsafe.config import UserError, nearest
from rlsafe.defenses.base import DataContext, Defense, Dose, Gradients, Offer, Rollouts
from rlsafe.defenses.declared import DeclaredView
from rlsafe.defenses.vectors import Named, add_with_norm, norm
from rlsafe.types import Batch, LossPath, Message, Need, RunError, Sampler, View, Where

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.policy import Policy

PARTS = ("narrow", "benign", "safe", "penalty", "own")  # what `apart` may name
NAMED = ("base", "start", "grpo_start")  # references beside step:N and path:DIR


class DefenseStack:
    """The defenses with a strength above zero, in the config's order. Those of strength zero are left out.

    defenses: all of them. acting: those that act in the present step (`begin`). waiting: names of those without their reference yet.
    """

    def __init__(self, defenses: Sequence[Defense]):
        self.defenses = [defense for defense in defenses if defense.strength != 0]
        self.waiting: set[str] = set()
        self.off: set[str] = set()  # names of those that do not act in the present step, see `begin`
        self.prompts_changed: Counter[str] = Counter()
        names = [defense.name for defense in self.defenses]
        if duplicates := {name for name in names if names.count(name) > 1}:
            raise UserError(
                f"defenses: the name {sorted(duplicates)[0]!r} is used twice; give the classes different names"
            )
        _check_claims(self.defenses)
        _check_apart(self.defenses)
        _check_edits(self.defenses)
        _check_steering(self.defenses)

    def __iter__(self) -> Iterator[Defense]:
        return iter(self.defenses)

    def __len__(self) -> int:
        return len(self.defenses)

    def begin(self, step: int, phase: int) -> None:
        """Switch off, until the next call, the defenses that do not act in this step of this phase of the schedule."""
        self.off = self._off_at(step, phase)

    def _off_at(self, step: int, phase: int) -> set[str]:
        return {defense.name for defense in self.defenses if (step, phase) not in defense.when}

    def other_rollouts(self, before: tuple[int, int]) -> bool:
        """Whether a defense that has a say in rollouts, or in what their gradient sees, acts in only one of the present step and the
        step (index, phase) `before`: rollouts of that one are then none of this one's."""
        turned = self._off_at(*before) ^ self.off
        hooks = ("prompt", "activations", "patch_sampler", "advantages")
        return any(
            getattr(type(defense), hook) is not getattr(Defense, hook)
            for defense in self.defenses
            for hook in hooks
            if defense.name in turned
        )

    @property
    def acting(self) -> list[Defense]:
        """The defenses that act in the present step."""
        return [defense for defense in self.defenses if defense.name not in self.off] if self.off else self.defenses

    def offers(self) -> dict[str, Offer]:
        """The rows that defenses offer, for the schedule."""
        found = {defense: defense.offer() for defense in self.defenses}
        return {d.name: replace(offer, when=d.when) for d, offer in found.items() if offer is not None}

    @cached_property
    def doses(self) -> dict[str, Dose]:
        """What the safe rows of each defense weigh (`Offer.dose`)."""
        return {name: offer.dose for name, offer in self.offers().items() if not offer.aside}

    def _on(self, where: Where) -> list[Defense]:
        """The defenses whose prompt and activation hooks act on the rows of this stream."""
        return [defense for defense in self.acting if where.stream in defense.streams]

    @property
    def penalized(self) -> list[Defense]:
        """Defenses with a penalty whose references exist by now."""
        return [d for d in self.acting if type(d).penalty is not Defense.penalty and d.name not in self.waiting]

    @property
    def needs(self) -> set[Need]:
        """What the current `penalized` defenses need from the forward passes."""
        return {need for defense in self.penalized for need in defense.needs}

    def references(self) -> set[str]:
        """All references that some defense needs at some step."""
        return {need.reference for defense in self.defenses for need in defense.needs if need.reference}

    def check_references(self, steps: Sequence[tuple[int, LossPath]], from_adapter: bool = False) -> None:
        """UserError for a reference that does not exist in any step in which the defense acts: its penalty would never start.

        steps: (phase, path) of all of the run. from_adapter: the run goes on from an adapter, such as a comparison's shared warm-up;
        without GRPO steps that is grpo_start.
        """
        grpo = [index for index, (_, path) in enumerate(steps) if path == "grpo"]
        first = grpo[0] if grpo else 0 if from_adapter else None
        for defense in self.defenses:
            last = max((index for index, (phase, _) in enumerate(steps) if (index, phase) in defense.when), default=-1)
            for reference in sorted({need.reference for need in defense.needs if need.reference}):
                if problem := _never(
                    reference, first, last, "of this run" if last == len(steps) - 1 else "in which it acts"
                ):
                    raise UserError(f"defense {defense.name!r}: {problem}")

    def await_references(self, has_reference: Callable[[str], bool]) -> None:
        """Leave out, for now, penalties whose reference does not exist yet (grpo_start before the first GRPO step, step:N before N)."""
        self.waiting = {
            defense.name
            for defense in self.defenses
            if any(need.reference and not has_reference(need.reference) for need in defense.needs)
        }

    def prompt(self, messages: list[Message], where: Where) -> list[Message]:
        """The conversation after every defense's prompt hook. Counts the conversations that each one changed."""
        for defense in self._on(where):
            with _blaming(defense, "prompt"):
                before, messages = messages, defense.prompt(messages, where)
            self.prompts_changed[defense.name] += messages != before
        return messages

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Prompts that pass inside are not counted in `prompts_changed`."""
        counted = self.prompts_changed.copy()
        yield
        self.prompts_changed = counted

    def steers(self, where: Where) -> bool:
        """Whether some defense's activation hooks act at `where`."""
        return any(defense.steers(where) for defense in self._on(where))

    def steers_differently(self, one: Where, other: Where) -> bool:
        """Whether some defense's activation hooks act at one of the two places only."""
        return any(
            (one.stream in defense.streams and defense.steers(one))
            != (other.stream in defense.streams and defense.steers(other))
            for defense in self.acting
        )

    @contextmanager
    def activations(self, policy: Policy, where: Where) -> Iterator[None]:
        """All activation hooks at `where`; hold it through forward and backward."""
        with ExitStack() as stack:
            for defense in self._on(where):
                stack.enter_context(defense.activations(policy, where))
            yield

    @contextmanager
    def patched(self, sampler: Sampler, where: Where) -> Iterator[None]:
        """All sampler patches during rollout generation."""
        with ExitStack() as stack:
            for defense in self._on(where):
                context: AbstractContextManager[Any] = defense.patch_sampler(sampler, where)
                stack.enter_context(context)
            yield

    def counts(self, batch: Batch) -> dict[str, float]:
        """Per defense, how many tokens or rows of this batch its penalty averages over."""
        return {defense.name: float(defense.penalty_mask(batch).sum()) for defense in self._penalizing(batch)}

    def _penalizing(self, batch: Batch) -> list[Defense]:
        """Those whose penalty sees this batch: rows set aside are their owner's alone."""
        return [defense for defense in self.penalized if batch.owner in (None, defense.name)]

    def penalties(self, view: View) -> Iterator[tuple[Defense, str, Tensor]]:
        """(defense, term name, scalar sum of values over the mask) of one micro-batch, without the defense's weight."""
        for defense in self._penalizing(view.batch):
            with _blaming(defense, "penalty"):
                terms = list(defense.penalty(DeclaredView(view, defense.needs)).items())
            for term, (values, mask) in terms:
                _check_mask(defense, term, values, mask, view.batch)
                yield defense, term, (values * mask).sum()

    @property
    def screening(self) -> list[Defense]:
        """Defenses that look at rewarded rollouts (the hook `advantages`)."""
        return [d for d in self.acting if type(d).advantages is not Defense.advantages]

    def screen(self, defense: Defense, policy: Policy, rollouts: Rollouts, context: DataContext) -> None:
        """One defense's rollout hook, `advantages`: it may change `rollouts.rewards`."""
        if rollouts.stream in defense.streams:
            with _blaming(defense, "advantages"):
                defense.advantages(policy, rollouts, context)

    @property
    def reshaping(self) -> list[Defense]:
        """Defenses that have a say in the gradient of a step."""
        return [d for d in self.acting if type(d).gradients is not Defense.gradients or d.target_share is not None]

    @property
    def own(self) -> set[str]:
        """Defenses whose penalty is no part of the loss: its gradient is shown to them, or scaled to a share of the step's."""
        return {d.name for d in self.reshaping if "own" in d.apart or d.target_share is not None}

    def gradients(self, policy: Policy, step: Named, parts: Mapping[str, Named]) -> dict[str, float]:
        """Change `step`: add each penalty that has a `target_share`, then every gradient hook, in order, on what those before it
        made of it. parts["own/NAME"] is the defense NAME's own. Gives metrics."""
        metrics: dict[str, float] = {}
        for defense in [d for d in self.reshaping if d.target_share is not None]:
            own, rest = parts.get(f"own/{defense.name}"), norm(step)
            wanted = defense.own_norm(rest, own is not None)
            scale = add_with_norm(step, own, wanted) if own else 0.0
            metrics[f"defense/{defense.name}/weight"] = scale
            if defense.name in self.doses and scale:
                metrics[f"defense/{defense.name}/grad_share"] = wanted / (wanted + rest)
        for defense in self.reshaping:
            seen = {name: parts[name] for name in defense.apart & parts.keys()}
            if f"own/{defense.name}" in parts and "own" in defense.apart:
                seen["own"] = parts[f"own/{defense.name}"]
            with _blaming(defense, "gradients"):
                defense.gradients(policy, Gradients(step, seen))
        return metrics

    def after_step(self, policy: Policy, moment: Literal["step", "end"]) -> bool:
        """Run the hooks `weights`, in order; True when any changed the model's weights. What goes back to earlier weights sees a step's
        after the others' edits, and comes before these at the end, or it would undo them."""
        order = sorted(self.acting, key=lambda defense: defense.chooses == (moment == "step"))
        return any([defense.weights(policy, moment) for defense in order])

    def state_dict(self) -> dict[str, Any]:
        return {defense.name: defense.state_dict() for defense in self.defenses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for defense in self.defenses:
            defense.load_state_dict(state.get(defense.name, {}))


def _never(reference: str, first_grpo: int | None, last: int, which_last: str) -> str | None:
    """Why there is no such reference up to the step `last`; None when there is. first_grpo: the step that has grpo_start."""
    kind, _, which = reference.partition(":")
    if kind not in ("step", "path") and reference not in NAMED:
        return f"unknown reference {reference!r}{nearest(reference, [*NAMED, 'step:N', 'path:DIR'])}"
    if reference == "grpo_start" and first_grpo is None:
        return "reference grpo_start: the schedule has no GRPO steps; expected base, start or step:N"
    if reference == "grpo_start" and first_grpo is not None and first_grpo > last:
        return (
            f"reference grpo_start: the first GRPO step is {first_grpo}, after {last}, the last step {which_last}; expected base or "
            "start, or other phases"
        )
    if kind == "step" and which not in map(str, range(last + 1)):
        return f"reference {reference}: expected step:N with N from 0 to {last}, the last step {which_last}"
    return None


@contextmanager
def _blaming(defense: Defense, hook: str) -> Iterator[None]:
    """Add the defense's name to an error raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"defense {defense.name!r}: {error}") from None
    except Exception as error:
        error.add_note(f"in {hook} of defense {defense.name!r}")
        raise


def _check_claims(defenses: Sequence[Defense]) -> None:
    owners: dict[str, str] = {}
    for defense in defenses:
        for claim in sorted(defense.claims):
            if claim in owners:
                raise UserError(
                    f"defenses {owners[claim]!r} and {defense.name!r} both want {claim}: one would undo or distort what "
                    "the other does; remove one"
                )
            owners[claim] = defense.name


def _check_apart(defenses: Sequence[Defense]) -> None:
    for defense in defenses:
        for part in sorted(defense.apart):
            if part not in PARTS:
                raise UserError(
                    f"defense {defense.name!r}: apart names the unknown part {part!r}{nearest(part, PARTS)}"
                )


def _check_edits(defenses: Sequence[Defense]) -> None:
    """UserError when a defense replaces a place to which an earlier one added: the addition would be lost."""
    editors: dict[str, str] = {}
    for defense in defenses:
        for place, how in defense.edits.items():
            if how == "replaces" and place in editors:
                raise UserError(
                    f"defense {defense.name!r} replaces {place} and would discard what {editors[place]!r} puts there; "
                    f"list {defense.name!r} first, or let only one of them replace"
                )
            editors[place] = defense.name


def _check_steering(defenses: Sequence[Defense]) -> None:
    for defense in defenses:
        cls = type(defense)
        acts = [hook for hook in ("activations", "patch_sampler") if getattr(cls, hook) is not getattr(Defense, hook)]
        if acts and cls.steers is Defense.steers:
            raise UserError(
                f"defense {defense.name!r}: {acts[0]} without steers(where); define steers to say where it acts, so that "
                "rollouts and training are compared in the right context"
            )


def _check_mask(defense: Defense, term: str, values: Tensor, mask: Tensor, batch: Batch) -> None:
    expected = defense.penalty_mask(batch)
    if values.shape != mask.shape:
        raise RunError(
            f"defense {defense.name!r}: penalty {term!r} has values of shape {tuple(values.shape)} and a mask of {tuple(mask.shape)}"
        )
    if mask.shape != expected.shape or not bool((mask.bool() == expected.bool()).all()):
        raise RunError(
            f"defense {defense.name!r}: the mask of penalty {term!r} differs from penalty_mask(batch), which is counted over the whole "
            "step before the forward; return view.batch's penalty_mask or override penalty_mask"
        )
