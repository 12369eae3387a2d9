"""Draws the figure of docs/method.md: `.venv/bin/python docs/figures/method.py` writes docs/figures/method.png.

A sample is a single number here, so that the level of noise can be the other axis. No point is placed by hand: the data are a
mixture of two normal distributions, teacher, student and fake score are exact velocities of such mixtures (the student's and
the fake score's are wrong on purpose), and all points and arrows are computed with the functions that training uses.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cdm_lightning.core.flow import FunctionField, VelocityField, interpolate, predict_x0
from cdm_lightning.core.rollout import Trajectory, TrajectoryPoint, simulate

TEXT, NO_TEXT = (
    ((0.8, 1.0, 0.18),),
    ((0.5, 1.0, 0.18), (0.5, -1.0, 0.18)),
)  # mixtures: (share, mean, standard deviation)
STUDENT, FAKE_SCORE = ((0.5, 0.78, 0.1), (0.5, -0.85, 0.1)), ((1.0, 0.1, 0.3),)
NOISE = 0.75  # the start of the path
SIGMAS = (1.0, 0.86, 0.7, 0.54, 0.38, 0.18, 0.0)
ANCHOR = 2  # the step of the path that the losses use
TARGET = 0.24  # s', the sigma of the extrapolated point
FRESH_NOISE, LEVEL = -0.9, 0.5  # with which a prediction is noised again, and the sigma t to which it is noised
GUIDANCE = 0.5

INK, GREY, PAPER = "#1b1f24", "#8a939c", "#ffffff"  # the paper is opaque, so the figure reads the same in a dark page
CA, DM, CDM = "#b35900", "#0b6e4f", "#7b2d8b"


def mixture(parts: tuple[tuple[float, float, float], ...]) -> VelocityField:
    """Return the exact velocity E[noise - x0 | x] of the flow between noise and a mixture of normal distributions."""
    share, mean, width = torch.tensor(parts).T.reshape(3, -1, 1, 1, 1, 1)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1)
        variance = (1 - s) ** 2 * width**2 + s**2
        offset = x - (1 - s) * mean
        weights = (share.log() - variance.log() / 2 - offset.square() / (2 * variance)).softmax(dim=0)
        return (weights * ((s - (1 - s) * width**2) / variance * offset - mean)).sum(dim=0)

    return FunctionField(velocity)


@dataclass(frozen=True)
class Term:
    """What teacher and fake score say of one prediction of the student. All are numbers (1, 1, 1, 1)."""

    x0: Tensor  # the student's prediction
    noised: Tensor  # the prediction, noised again to sigma t
    teacher: Tensor  # T(c)
    teacher_without_text: Tensor  # T(0)
    fake_score: Tensor  # F(c)

    @property
    def matching(self) -> Tensor:
        """The direction T(c) - F(c) of DM, and of the CDM term at its own point."""
        return self.teacher - self.fake_score

    @property
    def guidance(self) -> Tensor:
        """The direction g (T(c) - T(0)) of CA."""
        return GUIDANCE * (self.teacher - self.teacher_without_text)


@dataclass(frozen=True)
class Scene:
    """Everything that the figure shows."""

    path: Trajectory
    anchor: TrajectoryPoint
    extrapolated: Tensor  # (1, 1, 1, 1)
    at_anchor: Term
    off_trajectory: Term


def scene() -> Scene:
    """Compute the path, its anchor, the extrapolated point, and the directions at both."""
    student, teacher, teacher_uncond, fake_score = map(mixture, (STUDENT, TEXT, NO_TEXT, FAKE_SCORE))
    path = simulate(student, latent(NOISE), torch.tensor([SIGMAS]))
    anchor = path.at(torch.tensor([ANCHOR]))
    target, level = torch.tensor([TARGET]), torch.tensor([LEVEL])
    extrapolated = anchor.move_to(target)
    terms = []
    for x0 in (anchor.x0, predict_x0(student, extrapolated, target)):
        noised = interpolate(x0, latent(FRESH_NOISE), level)
        seen = [predict_x0(field, noised, level) for field in (teacher, teacher_uncond, fake_score)]
        terms.append(Term(x0, noised, *seen))
    return Scene(path, anchor, extrapolated, *terms)


def latent(number: float) -> Tensor:
    """Return a number as a latent (1, 1, 1, 1)."""
    return torch.full((1, 1, 1, 1), number)


def draw(made: Scene) -> Figure:
    """Draw the path with its points on the left, and how a prediction is judged on the right."""
    figure = Figure(figsize=(11, 4.9), dpi=110, facecolor=PAPER, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1))
    draw_path(left, made)
    draw_judgement(right, made.at_anchor)
    for axes in (left, right):
        axes.set_facecolor(PAPER)
        axes.set(xlim=(1.06, -0.3), ylim=(-1.35, 1.5), xticks=(1, 0.5, 0), yticks=())
        axes.set_xticklabels(("sigma 1\nnoise", "0.5", "sigma 0\nimage"), color=INK)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return figure


def draw_path(axes: Axes, made: Scene) -> None:
    """Draw the student's path, its anchor, the extrapolated point, and the directions of the three terms."""
    density(axes)
    sigmas, states = [*SIGMAS], [*made.path.x.flatten().tolist(), made.path.final.item()]
    axes.plot(sigmas, states, color=INK, lw=1.8, marker="o", ms=4.5)
    x, x0, x0_off = (float(value) for value in (made.anchor.x, made.at_anchor.x0, made.off_trajectory.x0))
    sigma, extrapolated = SIGMAS[ANCHOR], float(made.extrapolated)
    axes.plot([sigma, 0], [x, x0], color=GREY, ls="--", lw=1.3, zorder=1)
    axes.plot([TARGET, 0], [extrapolated, x0_off], color=GREY, ls="--", lw=1.3, zorder=1)
    axes.plot(sigma, x, "o", mfc=PAPER, mec=INK, mew=1.8, ms=11)
    axes.plot(TARGET, extrapolated, "D", mfc=PAPER, mec=CDM, mew=1.8, ms=9)
    axes.plot(0, x0, "s", color=INK, ms=7)
    axes.plot(0, x0_off, "s", color=CDM, ms=7)
    arrow(axes, -0.05, x0, float(made.at_anchor.matching), DM, "DM")
    arrow(axes, -0.12, x0, float(made.at_anchor.guidance), CA, "CA")
    arrow(axes, -0.21, x0_off, float(made.off_trajectory.matching), CDM, "CDM")
    axes.plot([0, -0.21], [x0_off, x0_off], color=CDM, ls=":", lw=1)
    axes.plot([0, -0.12], [x0, x0], color=INK, ls=":", lw=1)
    note(axes, "the student's path\n(its own steps, no gradient)", (0.93, 0.63), (1.04, 1.2), INK)
    note(axes, "anchor $x_i$ at sigma $s_i$", (sigma + 0.015, x - 0.07), (0.95, -0.15), INK)
    note(
        axes,
        "extrapolated point, at any $s'$:\n$x_i + (s' - s_i)\\,v_i$",
        (TARGET, extrapolated - 0.07),
        (0.72, -0.6),
        CDM,
    )
    note(axes, "prediction at the anchor:\n$x_i - s_i\\,v_i$", (0.01, x0 - 0.05), (0.2, -1.0), INK)
    axes.set_title("Where the student is trained", color=INK, fontsize=12)


def draw_judgement(axes: Axes, term: Term) -> None:
    """Draw how one prediction is noised again, and what teacher and fake score make of it."""
    density(axes)
    x0, noised = float(term.x0), float(term.noised)
    teacher, without_text, fake = (float(v) for v in (term.teacher, term.teacher_without_text, term.fake_score))
    axes.plot([0, LEVEL], [x0, noised], color=GREY, ls="-", lw=1.3)
    for value in (teacher, without_text, fake):
        axes.plot([LEVEL, 0], [noised, value], color=GREY, ls="--", lw=1.3)
    axes.plot(0, x0, "s", color=INK, ms=7)
    axes.plot(LEVEL, noised, "o", mfc=PAPER, mec=INK, mew=1.8, ms=9)
    axes.plot([0] * 3, [teacher, without_text, fake], "o", color=INK, ms=5)
    for value, name, up in ((teacher, "$T(c)$", 0.07), (without_text, "$T(0)$", -0.14), (fake, "$F(c)$", -0.16)):
        axes.text(0.03, value + up, name, color=INK, ha="right", fontsize=11)
    arrow(axes, -0.05, fake, teacher - fake, DM, "DM", 1.0)
    arrow(axes, -0.15, without_text, teacher - without_text, CA, "CA", GUIDANCE)
    note(axes, "the student's prediction", (0.02, x0 + 0.02), (0.62, 0.75), INK)
    note(axes, "noised again,\nto a random sigma $t$", (LEVEL + 0.02, noised - 0.06), (0.98, -1.05), INK)
    axes.set_title("In which direction its prediction is moved", color=INK, fontsize=12)


def density(axes: Axes) -> None:
    """Shade where the images of the prompt are, at the right edge."""
    (_, mean, width), *_ = TEXT
    levels = torch.linspace(mean - 4 * width, mean + 4 * width, 100)
    height = 0.09 * (-(levels - mean).square() / (2 * width**2)).exp()
    axes.fill_betweenx(levels, -0.3, -0.3 + height, color="#cfe3f5", lw=0)
    axes.text(-0.29, mean + 3.4 * width * 0.75, "data", color=INK, ha="right", fontsize=9)


def arrow(axes: Axes, sigma: float, start: float, length: float, colour: str, name: str, share: float = 0.45) -> None:
    """Draw `share` of a direction as an arrow from `start`."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 2.2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    axes.annotate("", (sigma, start + share * length), (sigma, start), arrowprops=style)
    axes.text(sigma, start + share * length + 0.05, name, color=colour, ha="center", fontsize=11, weight="bold")


def note(axes: Axes, text: str, at: tuple[float, float], where: tuple[float, float], colour: str) -> None:
    """Write `text` at `where`, with a thin line to `at`."""
    style = {"arrowstyle": "-", "color": GREY, "lw": 0.8}
    axes.annotate(text, at, where, color=colour, fontsize=10, ha="left", va="center", arrowprops=style)


def main() -> None:
    """Write the figure beside this file."""
    draw(scene()).savefig(Path(__file__).with_suffix(".png"), metadata={"Software": None})


if __name__ == "__main__":
    main()
