"""The papers' formulas, a tensor at a time, in float64, in the papers' symbols.

SAM arXiv 2010.01412, ASAM 2102.11600, BSAM 2409.13173; torch.optim's documentation for the base updates.
Written for reading, not for speed, and from the papers, not from the package: the oracle of the tests.
A gradient is None where a parameter has none in a pass; it is then zero there.
"""

import math

import torch


def T(w, o):
    """T_w: 1, or |w| + η where adaptive."""
    return w.abs() + o["eta"] if o["adaptive"] else torch.ones_like(w)


def ascent_norm(ws, gs, options):
    """n = ‖T g‖ over all parameters that have a gradient."""
    return math.sqrt(sum((T(w, o) * g).square().sum().item() for w, g, o in zip(ws, gs, options) if g is not None))


def norm(gs):
    return math.sqrt(sum(g.square().sum().item() for g in gs if g is not None))


def w_max(w, g, n, o, norm_eps=1e-12):
    """w + ρ T² g / (n + norm_eps); the other way round where the objective is maximised."""
    if g is None:
        return w
    return w + sign(o) * o["rho"] * T(w, o) ** 2 * g / (n + norm_eps)


def w_min(w, g, n, o, norm_eps=1e-12):
    """w − ρ_min T² g / (n + norm_eps)."""
    if g is None:
        return w
    return w - sign(o) * rho_min(o) * T(w, o) ** 2 * g / (n + norm_eps)


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


def sam_direction(g, g_max, like):
    """d = ∇L(w_max); None where no pass had a gradient."""
    if g is None and g_max is None:
        return None
    return torch.zeros_like(like) if g_max is None else g_max


def bsam_direction(g, g_max, g_min, norm_max, norm_min, like):
    """d = g + g_max − c g_min, c = ‖g_max‖ / ‖g_min‖, 0 where ‖g_min‖ = 0."""
    if g is None and g_max is None and g_min is None:
        return None
    zero = torch.zeros_like(like)
    g, g_max, g_min = (zero if x is None else x for x in (g, g_max, g_min))
    c = norm_max / norm_min if norm_min > 0 else 0.0
    return g + g_max - c * g_min


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
