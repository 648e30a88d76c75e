"""Over-optimisation: how a held-out reward goes with the distance from the prior, and where it peaks.

With d = sqrt(KL(pi || pi0)), Gao et al. (2023, eq. 1) find that the gold reward's gain over the prior follows
R_RL(d) = d (a - b log d) under reinforcement learning and R_bon(d) = d (a - b d) under best-of-n, R(0) = 0. Both are linear in
(a, b), so weighted least squares fits them in closed form. Both peak where a ratio of the two says: log d = a/b - 1, and
d = a / 2b. A ratio of normal estimates has an exact confidence set (Fieller 1954), which is unbounded exactly when b is not
known to be positive: when nothing says that there is a peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from scipy.special import stdtrit

from tiltlm.errors import InputError
from tiltlm.estimates import Estimate, Interval

Form = Literal["rl", "bon"]
LEVEL = 0.95
FEWEST = 5
"""Points that a curve of two or three numbers is fitted to, at least."""
LARGEST = 700.0
"""Logarithms beyond this overflow."""


@dataclass(frozen=True)
class Overoptimisation:
    """The fitted curve, and its peak.

    Attributes:
        form: "rl", d (a - b log d), or "bon", d (a - b d).
        a, b: the coefficients, in reward units; errors are widened where the points scatter more than their own errors say.
        origin: the gold reward at the prior, d = 0.
        seen: smallest and largest KL among the points, in nats.
        peak: KL at which gold peaks; high is inf where nothing bounds it, value NaN where the fit has no peak.
        gain: the curve's gold gain over the prior at the peak, NaN without one.
        end: the curve's gain over the prior at the largest KL seen.
        verdict: "peak" inside what was seen, "beyond" it, "falling" from the start, or "none" that the data show.
    """

    form: Form
    a: Estimate
    b: Estimate
    origin: Estimate
    seen: tuple[float, float]
    peak: Interval
    gain: float
    end: Estimate
    verdict: Literal["peak", "beyond", "falling", "none"]

    def at(self, kl: float) -> float:
        """The curve's gold reward at a KL in nats."""
        return self.origin.value + curve(math.sqrt(max(kl, 0.0)), self.a.value, self.b.value, self.form)

    def __str__(self) -> str:
        law = "d (a - b log d)" if self.form == "rl" else "d (a - b d)"
        return f"gold = {self.origin.value:.3f} + {law}, d = sqrt(KL): a {self.a}, b {self.b}; {self.sentence}"

    @property
    def sentence(self) -> str:
        """What the fit says of the peak, and no more."""
        last = self.seen[1]
        if self.verdict == "peak":
            return f"gold peaks at KL {self.peak} nats"
        if self.verdict == "falling":
            return f"gold falls from the start: at {last:.2f} nats it is {-self.end.value:.3g} ± {self.end.stderr:.2g} under the prior's"
        if self.verdict == "beyond":
            return f"no peak within the range seen (up to {last:.2f} nats); the curve puts it at {self.peak}, which is extrapolated"
        return f"no peak within the range seen (up to {last:.2f} nats)"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "form": self.form,
            **{name: getattr(self, name).as_dict() for name in ("a", "b", "origin", "peak", "end")},
            "seen": list(self.seen),
            "gain": self.gain if math.isfinite(self.gain) else None,
            "verdict": self.verdict,
            "sentence": self.sentence,
        }


def curve(d: float, a: float, b: float, form: Form = "rl") -> float:
    """The gain R(d) of Gao et al. (2023), eq. 1, at d = sqrt(KL)."""
    if d <= 0:
        return 0.0
    return d * (a - b * (math.log(d) if form == "rl" else d))


def fit_overoptimisation(
    kl: Sequence[float],
    gold: Sequence[float],
    stderr: Sequence[float],
    *,
    prior: Estimate | None = None,
    form: Form = "rl",
    level: float = LEVEL,
) -> Overoptimisation:
    """Fit the gold reward over d = sqrt(KL) by weighted least squares.

    Args:
        kl: KL(pi || pi0) in nats at each point; taken as known, so smooth what is noisy. Points without a positive KL are the
            prior's and count for the origin alone.
        gold: mean gold reward at each point.
        stderr: its standard error, positive.
        prior: the gold reward at the prior. With standard error 0 it is fixed (`Estimate(0.0, 0.0, 1)` where `gold` are gains
            already), with one it is a further point at d = 0, and without it the curve's origin is fitted freely.

    Raises:
        InputError: for lists of unequal length, errors that are not positive, or fewer than five points away from the prior.
    """
    if form not in get_args(Form):
        raise InputError(f"form is {form!r}; choose {', '.join(get_args(Form))}")
    x, y, e = (np.asarray(values, dtype=float) for values in (kl, gold, stderr))
    if not len(x) == len(y) == len(e):
        raise InputError(f"kl, gold and stderr have {len(x)}, {len(y)} and {len(e)} values; give one of each a point")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(e).all() and (e > 0).all()):
        raise InputError("kl and gold must be finite and stderr positive at every point; leave other points out")
    if (x > 0).sum() < FEWEST:
        raise InputError(
            f"gold was seen at {int((x > 0).sum())} points with positive KL; a curve needs {FEWEST}, train longer"
        )
    design, y, e = _design(x, y, e, prior, form)
    solution, covariance, dof = _least_squares(design, y, e)
    quantile = float(stdtrit(dof, 0.5 + level / 2))
    a, b = float(solution[0]), float(solution[1])
    errors = np.sqrt(np.diag(covariance))
    origin = prior if design.shape[1] == 2 and prior else Estimate(float(solution[2]), float(errors[2]), len(y))
    found = Overoptimisation(
        form=form,
        a=Estimate(a, float(errors[0]), len(x)),
        b=Estimate(b, float(errors[1]), len(x)),
        origin=origin,
        seen=(float(x[x > 0].min()), float(x.max())),
        peak=_peak(a, b, covariance[:2, :2], quantile, form, level),
        gain=math.nan,
        end=_gain_at(float(x.max()), solution, covariance, form, len(x)),
        verdict="none",
    )
    return _judged(found, b > quantile * errors[1], quantile)


def _design(
    x: np.ndarray, y: np.ndarray, e: np.ndarray, prior: Estimate | None, form: Form
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns d, -d log d (or -d^2) and, unless the origin is fixed, 1."""
    d = np.sqrt(np.clip(x, 0.0, None))
    if prior is not None and prior.stderr > 0:
        d, y, e = np.append(d, 0.0), np.append(y, prior.value), np.append(e, prior.stderr)
    bend = -d * np.log(np.where(d > 0, d, 1.0)) if form == "rl" else -d * d
    columns = [d, bend]
    if prior is not None and prior.stderr == 0:
        return np.stack(columns, -1), y - prior.value, e
    return np.stack([*columns, np.ones_like(d)], -1), y, e


def _least_squares(design: np.ndarray, y: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Coefficients, their covariance, degrees of freedom. The points' errors hold up to a common factor, at least 1."""
    weighted, target = design / e[:, None], y / e
    if np.linalg.matrix_rank(weighted) < design.shape[1]:
        raise InputError("all points have the same KL; a curve needs points at several")
    inverse = np.linalg.inv(weighted.T @ weighted)
    solution = inverse @ weighted.T @ target
    dof = len(y) - design.shape[1]
    scatter = float(((target - weighted @ solution) ** 2).sum()) / dof
    return solution, inverse * max(1.0, scatter), dof


def _peak(a: float, b: float, covariance: np.ndarray, quantile: float, form: Form, level: float) -> Interval:
    """KL at the peak, from Fieller's set of the ratio a / b: all theta with |a - theta b| <= t * its standard error."""
    t2 = quantile**2
    (vaa, vab), (_, vbb) = covariance
    square, middle, constant = b * b - t2 * vbb, a * b - t2 * vab, a * a - t2 * vaa
    low, high = -math.inf, math.inf
    if b > 0 and square > 0:
        root = math.sqrt(max(0.0, middle * middle - square * constant))
        low, high = (middle - root) / square, (middle + root) / square
    value = _kl_of(a / b, form) if b > 0 else math.nan
    return Interval(value, _kl_of(low, form), _kl_of(high, form), level)


def _kl_of(ratio: float, form: Form) -> float:
    """d^2 at the peak as a function of a / b; it grows with the ratio, and a negative d is the prior."""
    if form == "rl":
        return math.inf if ratio > LARGEST / 2 else math.exp(2 * (ratio - 1))
    return max(0.0, ratio / 2) ** 2


def _gain_at(kl: float, solution: np.ndarray, covariance: np.ndarray, form: Form, n: int) -> Estimate:
    d = math.sqrt(kl)
    row = np.array([d, -d * (math.log(d) if form == "rl" else d)])
    return Estimate(float(row @ solution[:2]), math.sqrt(float(row @ covariance[:2, :2] @ row)), n)


def _judged(found: Overoptimisation, bent: bool, quantile: float) -> Overoptimisation:
    """What can be said of the peak; `bent`: b is positive beyond its error."""
    if not bent:
        fallen = found.end.value < -quantile * found.end.stderr
        return replace(found, verdict="falling") if fallen else found
    kl, last = found.peak.value, found.seen[1]
    if kl > last:
        return replace(found, verdict="beyond")
    gain = curve(math.sqrt(kl), found.a.value, found.b.value, found.form)
    return replace(found, gain=gain, verdict="falling" if kl < found.seen[0] else "peak")
