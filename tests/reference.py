"""The papers' formulas, a tensor at a time, in float64, in the papers' symbols.

SAM arXiv 2010.01412, ASAM 2102.11600, BSAM 2409.13173, GSAM 2203.08065, WSAM 2305.15817, LookSAM 2203.02714, Friendly
SAM 2403.12350, LE-SAM 2605.10183, groups left out of the perturbation 2306.04226; torch.optim's documentation for the
base updates.
Written for reading, not for speed, and from the papers, not from the package: the oracle of the tests.
A gradient is None where a parameter has none in a pass; it is then zero there.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch


def T(w, o):
    """T_w: 1, or |w| + η where adaptive."""
    return w.abs() + o["eta"] if o["adaptive"] else torch.ones_like(w)


def ascent_norm(ws, gs, options):
    """n = ‖T g‖ over all parameters that have a gradient, but for those that are left out of the perturbation."""
    return norm([T(w, o) * g for w, g, o in zip(ws, gs, options) if g is not None and perturbs(o)])


def norm(gs):
    return math.sqrt(product(gs, gs))


def product(xs, ys):
    """⟨x, y⟩ over all parameters that have both."""
    return sum((x * y).sum().item() for x, y in zip(xs, ys) if x is not None and y is not None)


def w_max(w, g, n, o, norm_eps=1e-12):
    """w + ρ T² g / (n + norm_eps); the other way round where the objective is maximised."""
    return moved(w, g, n, o, o["rho"], norm_eps)


def w_min(w, g, n, o, norm_eps=1e-12):
    """w − ρ_min T² g / (n + norm_eps)."""
    return moved(w, g, n, o, -rho_min(o), norm_eps)


def moved(w, g, n, o, radius, norm_eps):
    """w + radius T² g / (n + norm_eps); where ρ is more than σ / n, a loss budget, radii are that much smaller."""
    if g is None or not perturbs(o):
        return w
    if o.get("loss_budget") is not None:
        radius *= min(1.0, o["loss_budget"] / n / o["rho"])
    return w + sign(o) * radius * T(w, o) ** 2 * g / (n + norm_eps)


def perturbs(o):
    return o.get("perturb", True)


def rho_min(o):
    """ρ_end + (ρ_min − ρ_end)(lr_t − lr_end)/(lr_max − lr_end), BSAM eq. 12, the fraction kept in [0, 1]."""
    if o["rho_min_decay"] == "none":
        return o["rho_min"]
    lr_max = o.get("lr_max") or max(o["lr"], o["given_lr"], o["largest_lr"])
    if lr_max == o["rho_min_lr_end"]:
        return o["rho_min"]
    share = (o["lr"] - o["rho_min_lr_end"]) / (lr_max - o["rho_min_lr_end"])
    return o["rho_min_end"] + (o["rho_min"] - o["rho_min_end"]) * min(max(share, 0), 1)


def sign(o):
    return -1.0 if o.get("maximize") else 1.0


# ---- directions: of the gradients of each pass, a list a pass; d is None where no pass had a gradient


def sam(passes, options=None):
    """d = ∇L(w_max)."""
    return [x and x[1] for x in filled(passes)]


def bsam(passes, options=None):
    """d = g + g_max − c g_min, c = ‖g_max‖ / ‖g_min‖, 0 where ‖g_min‖ = 0."""
    _, g_max, g_min = passes
    c = ratio(norm(g_max), norm(g_min))
    return [x and x[0] + x[1] - c * x[2] for x in filled(passes)]


def extrapolated_bsam(passes, options):
    """The same with ĝ_min = g − r (g_max − g), r = ρ_min / ρ, which is g_min of a quadratic loss; 0 where one lacks."""
    return bsam([*passes, extrapolated(*passes, options)], options)


def extrapolated(g, g_max, options):
    """ĝ_min."""
    missing = [x is None or y is None for x, y in zip(g, g_max)]
    return [None if m else x - r * (y - x) for x, y, r, m in zip(g, g_max, ratios(options), missing)]


def ratios(options):
    """r = ρ_min / ρ of each parameter; what stays at w has that of all others, where they have one."""
    own = [ratio(rho_min(o), o["rho"]) for o in options]
    moves = [o["rho"] > 0 and o["perturb"] for o in options]
    others = [r for r, moved in zip(own, moves) if moved]
    if not others or max(others) - min(others) > 1e-6 * max(others):
        return own
    return [r if moved else others[0] for r, moved in zip(own, moves)]


def gsam(passes, options):
    """d = g_max − α g⊥, g⊥ = g − ⟨g, g_max⟩ / ‖g_max‖² g_max; g_max where that is 0. Algorithm 1."""
    g, g_max = passes
    if norm(g_max) == 0:
        return sam(passes, options)
    along = product(g, g_max) / norm(g_max) ** 2
    return [x and x[1] - o["alpha"] * (x[0] - along * x[1]) for x, o in zip(filled(passes), options)]


def wsam(passes, options):
    """d = (1 − 2γ)/(1 − γ) g + γ/(1 − γ) g_max: the gradient of (1 − 2γ)/(1 − γ) L + γ/(1 − γ) L_SAM."""
    gammas = [o["gamma"] for o in options]
    return [x and ((1 - 2 * y) * x[0] + y * x[1]) / (1 - y) for x, y in zip(filled(passes), gammas)]


class PassSums(NamedTuple):
    """What a mix is a function of."""

    g: torch.Tensor
    g_max: torch.Tensor
    product: torch.Tensor


def given(mix):
    """d = a g + b g_max, a and b a function of Σ g², Σ g_max² and Σ g g_max."""

    def direction(passes, options):
        g, g_max = passes
        sums = (product(g, g), product(g_max, g_max), product(g, g_max))
        a, b = mix(PassSums(*(torch.tensor(x, dtype=torch.float64) for x in sums)))
        return [x and a * x[0] + b * x[1] for x in filled(passes)]

    return direction


# ---- the same with a history, one tensor a parameter, zeros at first


def looksam(passes, options, vs):
    """d = ∇L(w_max) in a step of two passes; in one of one d = g + α (‖g‖ / ‖v‖) v, g where v = 0. Algorithm 1."""
    if len(passes) == 2:
        return sam(passes)
    (g,) = passes
    length = ratio(norm(g), norm([None if x is None else v for x, v in zip(g, vs)]))
    return [x and x[0] + o["alpha"] * length * v for x, v, o in zip(filled(passes), vs, options)]


def orthogonal(passes, options, vs):
    """v = g_max − (⟨g, g_max⟩ / ‖g‖²) g after a step of two passes, of what had a gradient."""
    if len(passes) == 1:
        return vs
    g, g_max = passes
    along = ratio(product(g, g_max), norm(g) ** 2)
    return [v if x is None else x[1] - along * x[0] for v, x in zip(vs, filled(passes))]


def friendly_sam(passes, options, ms):
    """d = ∇L(w_max)."""
    return sam(passes)


def friendly(g, options, ms):
    """q = g − σ m, of what is perturbed: what the perturbation goes along."""
    return [x - o["sigma"] * m if x is not None and perturbs(o) else None for x, m, o in zip(g, ms, options)]


def averaged(passes, options, ms):
    """m = λ m + (1 − λ) g; the first one is g, as in the authors' code. Of what is perturbed, and had a g."""
    g = [x if perturbs(o) else None for x, o in zip(passes[0], options)]
    first = not norm([None if x is None else m for x, m in zip(g, ms)])
    lmbdas = [0.0 if first else o["lmbda"] for o in options]
    return [m if x is None else y * m + (1 - y) * x for m, x, y in zip(ms, g, lmbdas)]


class Memory(NamedTuple):
    """What a member remembers, in `state`'s ``key``."""

    key: str
    remembered: Callable
    """What the history becomes: of the passes' gradients, the options, and what it was."""
    along: Callable = lambda g, options, history: g
    """What the perturbation goes along: of the first gradient, the options and the history."""


ORTHOGONAL = Memory("orthogonal_gradient", orthogonal)
AVERAGED = Memory("gradient_average", averaged, friendly)


def filled(passes):
    """A tuple a parameter, its gradient in each pass, zero where it has none; None where it has none in any."""
    return [
        None if all(x is None for x in xs) else tuple(torch.zeros_like(like(xs)) if x is None else x for x in xs)
        for xs in zip(*passes)
    ]


def like(xs):
    return next(x for x in xs if x is not None)


def ratio(x, y):
    """x / y, 0 where y = 0."""
    return x / y if y else 0.0


def clipped(ds, max_norm):
    """d, scaled down to a norm of at most max_norm, as torch.nn.utils.clip_grad_norm_ does it."""
    factor = min(1.0, max_norm / (norm(ds) + 1e-6))
    return [None if d is None else factor * d for d in ds]


def sgd(w, d, state, o):
    """torch.optim.SGD; the momentum starts as d."""
    d = sign(o) * d + o["weight_decay"] * w
    if o["momentum"]:
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = d.clone()
        else:
            state["momentum_buffer"] = o["momentum"] * state["momentum_buffer"] + (1 - o["dampening"]) * d
        d = d + o["momentum"] * state["momentum_buffer"] if o["nesterov"] else state["momentum_buffer"]
    return w - o["lr"] * d


def adam(w, d, state, o, decoupled=False):
    """torch.optim.Adam, and AdamW where decoupled."""
    b1, b2 = o["betas"]
    d = sign(o) * d
    if decoupled:
        w = w - o["lr"] * o["weight_decay"] * w
    else:
        d = d + o["weight_decay"] * w
    t = state["step"] = state.get("step", 0) + 1
    m = state["exp_avg"] = b1 * state.get("exp_avg", torch.zeros_like(w)) + (1 - b1) * d
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", torch.zeros_like(w)) + (1 - b2) * d**2
    return w - o["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + o["eps"])


def adamw(w, d, state, o):
    return adam(w, d, state, o, decoupled=True)


def bisam_q(f, y, mu, phi):
    """Q of one example's logits: 1/μ log Σ_j exp(μ φ(f_j − f_y)), BiSAM 2407.12993 eq. 11."""
    return math.log(sum(math.exp(mu * phi(f_j - f[y])) for f_j in f)) / mu


def phi_tanh(x, alpha=0.1):
    return math.tanh(alpha * x)


def phi_log(x):
    """1 − log(1 + exp(γ − x)), γ = log(e − 1)."""
    return 1 - math.log(1 + math.exp(math.log(math.e - 1) - x))
