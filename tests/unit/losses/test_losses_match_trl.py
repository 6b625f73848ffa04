"""The GRPO loss, from rewards to gradient, against TRL's own GRPOTrainer on the same batch.

TRL's real code runs: `_generate_and_score_completions` (advantages, sampler correction, truncation mask) and
`_compute_loss`. Only what comes from outside is replaced: the completions, their rewards, and (float64 cases) the
log-probabilities.
"""

import pytest
import torch

from rlsafe.losses import (
    advantages,
    grpo_count,
    grpo_values,
    grpo_weights,
    head,
    importance_ratio,
    k3,
    truncated_correction,
)
from rlsafe.policy.policy import predicting, scatter

trl = pytest.importorskip("trl")

EOS, PAD, VOCABULARY, TEMPERATURE = 1, 0, 29, 0.8
LOW, HIGH, CAP, MAX_TOKENS = 0.1, 0.15, 1.3, 12
PROMPTS = [[5, 6], [5, 6], [5, 6], [7, 8, 9, 10], [7, 8, 9, 10], [7, 8, 9, 10]]
COMPLETIONS = [
    [11, 12, EOS],
    [13, 14, 15, 16, 17, EOS],
    [18, EOS],
    [19, 20, 21, 22],
    [EOS],
    [23, 24, 25, 26, 27, 28, 3, EOS],
]
REWARDS = [[0.0, 1.0, 0.25], [0.5, 0.5, 2.0]]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2")),
        pad_token="w0", eos_token="w1", unk_token="w2",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=PAD, eos_token_id=EOS, initializer_range=0.3,
        )
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    config = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), beta=0.1, temperature=TEMPERATURE, num_generations=3,
        per_device_train_batch_size=6, max_completion_length=MAX_TOKENS, bf16=False, use_cpu=True, report_to=[],
        gradient_checkpointing=False, epsilon=LOW, epsilon_high=HIGH, vllm_importance_sampling_clip_max=CAP,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    made = trl.GRPOTrainer(
        model=str(path),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "w5 w6"}] * 6),
        processing_class=tokenizer,
    )
    made.current_gradient_accumulation_steps = 1
    made.num_iterations = 2  # so that TRL computes old log-probabilities and the ratio is not 1
    made.model.train()
    return made


def set_up(
    trainer,
    monkeypatch,
    normalization,
    level,
    correction,
    beta,
    bias_correction,
    sampler,
    rewards=REWARDS,
    scale="group",
):
    settings = {
        "loss_type": normalization, "importance_sampling_level": level, "beta": beta, "scale_rewards": scale,
        "use_vllm": correction != "none", "vllm_importance_sampling_correction": correction != "none",
        "vllm_importance_sampling_mode": f"{correction}_truncate", "mask_truncated_completions": False,
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(trainer, name, value)
    monkeypatch.setattr(trainer.args, "use_bias_correction_kl", bias_correction)
    reported = [row[: len(ids)].tolist() for row, ids in zip(sampler, COMPLETIONS, strict=True)]
    generated = (PROMPTS, COMPLETIONS, None, [""] * 6, reported, {}, None, None)
    monkeypatch.setattr(trainer, "_generate", lambda prompts: generated)
    scored = torch.tensor(rewards, dtype=torch.float64).reshape(-1, 1)
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: scored)
    monkeypatch.setattr(trainer, "reward_weights", torch.ones(1, dtype=torch.float64))


def score(trainer):
    return trainer._generate_and_score_completions([{"prompt": "w5 w6"}] * 6)


def completion_rows(seed, scale=0.3, dtype=torch.float64):
    """[6, 8] numbers like log-probabilities of the completions, right-padded as TRL pads them."""
    g = torch.Generator().manual_seed(0)
    center = torch.randn(6, 8, generator=g, dtype=torch.float64) * 0.5 - 2
    return (center + torch.randn(6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(
        dtype
    )


COMPLETION_MASK = torch.tensor([[k < len(ids) for k in range(8)] for ids in COMPLETIONS])
MASK = torch.zeros(6, 12, dtype=torch.bool)  # ours: prompt and completion in one right-padded row
IDS = torch.full((6, 12), PAD)
for _row, (_prompt, _completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
    _end = len(_prompt) + len(_completion)
    MASK[_row, len(_prompt) : _end] = True
    IDS[_row, :_end] = torch.tensor(_prompt + _completion)


def grid(rows):
    return scatter(rows[COMPLETION_MASK], predicting(MASK), MASK.shape)


def our_loss(
    logp, old, ref, sampler, normalization, level, correction, beta, bias_correction, values, mask=MASK, rows=None
):
    corrected = truncated_correction(old, sampler, mask, CAP, correction) if correction != "none" else None
    terms, info = grpo_values(
        logp, old, values, mask, clip_low=LOW, clip_high=HIGH, level=level, correction_weights=corrected
    )
    if beta:
        terms = terms + beta * k3(logp, ref, importance_ratio(logp, old, mask, level) if bias_correction else None)
    weights = grpo_weights(mask, normalization, dtype=logp.dtype)
    return (terms * weights).sum() / grpo_count(mask, normalization, MAX_TOKENS, rows), info


@pytest.mark.parametrize(("beta", "bias_correction"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("correction", ["none", "token", "sequence"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("normalization", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_loss_and_gradient_equal_trl_in_float64(
    trainer, monkeypatch, normalization, level, correction, beta, bias_correction
):
    old, ref, sampler = completion_rows(1), completion_rows(2), completion_rows(3, dtype=torch.float32)
    case = (normalization, level, correction, beta, bias_correction)
    set_up(trainer, monkeypatch, *case, sampler)
    frozen = iter([old, ref])
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (next(frozen), None, None))
    inputs = score(trainer)
    theirs = completion_rows(19).requires_grad_()
    entropy = torch.zeros(6, 8)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (theirs, entropy, None))
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()

    values, _, _ = advantages(torch.tensor(REWARDS, dtype=torch.float64))
    torch.testing.assert_close(values.flatten(), inputs["advantages"], rtol=1e-12, atol=1e-12)
    ours = completion_rows(19).requires_grad_()
    loss, info = our_loss(grid(ours), grid(old), grid(ref), grid(sampler.double()), *case, values.flatten())
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)

    logged = trainer._metrics["train"]
    assert info["clip_low"] > 0 and info["clip_high"] > 0  # the clip is active in every case
    for name in ("low", "high"):
        mean = logged[f"clip_ratio/{name}_mean"][-1]
        assert (info[f"clip_{name}"] / info["count"]).item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("normalization", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_loss_and_gradient_equal_trl_through_a_model_in_float32(trainer, monkeypatch, normalization):
    """Log-probabilities too: TRL left-pads prompts and uses its fused head; ours are right-padded rows through `head`.

    Levels, corrections and k3 rotate over the normalisations; the float64 test has every combination.
    """
    level, correction, beta, bias_correction = {
        "grpo": ("sequence", "token", 0.1, True),
        "dr_grpo": ("token", "none", 0.1, False),
        "dapo": ("token", "sequence", 0.0, False),
        "bnpo": ("token", "token", 0.1, True),
    }[normalization]
    case = (normalization, level, correction, beta, bias_correction)
    sampler = completion_rows(3, dtype=torch.float32) - 1.5
    set_up(trainer, monkeypatch, *case, sampler)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}

    def move(model, seed, by=0.02):
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name] + by * torch.randn(p.shape, generator=g))

    def ours(model):
        positions = predicting(MASK)
        hidden = model.model(IDS).last_hidden_state.flatten(0, 1)[positions]
        logp = head(hidden, model.lm_head.weight, IDS[MASK], temperature=TEMPERATURE, chunk=4).logp
        return scatter(logp, positions, MASK.shape)

    try:
        move(trainer.ref_model, 1)
        inputs = score(trainer)  # old log-probabilities are those of `start`
        with torch.no_grad():
            old, ref = ours(policy), ours(trainer.ref_model)
        move(policy, 2)
        policy.zero_grad()
        expected = trainer._compute_loss(trainer.model, inputs)
        expected.backward()
        grads = {name: p.grad.clone() for name, p in policy.named_parameters()}

        policy.zero_grad()
        values = advantages(torch.tensor(REWARDS))[0].flatten()
        loss, _ = our_loss(ours(policy), old, ref, grid(sampler), *case, values)
        loss.backward()
        torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
        for name, p in policy.named_parameters():
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-5, atol=1e-5)
        assert max(g.abs().max() for g in grads.values()) > 1e-2
    finally:
        with torch.no_grad():
            for name, p in policy.named_parameters():
                p.copy_(start[name])
        policy.zero_grad()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl_with_missing_rewards(trainer, monkeypatch, scale):
    rewards = [[0.0, float("nan"), 0.7], [0.3, 2.0, 0.9]]
    set_up(trainer, monkeypatch, "dapo", "token", "none", 0.0, False, completion_rows(3), rewards, scale)
    rows = completion_rows(1)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (rows, None, None))
    values, valid, _ = advantages(torch.tensor(rewards, dtype=torch.float64), scale)
    torch.testing.assert_close(values.flatten(), score(trainer)["advantages"], rtol=1e-12, atol=1e-12)
    assert valid.flatten().tolist() == [True, False, True, True, True, True]


@pytest.mark.parametrize("normalization", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_masking_truncated_completions_equals_trl(trainer, monkeypatch, normalization):
    """TRL keeps counting the rows it masks; `rows` reproduces that."""
    case = (normalization, "token", "none", 0.0, False)
    old, sampler = completion_rows(1), completion_rows(3, dtype=torch.float32)
    set_up(trainer, monkeypatch, *case, sampler)
    monkeypatch.setattr(trainer, "mask_truncated_completions", True)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (old, None, None))
    inputs = score(trainer)
    theirs = completion_rows(19).requires_grad_()
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (theirs, torch.zeros(6, 8), None)
    )
    expected = trainer._compute_loss(trainer.model, inputs)

    mask = MASK & torch.tensor([ids[-1] == EOS for ids in COMPLETIONS])[:, None]
    assert mask.any(1).sum() == 5
    values = advantages(torch.tensor(REWARDS, dtype=torch.float64))[0].flatten()
    everyone = torch.ones(6, dtype=torch.bool)
    args = (grid(theirs), grid(old), None, grid(sampler), *case, values, mask)
    torch.testing.assert_close(our_loss(*args, everyone)[0], expected, rtol=1e-10, atol=1e-10)
    alone, _ = our_loss(*args)
    torch.testing.assert_close(
        alone, expected * (1 if normalization in ("dapo", "bnpo") else 6 / 5), rtol=1e-10, atol=1e-10
    )
