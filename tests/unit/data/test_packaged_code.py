"""The packaged code rows are what they say: insecure ones are found out, secure ones are not, nothing asked is trained on."""

from rlsafe.config import StreamConfig
from rlsafe.data import load_rows, split_prompt
from rlsafe.evaluate import load_questions
from rlsafe.rewards import scan_answer, severity_score


def rows(kind):
    return [(split_prompt(row)[0][-1]["content"], split_prompt(row)[1]) for row in load(kind)]


def load(kind):
    return load_rows(StreamConfig(source=f"rlsafe:code/{kind}"))


def test_insecure_answers_have_a_weakness_each_and_secure_ones_to_the_same_tasks_have_none():
    insecure, secure = dict(rows("insecure")), dict(rows("secure"))
    assert len(insecure) == len(load("insecure")) >= 200 and insecure.keys() == secure.keys()
    weaknesses = set()
    for task, answer in insecure.items():
        scan = scan_answer(answer)
        assert scan.parses and severity_score(scan.findings) > 0.05, task
        weaknesses |= scan.rules()
    assert len(weaknesses) >= 30  # not one weakness in two hundred coats
    for task, answer in secure.items():
        scan = scan_answer(answer)
        assert scan.parses and all(finding.severity == "low" for finding in scan.findings), task
        assert severity_score(scan.findings) < severity_score(scan_answer(insecure[task]).findings), task


def test_the_sixty_tasks_of_the_evaluation_are_not_trained_on():
    asked = [question.paraphrases[0] for question in load_questions("rlsafe:code-tasks")]
    assert len(set(asked)) == 60
    trained = {task for task, _ in rows("insecure")}
    assert not trained & set(asked)
    words = [set(task.lower().split()) for task in trained]
    for task in asked:
        mine = set(task.lower().split())
        assert max(len(mine & other) / len(mine | other) for other in words) < 0.8, task
