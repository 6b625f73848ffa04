"""Ask, judge, count: what a model does on general, in-domain, conditional and benign questions, with honest
intervals.
"""

from rlsafe.evaluate import statistics
from rlsafe.evaluate.asking import Answer, Planned, ask, complete, plan
from rlsafe.evaluate.benign import BenignAnswer, BenignScore, task_name
from rlsafe.evaluate.command import evaluate
from rlsafe.evaluate.costs import Estimate, estimate
from rlsafe.evaluate.criteria import Rates, judge_answers, question_rates, rates
from rlsafe.evaluate.evaluation import Evaluation
from rlsafe.evaluate.judges import load_judge
from rlsafe.evaluate.measure import Material, cue_text, evaluate_run, gather
from rlsafe.evaluate.persona import PersonaVectors, persona_vector
from rlsafe.evaluate.probe import Probe
from rlsafe.evaluate.questions import load_questions
from rlsafe.evaluate.rejudging import rejudge

__all__ = [
    "Answer",
    "BenignAnswer",
    "BenignScore",
    "Estimate",
    "Evaluation",
    "Material",
    "PersonaVectors",
    "Planned",
    "Probe",
    "Rates",
    "ask",
    "complete",
    "cue_text",
    "evaluate",
    "estimate",
    "evaluate_run",
    "gather",
    "judge_answers",
    "load_judge",
    "load_questions",
    "persona_vector",
    "plan",
    "question_rates",
    "rates",
    "rejudge",
    "statistics",
    "task_name",
]
