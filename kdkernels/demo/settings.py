"""Sizes of the demo: what is trained, how long, on which kind of device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

VOCABULARY = 32_000
LABELS, EAGER, KERNELS, TEACHER = "labels", "eager", "kdkernels", "teacher"
VARIANTS = (LABELS, EAGER, KERNELS)
TITLES = {
    LABELS: "labels only",
    EAGER: "eager KL",
    KERNELS: "kdkernels KL",
    TEACHER: "teacher",
}


@dataclass(frozen=True)
class Setting:
    """One size of the demo. A step is `batch` sequences of `length` rows each."""

    batch: int
    length: int
    steps: int  # of every student
    teacher_steps: int
    student_width: int
    student_layers: int
    teacher_width: int
    teacher_layers: int
    validation_blocks: int
    text_bytes: int | None  # None: all of it
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    vocabulary: int = VOCABULARY

    def to_dict(self) -> dict:
        return asdict(self)


def choose_setting(device: str, smoke: bool) -> Setting:
    """The setting of a device kind, "cpu" or "cuda"."""
    if device == "cpu" and smoke:
        return Setting(2, 128, 55, 50, 64, 1, 96, 2, 16, 3_000_000)
    if device == "cpu":
        return Setting(4, 128, 120, 150, 128, 2, 192, 2, 48, None)
    if smoke:
        return Setting(8, 256, 100, 150, 128, 2, 256, 4, 32, None)
    return Setting(16, 512, 500, 1000, 256, 4, 512, 6, 64, None)
