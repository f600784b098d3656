"""Divergence cases: setup functions and byte counts, nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

import kdkernels as kd

from . import peers
from .harness import Case, Settings, Step, Variant

TEMPERATURE = 2.0
OURS = "kdkernels"


def cases(settings: Settings) -> list[Case]:
    """All cases for the device; `quick` shrinks them to a smoke test."""
    if settings.quick:
        rows, vocabulary, head_shape = 64, 4096, (64, 64, 4096)
        kind_rows = 8
    elif settings.device == "cuda":
        rows, vocabulary, head_shape = 8192, 128256, (8192, 4096, 128256)
        kind_rows = 2048
    else:
        rows, vocabulary, head_shape = 512, 128256, (512, 1024, 32768)
        kind_rows = 128
    shape = (rows, vocabulary)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        tensor = logits_bytes(shape, dtype)
        make = functools.partial(Case, shape=shape, dtype=dtype, unit_bytes=tensor)
        bind = functools.partial(functools.partial, shape=shape, dtype=dtype, settings=settings)
        found += [
            # read student + read teacher + write gradient
            make("forward_kl loss+gradient", setup=bind(forward_kl_gradient), bytes=3 * tensor),
            # read student + read teacher
            make("forward_kl loss", setup=bind(forward_kl_value), bytes=2 * tensor),
            # read student + read teacher + write gradient
            make("jensen_shannon loss+gradient", setup=bind(jensen_shannon), bytes=3 * tensor),
        ]
    # Every kind, at fewer rows: what PyTorch needs for one of them is tens of ours.
    shape = (kind_rows, vocabulary)
    for dtype in (torch.float32, torch.bfloat16):
        tensor = logits_bytes(shape, dtype)
        found += [
            Case(
                f"kind {kind}",
                shape=shape,
                dtype=dtype,
                setup=functools.partial(kind_gradient, kind, shape, dtype, settings),
                # read student + read teacher + write gradient; entropy reads no teacher
                bytes=(2 if kind == "entropy" else 3) * tensor,
                unit_bytes=tensor,
            )
            for kind in peers.EAGER
        ]
    tiny = functools.partial(
        Case, shape=(4, 16), dtype=torch.float32, calls=50 if settings.quick else 500
    )
    found += [
        tiny("overhead forward", setup=functools.partial(overhead, False, settings)),
        tiny("overhead forward+backward", setup=functools.partial(overhead, True, settings)),
    ]
    head_dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    found.append(
        Case(
            "head forward_kl loss+gradient",
            shape=head_shape,
            dtype=head_dtype,
            setup=functools.partial(head, head_shape, head_dtype, settings),
            # bound by its four GEMMs, not by traffic: measured against the GEMMs alone
            bytes=None,
            unit_bytes=logits_bytes((head_shape[0], head_shape[2]), head_dtype),
        )
    )
    found.append(teachers_case((rows // 4 or 1, vocabulary), settings))
    return found


def logits_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of one logits tensor (N, V)."""
    return shape[0] * shape[1] * dtype.itemsize


def make_logits(
    shape: Sequence[int], dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(student, teacher), each (N, V): the teacher has std 3, the student is 1.5 away from it."""
    generator = torch.Generator(device=device).manual_seed(0)
    teacher = torch.empty(shape, dtype=dtype, device=device).normal_(0, 3, generator=generator)
    student = torch.empty(shape, dtype=dtype, device=device).normal_(0, 1.5, generator=generator)
    return student.add_(teacher).requires_grad_(), teacher


def gradient_step(
    loss: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], wanted: Sequence[int] = (0,)
) -> Step:
    """Loss and gradient of `inputs[i]` for i in `wanted`: one forward and one backward."""
    leaves = [inputs[i] for i in wanted]
    return Step(lambda: torch.autograd.grad(loss(*inputs), leaves))


def peer_variants(
    found: Sequence[peers.Peer], step: Callable[[Callable[..., torch.Tensor]], Step]
) -> list[Variant]:
    """Peers as variants; loading happens in `build`, so that one that is missing is one row."""
    return [
        Variant(peer.name, lambda peer=peer: step(peer.load()), note=peer.note) for peer in found
    ]


def forward_kl_gradient(
    shape: Sequence[int], dtype: torch.dtype, settings: Settings
) -> list[Variant]:
    """Loss and gradient, into a fresh gradient and over the student logits."""
    student, teacher = make_logits(shape, dtype, settings.device)
    ours = functools.partial(kd.divergence, kind="forward_kl", temperature=TEMPERATURE)
    state: dict[str, torch.Tensor] = {}

    def prepare_in_place() -> None:
        state.clear()
        # A leaf must not be overwritten; a copy with a history stands for a model's output.
        state["logits"] = student.clone()

    def run_in_place():
        return torch.autograd.grad(ours(state["logits"], teacher, inplace=True), state["logits"])

    half = dtype.itemsize == 2
    found = peers.forward_kl_peers(TEMPERATURE, half, not settings.quick, settings.peers)
    return [
        Variant(OURS, lambda: gradient_step(ours, (student, teacher))),
        Variant(f"{OURS}, in place", lambda: Step(run_in_place, prepare_in_place)),
        *peer_variants(found, lambda loss: gradient_step(loss, (student, teacher))),
    ]


def forward_kl_value(shape: Sequence[int], dtype: torch.dtype, settings: Settings) -> list[Variant]:
    """The loss alone: nothing requires grad."""
    student, teacher = make_logits(shape, dtype, settings.device)
    student.requires_grad_(False)
    ours = functools.partial(kd.divergence, kind="forward_kl", temperature=TEMPERATURE)
    half = dtype.itemsize == 2
    found = peers.forward_kl_peers(TEMPERATURE, half, not settings.quick, settings.peers)
    return [
        Variant(OURS, lambda: Step(lambda: ours(student, teacher))),
        *peer_variants(found, lambda loss: Step(lambda: loss(student, teacher))),
    ]


def jensen_shannon(shape: Sequence[int], dtype: torch.dtype, settings: Settings) -> list[Variant]:
    """Loss and gradient at beta 0.5."""
    student, teacher = make_logits(shape, dtype, settings.device)
    ours = functools.partial(kd.divergence, kind="jensen_shannon", temperature=TEMPERATURE)
    found = peers.jensen_shannon_peers(0.5, TEMPERATURE, not settings.quick, settings.peers)
    return [
        Variant(OURS, lambda: gradient_step(ours, (student, teacher))),
        *peer_variants(found, lambda loss: gradient_step(loss, (student, teacher))),
    ]


def kind_gradient(
    kind: str, shape: Sequence[int], dtype: torch.dtype, settings: Settings
) -> list[Variant]:
    """Loss and gradient of a kind at its default parameters, beside forward KL in the same run.

    PyTorch and third parties run in float32 alone: what they do with half logits is the same.
    """
    student, teacher = make_logits(shape, dtype, settings.device)

    def ours(kind: str) -> Step:
        given = None if kind == "entropy" else teacher
        loss = functools.partial(kd.divergence, kind=kind, temperature=TEMPERATURE)
        return Step(lambda: torch.autograd.grad(loss(student, given), student))

    found = [Variant(OURS, lambda: ours(kind))]
    if kind != "forward_kl":
        found.append(Variant(f"{OURS}, forward_kl", lambda: ours("forward_kl")))
    if dtype == torch.float32:
        others = peers.kind_peers(kind, TEMPERATURE, not settings.quick, settings.peers)
        found += peer_variants(others, lambda loss: gradient_step(loss, (student, teacher)))
    return found


def overhead(backward: bool, settings: Settings) -> list[Variant]:
    """What a call costs when there is nothing to compute."""
    student, teacher = make_logits((4, 16), torch.float32, settings.device)
    student.requires_grad_(backward)
    eager = peers.eager_forward_kl(TEMPERATURE)

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd.divergence(student, teacher, "forward_kl", temperature=TEMPERATURE)

    def step(loss: Callable[..., torch.Tensor]) -> Step:
        if backward:
            return gradient_step(loss, (student, teacher))
        return Step(lambda: loss(student, teacher))

    found = [Variant(OURS, lambda: step(ours)), Variant("eager", lambda: step(eager))]
    if not settings.quick:
        found.append(Variant("torch.compile(eager)", lambda: step(peers.compiled(eager))))
    return found


def head(shape: Sequence[int], dtype: torch.dtype, settings: Settings) -> list[Variant]:
    """Loss and both gradients from hidden states and two heads."""
    rows, width, vocabulary = shape
    generator = torch.Generator(device=settings.device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        empty = torch.empty(size, dtype=dtype, device=settings.device)
        return empty.normal_(0, scale, generator=generator)

    # Logits of standard deviation 3 on both sides.
    hidden, teacher_hidden = normal(rows, width), normal(rows, width)  # (N, H)
    weight = normal(vocabulary, width, scale=3 / width**0.5)  # (V, H)
    teacher_weight = normal(vocabulary, width, scale=3 / width**0.5)  # (V, H)
    hidden.requires_grad_()
    weight.requires_grad_()
    inputs = (hidden, weight, teacher_hidden, teacher_weight)

    def ours(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
    ) -> torch.Tensor:
        student, teacher = kd.Head(hidden, weight), kd.Head(teacher_hidden, teacher_weight)
        return kd.divergence(student, teacher, "forward_kl", temperature=TEMPERATURE)

    @torch.no_grad()
    def products() -> tuple[torch.Tensor, ...]:
        logits = F.linear(hidden, weight)
        other = F.linear(teacher_hidden, teacher_weight)
        return logits @ weight, logits.T @ hidden, other

    found = peers.head_peers(TEMPERATURE, not settings.quick, settings.peers)
    both = (0, 1)  # gradients of the hidden states and of the weight
    return [
        Variant(OURS, lambda: gradient_step(ours, inputs, both)),
        Variant("the four GEMMs alone", lambda: Step(products)),
        *peer_variants(found, lambda loss: gradient_step(loss, inputs, both)),
    ]


def teachers_case(shape: tuple[int, int], settings: Settings) -> Case:
    """Loss and gradient of the sum over 4 teachers: one pass, calls of their own, eager."""
    tensor = logits_bytes(shape, torch.float32)

    def setup() -> list[Variant]:
        student, first = make_logits(shape, torch.float32, settings.device)
        inputs = (student, [first, *(torch.randn_like(first) for _ in range(3))])
        ours = functools.partial(kd.divergence, kind="forward_kl", temperature=TEMPERATURE)
        eager = peers.eager_forward_kl(TEMPERATURE)

        def added(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            return lambda student, teachers: sum(loss(student, t) for t in teachers)

        return [
            Variant(OURS, lambda: gradient_step(ours, inputs)),
            Variant(f"{OURS}, separate calls", lambda: gradient_step(added(ours), inputs)),
            Variant("eager", lambda: gradient_step(added(eager), inputs)),
        ]

    # read student and teachers + write gradient
    name = "forward_kl of 4 teachers"
    return Case(name, shape, torch.float32, setup, bytes=6 * tensor, unit_bytes=tensor)
