"""What an optimizer must do: the formulas of docs/mathematics.md in float64, around torch.optim's own optimizers.

Written for the fuzzer, from the papers and not from the package; imports torch only. Parameters are known by their
index, gradients come as {index: float64 tensor}: no entry where a parameter has none in a pass.
"""

import math

import torch
from torch import nn

CALLS = {
    **dict.fromkeys(("SAM", "ASAM", "GSAM", "WSAM", "extrapolated BSAM", "LookSAM", "FriendlySAM"), ("ascend", "step")),
    "BSAM": ("ascend", "descend", "step"),
}
ALPHA, GAMMA, K, SIGMA, LMBDA = 0.4, 0.9, 3, 0.7, 0.6
HISTORY = {"LookSAM": "orthogonal_gradient", "FriendlySAM": "gradient_average"}


def norm(tensors):
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


def product(xs, ys):
    return sum((x * ys[i]).sum().item() for i, x in xs.items() if i in ys)


def finite(grads):
    return all(g.isfinite().all() for g in grads.values())


def T(w, g, o):
    """T_w: 1, or |w| + η where adaptive, and 0 where nothing is to be moved, even if w is infinite."""
    return torch.where(g == 0, 0.0, w.abs() + o["eta"]) if o["adaptive"] else torch.ones_like(w)


def ratios(options, groups):
    """r = ρ_min / ρ of each parameter; one that stays at w has that of all others, where they have one."""
    own = {i: rho_min(o) / o["rho"] if o["rho"] else 0.0 for i, o in options.items()}
    moving = [rho_min(o) / o["rho"] for o in groups if o["rho"] and o["perturb"]]
    if not moving or max(moving) - min(moving) > 1e-6 * max(moving):
        return own
    return {i: r if options[i]["rho"] and options[i]["perturb"] else moving[0] for i, r in own.items()}


def rho_min(o):
    """BSAM eq. 12, with ρ_end = lr_end = 0."""
    lr_max = max(o["lr"], o["given_lr"], o["largest_lr"])
    return o["rho_min"] * (o["lr"] / lr_max if o["rho_min_decay"] == "lr" and lr_max else 1.0)


class Model:
    """A sharpness-aware optimizer over weights of its own.

    Args:
        kind: one of `CALLS`.
        weights: a tensor a parameter.
        groups: param groups with all of their options; "params" are indices.
        base: a torch.optim class.
        options: of the base.
        fused: whether a plain step, too, is skipped for a gradient that is not finite.
        update_from: BSAM's.
        max_grad_norm: None, or what d is clipped to.
    """

    def __init__(self, kind, weights, groups, base, options, *, fused, update_from="w", max_grad_norm=None):
        self.w = [nn.Parameter(w.detach().double().clone()) for w in weights]
        cut = [{**group, "params": [self.w[i] for i in group["params"]]} for group in groups]
        self.base = base(cut, **options)
        self.kind, self.calls, self.fused = kind, CALLS[kind], fused
        self.update_from, self.max_grad_norm = update_from, max_grad_norm
        self.active, self.skipped, self.radius_factor = True, 0, 1.0
        self.threshold = None  # of ‖g‖²: a step goes on beyond its first pass above it alone; None: always
        self.limit = math.inf  # of coefficients: what a dtype of the weights can be computed with
        self.norms = []  # of the gradients of the last step: T g, g_max, g_min
        self.synced()
        self.forget()

    def forget(self):
        """The step, whose weights are as they shall be."""
        self.grads = []  # of the passes of this step so far
        self.saved = {}  # w, of what is perturbed
        self.failed = False  # something was not finite
        self.stays = False  # the norm of the first pass, or its loss, was not: nothing is perturbed
        self.along = {}  # what the perturbation goes along
        self.decided = None  # whether it goes on, once that was asked

    def synced(self):
        """From here on w and the state are taken as exact."""
        self.moved, self.updated = set(), set()  # what was computed since: w, and w with its state

    # ---- what there is

    @property
    def at_rest(self):
        return not self.grads

    @property
    def next(self):
        return self.calls[len(self.grads)]

    @property
    def between(self):
        """Whether LookSAM's next step is none of its k-th."""
        return (
            self.kind == "LookSAM" and self.active and max(group["looks"] for group in self.base.param_groups) % K > 0
        )

    @property
    def single(self):
        """Whether the next step has one pass, as far as that is known."""
        declined = self.threshold is not None and self.decided is False
        return not self.active or self.between or declined

    def decide(self, grads):
        """Ask whether a step goes on; without any gradient nobody is asked."""
        known = self.threshold is None or self.decided is not None or not self.active or self.between
        if grads and self.at_rest and not known:
            self.decided = norm(grads.values()) ** 2 > self.threshold

    @property
    def whole(self):
        """The calls of the next step with a closure."""
        return ["plain_step"] if self.single else self.calls

    @property
    def plain(self):
        return self.single or self.moves_nothing

    @property
    def moves_nothing(self):
        return all(group["lr"] == 0 for group in self.base.param_groups)

    @property
    def refused(self):
        """Whether no step can begin: there is no line from w_max through w."""
        extrapolates = self.kind == "extrapolated BSAM"
        return extrapolates and any(rho_min(o) and not o["rho"] for o in self.base.param_groups)

    def _entries(self):
        return [(w, entry) for w, entry in self.base.state.items() if isinstance(entry, dict)]

    def index(self, param):
        return next(i for i, w in enumerate(self.w) if w is param)

    def options(self):
        """{index: its param group}"""
        return {self.index(p): group for group in self.base.param_groups for p in group["params"]}

    def state(self):
        """{index or string: its entry}, the empty ones and the None in them left out."""
        entries = {k if isinstance(k, str) else self.index(k): entry for k, entry in self.base.state.items()}
        return tidy(entries)

    # ---- a step

    def ascend(self, grads, loss=0.0):
        """w_max = w + ρ T² g / ‖T g‖"""
        options = self.options()
        perturbed = {i: g for i, g in grads.items() if options[i]["perturb"]}
        keeps = self.kind not in {"SAM", "ASAM", "FriendlySAM"}  # else nobody looks at what is not perturbed
        self._note(grads, loss, grads if keeps else perturbed)
        self.saved = {i: self.w[i].detach().clone() for i in perturbed}
        self.stays = not (finite(perturbed) and math.isfinite(loss))
        m = self.history(perturbed)
        self.first = not norm(m.values())
        self.along = {i: g - SIGMA * m[i] for i, g in perturbed.items()} if self.kind == "FriendlySAM" else perturbed
        self.n = norm([T(self.w[i].detach(), q, options[i]) * q for i, q in self.along.items()])
        if self.kind == "extrapolated BSAM":
            self.ratios = ratios(options, self.base.param_groups)
        self._perturb({i: o["rho"] for i, o in options.items()})

    def descend(self, grads, loss=0.0):
        """w_min = w − ρ_min T² g / ‖T g‖"""
        self._note(grads, loss)
        self._note_rates()
        self._perturb({i: -rho_min(o) for i, o in self.options().items()})

    def _note_rates(self):
        for group in self.base.param_groups:
            if group.get("rho_min_decay") == "lr":
                group["largest_lr"] = max(group.get("largest_lr", 0.0), group["lr"])

    def _note(self, grads, loss, looked_at=None):
        self.grads.append(grads)
        self.failed |= not (finite(grads if looked_at is None else looked_at) and math.isfinite(loss))

    def _perturb(self, radii):
        options = self.options()
        for i in self.saved.keys() & options.keys():
            w, g, o = self.saved[i], self.along[i], options[i]
            if self.failed or not self.n:
                self.w[i].data = w.clone()
                continue
            budget = math.inf if o["loss_budget"] is None else o["loss_budget"] / self.n
            rho = self.radius_factor * o["rho"]
            radius = self.radius_factor * radii[i] * (min(1.0, budget / rho) if rho else 1.0)
            sign = -1 if o["maximize"] else 1
            t = T(w, g, o)
            self.w[i].data = w + sign * radius * t * (t * g) / (self.n + 1e-12)
            self.moved.add(i)

    def step(self, grads, loss=0.0):
        """The base's rule from w with d; skipped where something was not finite."""
        self._note(grads, loss)
        if self.kind == "extrapolated BSAM":
            self._note_rates()
        if self.kind == "LookSAM":
            self._look()
        self.norms = [self.n, *(norm(grads.values()) for grads in self._after_the_first())]
        if self.failed or abs(self._coefficient()) > self.limit:
            self.skipped += 1
            self.restore()
            return
        members = {i for grads in self.grads for i in grads} & self.options().keys()
        coefficient = self._coefficient()
        directions = {i: self._direction(i, coefficient) for i in members}
        for i, w in self.saved.items():
            if self.update_from == "w" or i not in members:
                self.w[i].data = w
        remembered = self._remembered(members)
        self._update(directions)
        self.remember(remembered)
        self.forget()

    # ---- the history, zeros at first

    def history(self, members):
        """{index: its history} of ``members``."""
        entries = {i: self.base.state.get(self.w[i], {}).get(HISTORY.get(self.kind)) for i in members}
        return {i: torch.zeros_like(self.w[i].data) if h is None else h for i, h in entries.items()}

    def _look(self):
        looks = max(group["looks"] for group in self.base.param_groups) + 1
        for group in self.base.param_groups:
            group["looks"] = looks

    def _remembered(self, members):
        """v = g_max − (⟨g, g_max⟩ / ‖g‖²) g; m = λ m + (1 − λ) g of q = g − σ m, q where m was 0."""
        if self.kind == "LookSAM":
            g, g_max = ({i: grads.get(i, torch.zeros_like(self.w[i].data)) for i in members} for grads in self.grads)
            along = self._coefficient()
            return {i: g_max[i] - along * g[i] for i in members}
        if self.kind == "FriendlySAM":
            m = self.history(self.along.keys() & members)
            if self.first:
                return {i: self.along[i] for i in m}
            return {i: (1 - LMBDA) * self.along[i] + (LMBDA + (1 - LMBDA) * SIGMA) * m[i] for i in m}
        return {}

    def remember(self, histories):
        """{index: what its history is from now on}."""
        for i, history in histories.items():
            if history.any() or HISTORY.get(self.kind) in self.base.state.get(self.w[i], {}):
                self.base.state[self.w[i]][HISTORY[self.kind]] = history.clone()

    def _reused(self, grads):
        """d = g + α (‖g‖ / ‖v‖) v"""
        v = self.history(grads)
        return {i: g + self._reuse(grads, v) * v[i] for i, g in grads.items()}

    def _reuse(self, grads, v):
        """α ‖g‖ / ‖v‖"""
        length = norm(v.values())
        return ALPHA * norm(grads.values()) / length if length else 0.0

    def _after_the_first(self):
        """The gradients of the later passes; of BSAM g_min, of two passes ĝ_min, too."""
        return [*self.grads[1:], *([self._extrapolated()] if self.kind == "extrapolated BSAM" else [])]

    def _coefficient(self):
        """What may be of any size: BSAM's c = ‖g_max‖ / ‖g_min‖, GSAM's and LookSAM's ⟨g, g_max⟩ / ‖·‖²; else 0."""
        g, *others = self.grads
        norms = [norm(grads.values()) for grads in self._after_the_first()]
        if "BSAM" in self.kind:
            return norms[0] / norms[1] if norms[1] else 0.0
        if self.kind in {"GSAM", "LookSAM"}:
            length = norms[0] if self.kind == "GSAM" else norm(g.values())
            return product(g, others[0]) / length**2 if length else 0.0
        return 0.0

    def _direction(self, i, coefficient):
        """Of the passes' gradients, zero for what is missing."""
        zero = torch.zeros_like(self.w[i].data)
        g, g_max, *_ = (grads.get(i, zero) for grads in self.grads)
        if self.kind == "GSAM":
            return g_max - ALPHA * (g - coefficient * g_max) if norm(self.grads[1].values()) else g_max
        if self.kind == "WSAM":
            return ((1 - 2 * GAMMA) * g + GAMMA * g_max) / (1 - GAMMA)
        if self.kind in {"SAM", "ASAM", "LookSAM", "FriendlySAM"}:
            return g_max
        return g + g_max - coefficient * self._after_the_first()[1].get(i, zero)

    def _extrapolated(self):
        """ĝ_min = g − r (g_max − g), of what has both."""
        g, g_max = self.grads
        return {i: g[i] - self.ratios[i] * (g_max[i] - g[i]) for i in g.keys() & g_max.keys()}

    def plain_step(self, grads, loss=0.0):
        """The base's own step, d = g; between LookSAM's k-th ones d is of v, too."""
        self._note_rates()
        failed, between = not (finite(grads) and math.isfinite(loss)), self.between
        summed = self.fused or between or self.max_grad_norm is not None
        summed |= self.moves_nothing and self.kind in HISTORY
        self.norms, self.decided = [norm(grads.values())] if summed else [], None
        if between:
            if grads and not self.moves_nothing:  # else it is no step of its own
                self._look()
            failed |= self._reuse(grads, self.history(grads)) > self.limit
        if (self.fused or between) and failed:
            self.skipped += 1
        else:
            self._update(self._reused(grads) if between else grads)

    def _update(self, directions):
        for i, w in enumerate(self.w):
            w.grad = directions[i].clone() if i in directions else None
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([self.w[i] for i in directions], self.max_grad_norm)
        key = HISTORY.get(self.kind)
        histories = {w: entry.pop(key) for w, entry in self._entries() if key in entry}  # none of the base's
        for i in directions:  # state that lacks something begins anew
            entry = self.base.state.get(self.w[i], {})
            if self.fused and not is_whole(entry):
                entry.clear()
        for w in histories:
            if not self.base.state[w]:  # which torch begins where there is no entry
                del self.base.state[w]
        self.base.step()
        for w, history in histories.items():
            self.base.state[w][key] = history
        self.moved |= directions.keys()
        self.updated |= directions.keys()

    def restore(self):
        """w, as it was saved."""
        for i, w in self.saved.items():
            self.w[i].data = w
            self.moved.discard(i)
        self.forget()

    def add(self, param, group):
        """A param group of one new parameter."""
        self.w.append(nn.Parameter(param.detach().double().clone()))
        self.base.add_param_group({**group, "params": [self.w[-1]]})

    def exchange(self):
        """w against the perturbed weights, and back."""
        for i, w in self.saved.items():
            self.saved[i], self.w[i].data = self.w[i].data, w

    # ---- what outlives it

    def state_dict(self):
        """As torch has it; entries of parameters that are in no group are left out."""
        mine = set(map(id, (p for group in self.base.param_groups for p in group["params"])))
        state = self.base.state
        orphans = {k: state.pop(k) for k in list(state) if not isinstance(k, str) and id(k) not in mine}
        packed = self.base.state_dict()
        state.update(orphans)
        clone = {
            k: {n: v.clone() if torch.is_tensor(v) else v for n, v in e.items()} if isinstance(e, dict) else e
            for k, e in packed["state"].items()
        }
        return {"state": clone, "param_groups": [dict(group) for group in packed["param_groups"]]}

    def load(self, saved):
        """A state dict; options that it lacks stay as they are."""
        kept = [{k: v for k, v in group.items() if k != "params"} for group in self.base.param_groups]
        groups = [{**options, **group} for options, group in zip(kept, saved["param_groups"])]
        self.base.load_state_dict({"state": saved["state"], "param_groups": groups})


def is_whole(entry):
    """Whether an entry has all state of SGD, or of Adam."""
    return {"momentum_buffer"} <= entry.keys() or {"step", "exp_avg", "exp_avg_sq"} <= entry.keys()


def tidy(entries):
    """Leave out empty entries, what is None in them, and a history of zeros: there is no difference."""
    tidied = {
        k: {n: v for n, v in e.items() if not (v is None or (n in HISTORY.values() and not v.any()))}
        if isinstance(e, dict)
        else e
        for k, e in entries.items()
    }
    return {k: e for k, e in tidied.items() if not isinstance(e, dict) or e}
