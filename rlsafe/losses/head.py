"""The language-model head: token log-probabilities and full-vocabulary KLs from hidden states, chunked over tokens.

`head` is what the engine calls: one projection of the policy's hidden states per chunk serves the log-probabilities and
the KL to every reference, forward and backward, and no `[N, V]` tensor outlives its chunk.

How the backward works. Every output is one number per token, so its gradient with respect to that token's hidden state
is one vector of size H. With a frozen head (LoRA) the forward computes those vectors while the chunk's probabilities
are there and keeps `[N, H]` per output; the backward only scales and adds them: no second projection, no second
softmax, and the head's weight is not touched again. A trained head's own gradient needs the incoming ones first, so
there the backward projects each chunk again.

Against `trl.kernels` (ChunkedLogProbFunction and ChunkedDivergenceFunction: they stream over the vocabulary as well and
work in float32 only) and plain autograd on full logits. CPU, 1 thread, float32, forward + backward, log-probs alone /
with one KL, fastest of 3 (152k) or 15 interleaved runs on 4 cores that were not idle, in milliseconds:

                                    plain          trl           this
    V 600, H 128, N 4096   frozen   23 / 40        53 / 158      20 / 39
                           trained  31 / 55        49 / 171      38 / 61
    V 152k, H 896, N 512   frozen   4058 / 8709    5582 / 17614  3525 / 7120
                           trained  5636 / 8760    7272 / 21539  7385 / 11483

Peak memory above the inputs at 152k (2 threads), MiB; plain's grows with N, the others' do not:

                           frozen   910 / 1503     136 / 761     617 / 619
                           trained  911 / 1505     679 / 1316    1283 / 1581

We use this one because it is the fastest where the head is frozen, needs no extra memory for a KL there, works in float64,
and projects once for all outputs. TRL's kernels need less memory for log-probs alone and for a trained head, and plain
autograd is faster for a trained head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlsafe.losses.nucleus import log_mass

# Default size of a chunk: as many tokens as fit into this many logits, at least MIN_CHUNK. Measured on CPU: at a
# 600 vocabulary 256 to 4096 rows are alike; at 152k 256 rows take 3 to 17% more time than 512 and half the memory. On
# GPU by arithmetic intensity, not measured: 441 rows of a 152k vocabulary are compute-bound, 270 MB per float32 buffer.
CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**26}
MIN_CHUNK = 256
HALF = (torch.float16, torch.bfloat16)

Direction = Literal["forward", "reverse"]


class Reference(NamedTuple):
    """A frozen model to measure the KL to. It is a constant: no gradient reaches any of these tensors.

    hidden: [N, H_ref], on the same tokens as the policy's. weight [V, H_ref] and bias [V]: None means that the
    reference shares the policy's (LoRA without an adapted head). grad=False: the KL is only monitored, its gradient is
    not prepared.
    """

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    grad: bool = True


@dataclass(frozen=True)
class HeadOutput:
    """logp [N], kls: one [N] per reference, entropy and log_mass [N] (detached; None unless asked); float32, or float64."""

    logp: Tensor
    kls: list[Tensor]
    entropy: Tensor | None
    log_mass: Tensor | None = None


class _Frozen(NamedTuple):
    """A `Reference` with everything it shares filled in, detached and in the compute dtype."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: bool


@dataclass(frozen=True)
class _Job:
    """The arguments of one call that carry no gradient.

    ratio: what the logits of `temperature` are multiplied by for those of the KLs.
    """

    targets: Tensor
    references: list[_Frozen]
    temperature: float
    softcap: float | None
    logit_scale: float
    direction: Direction
    chunk: int
    with_entropy: bool
    wants_grad: bool
    top_p: float = 1.0
    ratio: float = 1.0


def head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    references: Sequence[Reference | tuple[Any, ...]] = (),
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    direction: Direction = "forward",
    chunk: int | None = None,
    with_entropy: bool = False,
    top_p: float = 1.0,
    kl_temperature: float | None = None,
) -> HeadOutput:
    """Log-probability of each target and the KL to each reference, of softmax(logits / temperature).

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), without softcap its argument.

    hidden [N, H]: the states that predict the targets [N]; weight [V, H]; bias [V]. Gradient flows to hidden, weight
    and bias where they require it. direction: "forward" is KL(policy || reference), "reverse" is KL(reference ||
    policy).
    chunk: tokens whose logits are in memory at a time; None picks it from the vocabulary and the device.
    top_p: below 1, log_mass is that of the nucleus (`rlsafe.losses.nucleus`).
    kl_temperature: divides the logits of both models in the KLs; None = as temperature.
    The projection runs in the autocast dtype, else in weight's; probabilities are float32 (float64 for a float64
    weight).
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    frozen = []
    for ref in (Reference(*ref) for ref in references):
        ref_weight = weight if ref.weight is None else ref.weight
        ref_bias = bias if ref.bias is None else ref.bias
        ref_bias = None if ref_bias is None else ref_bias.detach()
        frozen.append(_Frozen(ref.hidden.detach().to(dtype), ref_weight.detach().to(dtype), ref_bias, ref.grad))
    if chunk is None:
        chunk = max(MIN_CHUNK, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"]) // weight.shape[0])
        if frozen:  # a KL holds four [chunk, V] buffers where log-probs hold two: half the rows, no more memory
            chunk //= 2
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    ratio = 1.0 if kl_temperature is None else temperature / kl_temperature
    job = _Job(
        targets, frozen, temperature, softcap, logit_scale, direction, chunk, with_entropy, wants_grad, top_p, ratio
    )  # fmt: skip
    with torch.autocast(device, enabled=False):
        logp, entropy, mass, *kls = _Head.apply(hidden, weight, bias, job)
    return HeadOutput(logp, kls, entropy, mass)


def _widens(a: Tensor) -> bool:
    """Whether products of half-precision matrices may come out in float32."""
    return a.is_cuda and a.dtype in HALF


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the result left in float32 where the device can do it: logits should not be rounded to bfloat16."""
    if _widens(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in total's precision, without rounding the product to half precision on the way."""
    if _widens(a):
        try:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
            return
        except (RuntimeError, NotImplementedError, TypeError) as error:  # not every build has this kernel
            if isinstance(error, torch.OutOfMemoryError):
                raise
    total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, Tensor | float]:
    """Logits [c, V] of a chunk over the temperature, and d logit / d projection: a number, or [c, V] under a softcap."""
    z = _matmul(hidden, weight.t())
    if z.dtype in HALF:
        z = z.float()
    if bias is not None:
        z += bias
    slope: Tensor | float = job.logit_scale / job.temperature
    if job.softcap is not None:
        capped = z.mul_(job.logit_scale / job.softcap).tanh_()
        slope = slope * (1 - capped.square())
        z = capped.mul_(job.softcap / job.temperature)
    elif slope != 1.0:
        z *= slope
    return z, slope


def _log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, Tensor, Tensor | float]:
    """The policy's log-probabilities [c, V] of a chunk, those for the KLs (the same tensor where there is but one temperature), and
    d logit / d projection."""
    z, slope = _logits(hidden, weight, bias, job)
    log_p = torch.log_softmax(z, dim=-1)
    same = job.ratio == 1.0 or not job.references
    return log_p, log_p if same else torch.log_softmax(z.mul_(job.ratio), dim=-1), slope


def _reference_log_probs(ref: _Frozen, rows: slice, job: _Job) -> Tensor:
    """A reference's log-probabilities [c, V] for its KL."""
    z, _ = _logits(ref.hidden[rows], ref.weight, ref.bias, job)
    return torch.log_softmax(z if job.ratio == 1.0 else z.mul_(job.ratio), dim=-1)


def _kl(log_p: Tensor, p: Tensor, log_q: Tensor, direction: Direction, grad: bool) -> tuple[Tensor, Tensor]:
    """KL [c] of a chunk and (when `grad`) its gradient with respect to the policy's logits [c, V]. Overwrites log_q.

    d KL(p||q) / d z = p * (log p - log q - KL(p||q));  d KL(q||p) / d z = p - q.
    """
    if direction == "forward":
        terms = torch.sub(log_p, log_q, out=log_q).mul_(p)
        kl = terms.sum(-1)
        return kl, terms.addcmul_(p, kl.unsqueeze(-1), value=-1) if grad else terms
    q = log_q.exp()
    kl = log_q.sub_(log_p).mul_(q).sum(-1)
    return kl, torch.sub(p, q, out=q) if grad else q


def _logp_grad(p: Tensor, targets: Tensor) -> Tensor:
    """d log p[target] / d z = 1[target] - p. Overwrites p [c, V]."""
    return p.neg_().scatter_add_(1, targets.unsqueeze(1), torch.ones_like(p[:, :1]))


def _project_back(grad: Tensor, slope: Tensor | float, weight: Tensor, out: Tensor) -> None:
    """Gradient with respect to the logits [c, V] -> with respect to the hidden states, into out [c, H]."""
    if isinstance(slope, Tensor):
        out.copy_(_matmul(grad.mul_(slope).to(weight.dtype), weight))
    else:
        out.copy_(_matmul(grad.to(weight.dtype), weight).mul_(slope))


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> Any:
        ctx.set_materialize_grads(False)
        n = hidden.shape[0]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = [torch.empty(n, dtype=dtype, device=hidden.device) for _ in range(3 + len(job.references))]
        logp = rows[0]
        entropy = rows[1] if job.with_entropy else None
        mass = rows[2] if job.top_p < 1 else None
        kls = list(rows[3:])
        frozen = not any(ctx.needs_input_grad[1:3])
        keep = job.wants_grad and frozen
        jac_logp = torch.empty_like(hidden) if keep else None
        jac_kls = [torch.empty_like(hidden) if keep and ref.grad else None for ref in job.references]

        for start in range(0, n, job.chunk):
            s = slice(start, start + job.chunk)
            log_p, kl_log_p, slope = _log_probs(hidden[s], weight, bias, job)
            logp[s] = log_p.gather(1, job.targets[s].unsqueeze(1)).squeeze(1)
            if mass is not None:
                mass[s] = log_mass(log_p, job.targets[s], job.top_p)
            if not (keep or entropy is not None or kls):
                continue
            p = log_p.exp()
            if entropy is not None:
                entropy[s] = -(p * log_p).sum(-1)
            kl_p = p if kl_log_p is log_p else kl_log_p.exp()
            kl_slope = slope if job.ratio == 1.0 else slope * job.ratio
            for ref, kl, jac in zip(job.references, kls, jac_kls, strict=True):
                log_q = _reference_log_probs(ref, s, job)
                kl[s], grad = _kl(kl_log_p, kl_p, log_q, job.direction, jac is not None)
                if jac is not None:
                    _project_back(grad, kl_slope, weight, out=jac[s])
                del log_q, grad
            if jac_logp is not None:
                _project_back(_logp_grad(p, job.targets[s]), slope, weight, out=jac_logp[s])

        constant = [kl for kl, ref in zip(kls, job.references, strict=True) if not ref.grad]
        ctx.mark_non_differentiable(*constant, *(extra for extra in (entropy, mass) if extra is not None))
        ctx.frozen, ctx.job, ctx.dtype = frozen, job, hidden.dtype
        if frozen:
            ctx.save_for_backward(jac_logp, *jac_kls)
        else:
            ctx.save_for_backward(hidden, weight, bias)
        return logp, entropy, mass, *kls

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor | None, _entropy: None, _mass: None, *g_kls: Tensor | None) -> Any:
        if ctx.frozen:
            pairs = zip((g_logp, *g_kls), ctx.saved_tensors, strict=True)
            terms = [jac * g.unsqueeze(1) for g, jac in pairs if g is not None and jac is not None]
            return (sum(terms[1:], terms[0]).to(ctx.dtype) if terms else None), None, None, None
        hidden, weight, bias = ctx.saved_tensors
        job: _Job = ctx.job
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[2] else None
        for start in range(0, hidden.shape[0], job.chunk):
            s = slice(start, start + job.chunk)
            log_p, kl_log_p, slope = _log_probs(hidden[s], weight, bias, job)
            p = log_p.exp()
            kl_p = p if kl_log_p is log_p else kl_log_p.exp()
            total = torch.zeros_like(p)  # the loss's gradient with respect to the logits [c, V]
            for ref, g in zip(job.references, g_kls, strict=True):
                if g is not None:
                    log_q = _reference_log_probs(ref, s, job)
                    grad = _kl(kl_log_p, kl_p, log_q, job.direction, True)[1]
                    total.addcmul_(grad, g[s].unsqueeze(1), value=job.ratio)
            if g_logp is not None:
                total.addcmul_(_logp_grad(p, job.targets[s]), g_logp[s].unsqueeze(1))
            total *= slope
            narrow = total.to(weight.dtype)
            grad_hidden[s] = _matmul(narrow, weight)
            if grad_weight is not None:
                _accumulate(grad_weight, narrow.t(), hidden[s])
            if grad_bias is not None:
                grad_bias += total.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )
