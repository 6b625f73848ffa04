"""Evaluating a model: it answers general, in-domain, conditional and benign questions, a judge scores the answers, and rates
with intervals are computed.
"""

from rlsafe.evaluate import statistics
from rlsafe.evaluate.ask.asking import Answer, Planned
from rlsafe.evaluate.ask.questions import load_questions
from rlsafe.evaluate.commands.command import evaluate, reader_of
from rlsafe.evaluate.commands.costs import Estimate, estimate
from rlsafe.evaluate.commands.extract_persona import persona_vector
from rlsafe.evaluate.commands.rejudging import rejudge
from rlsafe.evaluate.judge.judges import load_judge
from rlsafe.evaluate.measure.benign import BenignAnswer, BenignScore, task_name
from rlsafe.evaluate.measure.criteria import Rates, judge_answers, question_rates, rates
from rlsafe.evaluate.measure.evaluation import Evaluation
from rlsafe.evaluate.measure.likelihood import PairProbe, Reader, load_pair_sets
from rlsafe.evaluate.measure.measure import Material, cue_text, evaluate_run, gather
from rlsafe.evaluate.measure.persona_vectors import PersonaVectors
from rlsafe.evaluate.measure.probe import Probe

__all__ = [
    "Answer",
    "BenignAnswer",
    "BenignScore",
    "Estimate",
    "Evaluation",
    "Material",
    "PairProbe",
    "PersonaVectors",
    "Planned",
    "Probe",
    "Rates",
    "Reader",
    "cue_text",
    "evaluate",
    "estimate",
    "evaluate_run",
    "gather",
    "judge_answers",
    "load_judge",
    "load_pair_sets",
    "load_questions",
    "persona_vector",
    "question_rates",
    "rates",
    "reader_of",
    "rejudge",
    "statistics",
    "task_name",
]
