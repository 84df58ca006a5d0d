"""Does a model remember some images, and did unlearning end that? Decided from denoising losses alone, without a retrained model.

The question needs a reference: the loss that the forgotten images would have if no model had seen them. Other images are no such
reference if the forgotten ones are of another kind: a T-shirt that a model of digits never saw has four times a digit's loss. So
each image is also compared with itself turned upside down, which has the same pixels and which no model was trained on. Other
images, held out or remaining, say how much easier an upright image is by nature, and how much that varies.

l_ij is the loss of image i under draw j of timestep and noise before unlearning, l'_ij after it under the same draws; l~_ij and
l~'_ij are those of its turned copy. L_i, L'_i, L~_i and L~'_i are means over j. F are the forgotten images, R the remaining ones,
and C those that F is compared with: held-out images if there are at least `FEWEST`, else R. |F| is a number of images, mean_F a
mean over them. Images whose turned copy is nearly themselves are left out of F and C in (1) to (5).

    (1)  c_i  =  log L_i - b log L~_i                over C: mean m, standard deviation tau
    (2)  u_i  =  exp(m) L~_i^b                       the loss of image i if it were unseen
    (3)  g    =  mean_F log(L_i / u_i)               below 0: easier than unseen
         g'   =  mean_F log(L'_i / u_i) - min(0, mean_R log(L'_i / L_i), b mean_F log(L~'_i / L~_i))
    (4)  s^2  =  tau^2 (1/E + 1/|C|) + e^2           E = |F| if F is a random part of the data, else 1
    (5)  h^2  =  tau^2 (1 + 1/|C|) + e^2             the spread of single images, which is what an attacker sees
    (6)  D    =  mean_F log(L'_i / L_i) - mean_R log(L'_i / L_i)
    (7)  d^2  =  rho^2 (1/|F| + 1/|R|) + e_d^2       rho: the standard deviation over R of log(L'_i / L_i)

b is 0, which leaves the turned copies out, if F is of the kind of C and tau is smaller then; else 1. F is of that kind if
mean_F log L~_i lies within z standard deviations of C's: turned copies were not trained on, so this says nothing of memory.

Upright images are easier than turned ones only to a model that knows their kind. If F is of another kind than C, memory hides how
well the model would know that. C's images turned by a quarter are of a kind that it does not know: m_0 and tau_0 are what (1)
gives for them (0 and tau if they cannot be turned: they are not square, or fewer than `FEWEST` differ from their copies). F lies
between the two, anywhere with equal chances, so that m and tau become the mean and the spread of that:

    (8)  m  <-  (m + m_0) / 2        tau^2  <-  (tau^2 + tau_0^2) / 2 + (m - m_0)^2 / 12

E is 1 for a group of one kind, because its images may all be harder or easier than C for one reason, which more of them do not
make smaller. e and e_d are the noise of the draws in the means over F; with g', e is that after unlearning. The minimum in g' is
there because a model that is trained longer gets better at unseen images too; one that got worse is measured by what it was. A
model that remembers an unusual image is also worse at its turned copies than one that never saw it, and gets better at them as
it forgets: a retrained model of real digits by 40%. With z, the quantile of Student's t for |C| images (for |R| with d), the
first that holds is said:

    remembered before    g < -z s                                     clearly easier than unseen images
    unknown              |R| < `FEWEST`                               too few to compare the change with
    unchanged            g' < -z s                                    still remembered
    unchanged            D < z d, its noise                           not moved; unknown if R's losses rose by more than `MARGIN`
    unknown              no reference, or not remembered before       nothing of use to compare it with
                         and z s > log `WIDEST`
    unknown              D < s                                        moved by less than the reference can resolve
    singled out          g' > z h                                     rose far above unseen images: it now stands out
    forgotten            otherwise                                    rose to the level of unseen images

Remaining images are damaged if their losses rose by more than `MARGIN`, and kept if not, each beyond the noise over R. Without
held-out images C was trained on as well, so that "unseen" means: no better known than other training images.
"""

from dataclasses import dataclass

import numpy as np

from retrack_jax.checks import figures

# The probability of a false alarm on each side of a comparison. A sweep of tens of runs asks tens of questions: 5% is too much.
FALSE_ALARM = 0.01
# With fewer comparison images the spread tau is itself a guess: of 8 images it is known to a factor of about 1.3.
FEWEST = 8
# A reference that spans more than this factor each way is of no use: memorized images lie below it by factors of 2 to 10.
WIDEST = 2.0
# Models that were trained from other seeds differ by less on the digits, and this is far below what is seen in samples there.
MARGIN = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Losses:
    """Losses of N images: the forgotten ones first, then the remaining ones, then those held out, if any.

    Attributes:
      names: of the forgotten images that were measured.
      num_forgotten: how many distinct images are forgotten in all.
      num_remaining: how many of the N are remaining images.
      before: float64 `[N, n]`, of the model before unlearning under n draws, ordered by timestep; turned: of turned copies.
      usable: bool `[N]`, whether the turned copy differs enough from the image.
      is_random: whether the forgotten images are a random part of the data.
      sideways: the losses before unlearning of other images turned by a quarter, float64 `[M, n]`, and of their turned copies.
    """

    names: list[str]
    num_forgotten: int
    num_remaining: int
    before: np.ndarray
    turned: np.ndarray
    usable: np.ndarray
    is_random: bool
    sideways: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def forgotten(self) -> slice:
        return slice(len(self.names))

    @property
    def remaining(self) -> slice:
        return slice(len(self.names), len(self.names) + self.num_remaining)

    @property
    def compared(self) -> slice:
        held_out = slice(len(self.names) + self.num_remaining, len(self.before))
        return held_out if self.usable[held_out].sum() >= FEWEST else self.remaining


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What the losses before unlearning say.

    Attributes:
      remembered: whether the forgotten images are remembered; None: it cannot be told, and `why` says why.
      loss, unseen: the mean loss of the forgotten images, and the geometric mean of what it would be if they were unseen; NaN: it
        is not known.
      spread: s of equation 4; z: the quantile.
      group, single: s and h without the noise of the losses of F.
      b: whether turned copies are part of it, 1 or 0.
      same_kind: whether F is of the kind of C.
      others: the mean loss of the comparison images.
    """

    remembered: bool | None
    loss: float
    unseen: float = float("nan")
    spread: float = 0.0
    z: float = 0.0
    group: float = 0.0
    single: float = 0.0
    b: float = 0.0
    same_kind: bool = True
    others: str = ""
    why: str = ""

    @property
    def has_reference(self) -> bool:
        return not np.isnan(self.unseen)


def memory(losses: Losses) -> Memory:
    """Returns whether the model before unlearning remembers the forgotten images (equations 1 to 5)."""
    mine, turned = losses.before[losses.forgotten], losses.turned[losses.forgotten]
    loss = float(mine.mean())
    usable_mine, usable = losses.usable[losses.forgotten], losses.usable[losses.compared]
    if usable.sum() < FEWEST:
        few = f"only {int(usable.sum())} other images to compare with, and it takes {FEWEST}"
        return Memory(remembered=None, loss=loss, why=few)
    if not usable_mine.any():
        same = "the forgotten images look the same upside down, so there is nothing to compare them with"
        return Memory(remembered=None, loss=loss, why=same)
    compared, copies = losses.before[losses.compared][usable], losses.turned[losses.compared][usable]
    mine, turned = mine[usable_mine], turned[usable_mine]
    z = _quantile(len(compared))
    plain, of_copies, of_turned = _log_means(compared), _log_means(copies), _log_means(turned).mean()
    same_kind = abs(of_turned - of_copies.mean()) < z * of_copies.std(ddof=1)
    b = 0.0 if same_kind and plain.std() < (plain - of_copies).std() else 1.0
    m, tau = _mean_and_deviation(plain - b * of_copies)
    if not same_kind:
        m_0, tau_0 = 0.0, tau
        if losses.sideways is not None:
            m_0, tau_0 = _mean_and_deviation(np.subtract(*map(_log_means, losses.sideways)))
        m, tau = (m + m_0) / 2, np.sqrt((tau**2 + tau_0**2) / 2 + (m - m_0) ** 2 / 12)
    log_unseen = m + b * of_turned
    share = 1 / len(mine) if losses.is_random else 1.0
    group, single = (float(np.hypot(tau * np.sqrt(each + 1 / len(compared)), b * _log_noise(turned))) for each in (share, 1.0))
    spread = float(np.hypot(group, _log_noise(mine)))
    remembered, why = bool(_log_means(mine).mean() - log_unseen < -z * spread), ""
    if not remembered and z * spread > np.log(WIDEST):
        remembered, why = None, f"unseen images differ too much, by a factor of {np.exp(z * spread):.1f} each way"
    others = compared.mean(axis=1)
    return Memory(
        remembered=remembered,
        loss=loss,
        unseen=float(np.exp(log_unseen)),
        spread=spread,
        z=z,
        group=group,
        single=single,
        b=b,
        same_kind=bool(same_kind),
        others=f"{figures(others.mean())} +- {figures(others.std(ddof=1))}",
        why=why,
    )


def verdict(losses: Losses, after: np.ndarray, turned: np.ndarray) -> dict:
    """Returns the `verdict` of metrics.json (the module's docstring has the rule).

    Args:
      losses: before unlearning.
      after: float64 `[N, n]`, after unlearning, of the same images under the same draws.
      turned: float64 `[F, n]`, after unlearning, of the forgotten images' turned copies.

    Returns:
      {"forgotten": "unchanged" | "forgotten" | "singled out" | "unknown", "kept": "kept" | "damaged" | "unknown",
      "remembered_before": true | false | null, "why": one line, "files": [{"name", "before", "after", "noise"}]}; the losses of a
      file are means over the draws of sums over pixels, and `noise` is the standard error of their difference.
    """
    known = memory(losses)
    forgotten, reason = _forgotten(losses, after, turned, known)
    kept, change = _kept(losses.before[losses.remaining], after[losses.remaining])
    mine, now = losses.before[losses.forgotten], after[losses.forgotten]
    errors = np.sqrt(_draw_variance(now - mine))
    rows = zip(losses.names, mine.mean(axis=1), now.mean(axis=1), errors, strict=True)
    return {
        "forgotten": forgotten,
        "kept": kept,
        "remembered_before": known.remembered,
        "why": f"{before_in_words(losses, known)}; {reason}; {change}",
        "files": [
            {"name": name, "before": round(float(b), 4), "after": round(float(a), 4), "noise": round(float(e), 4)}
            for name, b, a, e in rows
        ],
    }


def unknown(why: str) -> dict:
    """Returns the verdict of a run whose losses could not be measured."""
    return {"forgotten": "unknown", "kept": "unknown", "remembered_before": None, "why": why, "files": []}


def before_in_words(losses: Losses, known: Memory) -> str:
    """Returns a line on what the model before unlearning knows, with its numbers."""
    count = losses.num_forgotten
    these = "this image" if count == 1 else f"these {count} images"
    if len(losses.names) < count:
        these += f" ({len(losses.names)} measured)"
    level = f"loss {figures(known.loss)}"
    if known.has_reference:
        low, high = (known.unseen * np.exp(sign * known.z * known.group) for sign in (-1, 1))
        level += f", unseen {'one' if count == 1 else 'ones'} like {'it' if count == 1 else 'them'}"
        level += f" {figures(known.unseen)} ({figures(low)} to {figures(high)}), others {known.others}"
    if known.remembered is None:
        return f"whether the model remembers {these} cannot be told ({known.why}): {level}"
    if known.remembered:
        return f"before, the model remembers {these}: {level}"
    return f"before, the model shows no sign of remembering {these}: {level}"


def _forgotten(losses: Losses, after: np.ndarray, turned: np.ndarray, known: Memory) -> tuple[str, str]:
    """Returns the verdict on the forgotten images, and the reason."""
    changes = np.log(after.mean(axis=1) / losses.before.mean(axis=1))
    mine, others = changes[losses.forgotten], changes[losses.remaining]
    now = after[losses.forgotten]
    moved_to = f"after, loss {figures(now.mean())}"
    if len(others) < FEWEST:
        return "unknown", f"{moved_to}, with only {len(others)} remaining images to compare the change with"
    change = float(mine.mean() - others.mean())
    noise = _log_noise(now, losses.before[losses.forgotten])
    error = float(np.sqrt(others.var(ddof=1) * (1 / len(mine) + 1 / len(others)) + noise**2))
    limit = _quantile(len(others)) * error
    if known.has_reference:
        usable = losses.usable[losses.forgotten]
        now, copies = now[usable], _log_means(turned[usable]) - _log_means(losses.turned[losses.forgotten][usable])
        unseen_now = known.unseen * np.exp(min(0.0, others.mean(), known.b * copies.mean()))
        if figures(unseen_now) != figures(known.unseen):
            moved_to += f", unseen {figures(unseen_now)} by now"
        gap = float(_log_means(now).mean() - np.log(unseen_now))
        now_noise = _log_noise(now)
        if gap < -known.z * np.hypot(known.group, now_noise):
            return "unchanged", f"{moved_to}, still below unseen images"
    if not change > limit:
        if others.mean() > np.log1p(MARGIN):
            return "unknown", f"{moved_to}, and the losses of all other images rose as much"
        return "unchanged", f"{moved_to}, no rise beyond the noise"
    if known.remembered is None:
        return "unknown", f"{moved_to}, and {known.why}"
    if not change > known.spread:
        return "unknown", f"{moved_to}, too small a rise to tell from how images differ"
    if gap > known.z * np.hypot(known.single, now_noise):
        return "singled out", f"{moved_to}, {np.exp(gap):.1f} times that of unseen images"
    return "forgotten", f"{moved_to}, as unseen images have"


def _kept(before: np.ndarray, after: np.ndarray) -> tuple[str, str]:
    """Returns the verdict on the remaining images, and the reason."""
    if len(before) < FEWEST:
        return "unknown", f"only {len(before)} remaining images were measured"
    changes = np.log(after.mean(axis=1) / before.mean(axis=1))
    mean, limit = changes.mean(), _quantile(len(changes)) * changes.std(ddof=1) / np.sqrt(len(changes))
    change = f"{100 * np.expm1(mean):+.1f} +- {100 * limit:.1f}%" if mean < 1 else f"{np.exp(mean):.1f} times"
    numbers = f"remaining images {figures(before.mean())} -> {figures(after.mean())} ({change})"
    if mean - limit > np.log1p(MARGIN):
        return "damaged", numbers
    return "kept" if mean + limit < np.log1p(MARGIN) else "unknown", numbers


def _quantile(count: int) -> float:
    from scipy.stats import t as student

    return float(student.ppf(1 - FALSE_ALARM, count - 1))


def _log_means(values: np.ndarray) -> np.ndarray:
    """Returns log L_i, `[N]`, of losses `[N, n]`."""
    return np.log(values.mean(axis=1))


def _mean_and_deviation(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1))


def _draw_variance(values: np.ndarray) -> np.ndarray:
    """Returns the variance of each row's mean, `[N]`, of draws `[N, n]` that are ordered by timestep.

    Each draw takes its timestep from a part of the schedule, so the differences between parts are no noise. Neighboring draws are
    taken for two of one part:

        var  =  sum over pairs of (v_2k - v_2k+1)^2  /  n^2
    """
    n = values.shape[1]
    pairs = values[:, : n - n % 2].reshape(len(values), -1, 2)
    return np.square(pairs[..., 0] - pairs[..., 1]).sum(axis=1) / n**2


def _log_noise(now: np.ndarray, before: np.ndarray | None = None) -> float:
    """Returns the noise of mean_i log(L_i), or of mean_i log(L'_i / L_i), that comes from the draws."""
    values = now / now.mean(axis=1, keepdims=True)
    if before is not None:
        values = values - before / before.mean(axis=1, keepdims=True)
    return float(np.sqrt(_draw_variance(values).sum()) / len(values))
