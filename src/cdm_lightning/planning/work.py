"""Network calls, floating-point operations and hours of a run. Plain arithmetic."""

from dataclasses import dataclass

PEAK_TFLOPS = 989.0  # of an H100 or H200 in bfloat16 without sparsity, by NVIDIA's data sheet
UTILISATION = 0.4  # share of it that is reached; an assumption


@dataclass(frozen=True)
class Work:
    """What one sample costs in an iteration, on average: student's calls of a rollout, operations by part."""

    rollout_calls: float
    rollout: float
    fake_score: float
    student: float

    @property
    def total(self) -> float:
        """Floating-point operations of a sample in an iteration."""
        return self.rollout + self.fake_score + self.student


def expected_calls(mean_length: float, full: bool) -> float:
    """Student's calls of a rollout of K steps: K, or where it stops at an anchor uniform on 1..K, (K + 1) / 2 on average."""
    return mean_length if full else (mean_length + 1) / 2


def work_of(
    calls: float, call: float, fake_score: float, student: float, fake_score_steps: int, student_every: int
) -> Work:
    """The work of an average iteration: `call`, `fake_score` and `student` are operations of one call or update."""
    return Work(calls, calls * call, fake_score_steps * fake_score, student / student_every)


def hours(flops: float, batch: int, iterations: int, peak_tflops: float, utilisation: float) -> float:
    """Hours of a run in which each GPU does `flops` for each of `batch` samples in each iteration."""
    return iterations * batch * flops / (peak_tflops * 1e12 * utilisation) / 3600
