"""The peers, as installed: each becomes a function of logits or of hidden states with one meaning.

Every loss here is the mean over rows of the divergence at temperature tau, without a factor tau^2.
Where a peer's own convention differs, the correction is one scalar multiplication, or its note says
what stays different. No code of a peer stands here: it is imported, or executed from its own file.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from .harness import MissingPeerError

LogitsLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # student, teacher (N, V) -> ()
# student hidden (N, H), student weight (V, H), teacher hidden (N, H), teacher weight (V, H) -> ()
HeadLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A name for the table, a loader that may raise MissingPeerError, what differs from ours."""

    name: str
    load: Callable[[], Callable[..., torch.Tensor]]
    note: str = ""
    third_party: bool = True
    value_is_comparable: bool = True


# PyTorch ------------------------------------------------------------------------------------------


def eager_forward_kl(temperature: float, upcast: bool = False) -> LogitsLoss:
    """What one writes by hand; `upcast` first makes half logits float32."""

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        # In one expression, so that no copy outlives its use: the peer at its best.
        log_q = F.log_softmax((student.float() if upcast else student) / temperature, dim=-1)
        log_p = F.log_softmax((teacher.float() if upcast else teacher) / temperature, dim=-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    return loss


def _kl(log_x: torch.Tensor, log_y: torch.Tensor) -> torch.Tensor:
    return (log_x.exp() * (log_x - log_y)).sum(-1)


def _mixture(log_p: torch.Tensor, log_q: torch.Tensor, weight: float) -> torch.Tensor:
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def _overlap(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (0.5 * (log_p + log_q)).exp().sum(-1)


def _jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    log_m = _mixture(log_p, log_q, 0.5)
    return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


def _relative_square(log_p: torch.Tensor, log_q: torch.Tensor, symmetric: bool) -> torch.Tensor:
    p, q = log_p.exp(), log_q.exp()
    return ((p - q).square() / (p + q if symmetric else q)).sum(-1)


# Every kind of kd.divergence at its default parameters, as its formula says: row values from
# log-probabilities of teacher and student (N, V).
EAGER: dict[str, LogitsLoss] = {
    "forward_kl": _kl,
    "reverse_kl": lambda log_p, log_q: _kl(log_q, log_p),
    "cross_entropy": lambda log_p, log_q: -(log_p.exp() * log_q).sum(-1),
    "jeffreys": lambda log_p, log_q: _kl(log_p, log_q) + _kl(log_q, log_p),
    "entropy": lambda log_p, log_q: -(log_q.exp() * log_q).sum(-1),
    "jensen_shannon": _jensen_shannon,
    "skew_forward_kl": lambda log_p, log_q: _kl(log_p, _mixture(log_p, log_q, 0.1)),
    "skew_reverse_kl": lambda log_p, log_q: _kl(log_q, _mixture(log_p, log_q, 0.9)),
    "total_variation": lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1),
    "hellinger": lambda log_p, log_q: (1 - _overlap(log_p, log_q)).sqrt(),
    "squared_hellinger": lambda log_p, log_q: 1 - _overlap(log_p, log_q),
    "bhattacharyya": lambda log_p, log_q: -_overlap(log_p, log_q).log(),
    "alpha": lambda log_p, log_q: 4 * (1 - _overlap(log_p, log_q)),
    "renyi": lambda log_p, log_q: -2 * _overlap(log_p, log_q).log(),
    "alpha_beta": lambda log_p, log_q: 4 * (1 - _overlap(log_p, log_q)),
    "triangular": lambda log_p, log_q: _relative_square(log_p, log_q, symmetric=True),
    "chi_squared": lambda log_p, log_q: _relative_square(log_p, log_q, symmetric=False),
}


def eager_kind(kind: str, temperature: float) -> LogitsLoss:
    """The formula of a kind, written out in PyTorch."""
    rows = EAGER[kind]

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        log_q = F.log_softmax(student / temperature, dim=-1)
        return rows(F.log_softmax(teacher / temperature, dim=-1), log_q).mean()

    return loss


def eager_head_forward_kl(temperature: float) -> HeadLoss:
    """Both heads' logits whole, then the hand-written loss in float32."""
    loss = eager_forward_kl(temperature, upcast=True)

    def head_loss(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
    ) -> torch.Tensor:
        return loss(F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight))

    return head_loss


def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.compile for one static shape, the form in which it is fastest."""
    return torch.compile(function, dynamic=False)


# Loading third parties ----------------------------------------------------------------------------


def import_peer(name: str) -> ModuleType:
    """An installed module; MissingPeerError with the reason where it cannot be imported."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:  # optional dependencies of peers fail in many ways
        raise MissingPeerError(f"{name}: {type(error).__name__}: {error}") from error


def peer_file(package: str, relative: str) -> Path:
    """A source file of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPeerError(f"{package} is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / relative
    if not path.is_file():
        raise MissingPeerError(f"{package} is installed without {relative}")
    return path


def load_module_file(package: str, relative: str) -> ModuleType:
    """One file of a package as a module, without the imports of its parents."""
    path = peer_file(package, relative)
    spec = importlib.util.spec_from_file_location(f"_peer_{package}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_function(package: str, relative: str, qualified_name: str) -> Callable[..., torch.Tensor]:
    """One static method out of an installed file, for files whose imports need a whole trainer."""
    path = peer_file(package, relative)
    scope = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for part in qualified_name.split("."):
        found = [node for node in scope.body if getattr(node, "name", None) == part]
        if not found:
            raise MissingPeerError(f"{package}/{relative} has no {qualified_name}")
        scope = found[0]
    scope.decorator_list = []
    module = ast.Module(body=[scope], type_ignores=[])
    namespace = {"torch": torch, "F": F}
    exec(compile(module, str(path), "exec"), namespace)
    return namespace[scope.name]


# Losses of logits ---------------------------------------------------------------------------------


def trl_jsd(beta: float, temperature: float) -> LogitsLoss:
    """TRL: GKDTrainer.generalized_jsd_loss; its own divisor argument gives the mean over rows."""
    function = load_function(
        "trl", "experimental/gkd/gkd_trainer.py", "GKDTrainer.generalized_jsd_loss"
    )

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        rows = student.shape[0]
        return function(
            student, teacher, beta=beta, temperature=temperature, num_items_in_batch=rows
        )

    return loss


def torchtune_forward_kl(chunks: int = 0) -> LogitsLoss:
    """torchtune: ForwardKLLoss, or its chunked form. It has no temperature."""
    module = load_module_file("torchtune", "modules/loss/kd_losses.py")
    if chunks:
        chunked = module.ForwardKLWithChunkedOutputLoss(num_output_chunks=chunks)

        def chunked_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            labels = torch.zeros(student.shape[0], dtype=torch.long, device=student.device)
            # The chunked form splits dimension 1 of [batch, tokens]; one batch holds all rows.
            return chunked(
                list(student.unsqueeze(0).chunk(chunks, dim=1)),
                list(teacher.unsqueeze(0).chunk(chunks, dim=1)),
                labels.unsqueeze(0),
            )

        return chunked_loss
    whole = module.ForwardKLLoss()

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(student.shape[0], dtype=torch.long, device=student.device)
        return whole(student, teacher, labels)

    return loss


def torchtune_kl(name: str, factor: float = 1.0) -> LogitsLoss:
    """torchtune: one of its unchunked losses, times `factor`. None has a temperature."""
    whole = getattr(load_module_file("torchtune", "modules/loss/kd_losses.py"), name)()

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(student.shape[0], dtype=torch.long, device=student.device)
        return factor * whole(student, teacher, labels)

    return loss


def liger_total_variation(temperature: float) -> LogitsLoss:
    """Liger-Kernel: LigerTVDLoss takes probabilities, so two softmax stand before it."""
    _require_cuda("Liger-Kernel's Triton kernels")
    criterion = import_peer("liger_kernel.transformers").LigerTVDLoss()

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return criterion(
            F.softmax(student / temperature, dim=-1), F.softmax(teacher / temperature, dim=-1)
        )

    return loss


def liger_jsd(beta: float, temperature: float) -> LogitsLoss:
    """Liger-Kernel: LigerJSD takes log-probabilities, so two log_softmax stand before it."""
    _require_cuda("Liger-Kernel's Triton kernels")
    module = import_peer("liger_kernel.transformers")
    criterion = module.LigerJSD(beta=beta)

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return criterion(
            F.log_softmax(student / temperature, dim=-1),
            F.log_softmax(teacher / temperature, dim=-1),
        )

    return loss


def liger_forward_kl(temperature: float) -> LogitsLoss:
    """Liger-Kernel: LigerKLDIVLoss over log-probabilities on both sides."""
    _require_cuda("Liger-Kernel's Triton kernels")
    module = import_peer("liger_kernel.transformers")
    criterion = module.LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return criterion(
            F.log_softmax(student / temperature, dim=-1),
            F.log_softmax(teacher / temperature, dim=-1),
        )

    return loss


def _require_cuda(what: str) -> None:
    if not torch.cuda.is_available():
        raise MissingPeerError(f"{what} need a GPU")


def forward_kl_peers(
    temperature: float, half: bool, compile: bool = True, third_party: bool = True
) -> list[Peer]:
    """Everything that computes forward KL from logits. `half`: the logits are 16 bits wide."""
    peers = [Peer("eager", lambda: eager_forward_kl(temperature), third_party=False)]
    if half:
        peers.append(
            Peer(
                "eager, float32 upcast",
                lambda: eager_forward_kl(temperature, upcast=True),
                third_party=False,
            )
        )
    if compile:
        peers.append(
            Peer(
                "torch.compile(eager)",
                lambda: compiled(eager_forward_kl(temperature)),
                third_party=False,
            )
        )
        if half:
            peers.append(
                Peer(
                    "torch.compile(eager, float32 upcast)",
                    lambda: compiled(eager_forward_kl(temperature, upcast=True)),
                    third_party=False,
                )
            )
    tune_note = (
        "cross-entropy form: value without the teacher's entropy; no temperature, so tau = 1"
    )
    if third_party:
        peers += [
            Peer("TRL generalized_jsd_loss, beta 0", lambda: trl_jsd(0, temperature)),
            Peer(
                "torchtune ForwardKLLoss",
                torchtune_forward_kl,
                tune_note,
                value_is_comparable=False,
            ),
            Peer(
                "torchtune ForwardKL, 8 chunks",
                lambda: torchtune_forward_kl(8),
                tune_note,
                value_is_comparable=False,
            ),
            Peer("Liger LigerJSD, beta 0", lambda: liger_jsd(0.0, temperature)),
            Peer("Liger LigerKLDIVLoss", lambda: liger_forward_kl(temperature)),
        ]
    return peers


def jensen_shannon_peers(
    beta: float, temperature: float, compile: bool = True, third_party: bool = True
) -> list[Peer]:
    """Everything that computes Jensen-Shannon from logits: all of it belongs to third parties."""
    if not third_party:
        return []
    peers = [Peer(f"TRL generalized_jsd_loss, beta {beta:g}", lambda: trl_jsd(beta, temperature))]
    if compile:
        peers.append(
            Peer(
                f"torch.compile(TRL generalized_jsd_loss, beta {beta:g})",
                lambda: compiled(trl_jsd(beta, temperature)),
            )
        )
    peers.append(Peer(f"Liger LigerJSD, beta {beta:g}", lambda: liger_jsd(beta, temperature)))
    return peers


_NO_TEMPERATURE = "no temperature, so tau = 1"
_CROSS_ENTROPY_FORM = f"value without the teacher's entropy; {_NO_TEMPERATURE}"


def kind_peers(
    kind: str, temperature: float, compile: bool = True, third_party: bool = True
) -> list[Peer]:
    """Everything that computes a kind of `kd.divergence` from logits, at its default parameters."""
    peers = [Peer("eager", lambda: eager_kind(kind, temperature), third_party=False)]
    if compile:
        peers.append(
            Peer(
                "torch.compile(eager)",
                lambda: compiled(eager_kind(kind, temperature)),
                third_party=False,
            )
        )

    def tune(name: str, note: str, factor: float = 1.0) -> Peer:
        return Peer(
            f"torchtune {name}",
            lambda: torchtune_kl(name, factor),
            note,
            value_is_comparable=False,
        )

    if not third_party:
        return peers
    generalized = {"forward_kl": 0.0, "jensen_shannon": 0.5, "reverse_kl": 1.0}
    if kind in generalized:
        beta = generalized[kind]
        peers += [
            Peer(f"TRL generalized_jsd_loss, beta {beta:g}", lambda: trl_jsd(beta, temperature)),
            Peer(f"Liger LigerJSD, beta {beta:g}", lambda: liger_jsd(beta, temperature)),
        ]
    if kind in ("forward_kl", "cross_entropy"):
        note = _CROSS_ENTROPY_FORM if kind == "forward_kl" else _NO_TEMPERATURE
        peers.append(tune("ForwardKLLoss", note))
    if kind == "reverse_kl":
        peers.append(tune("ReverseKLLoss", _NO_TEMPERATURE))
    if kind == "jeffreys":  # its halves add up to a half
        peers.append(tune("SymmetricKLLoss", _CROSS_ENTROPY_FORM, 2.0))
    if kind == "total_variation":
        peers.append(Peer("Liger LigerTVDLoss", lambda: liger_total_variation(temperature)))
    return peers


# Losses of hidden states --------------------------------------------------------------------------


def trl_chunked_divergence(temperature: float) -> HeadLoss:
    """TRL: ChunkedDivergenceFunction, beta 0 (forward KL), without biases, scales or softcaps."""
    module = import_peer("trl.kernels.chunked_divergence")
    function = module.ChunkedDivergenceFunction

    def loss(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
    ) -> torch.Tensor:
        divergence, _ = function.apply(
            *(hidden, weight, None, teacher_hidden, teacher_weight, None),
            *(0.0, temperature, 1.0, None, 1.0, None),
        )
        return divergence.mean()

    return loss


def liger_fused_linear_jsd(temperature: float) -> HeadLoss:
    """Liger-Kernel: LigerFusedLinearJSD, beta 0 (forward KL)."""
    _require_cuda("Liger-Kernel's Triton kernels")
    module = import_peer("liger_kernel.transformers")
    criterion = module.LigerFusedLinearJSD(jsd_beta=0.0, temperature=temperature)

    def loss(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
    ) -> torch.Tensor:
        return criterion(hidden, weight, teacher_hidden, teacher_weight, None)

    return loss


def orda_distillation(temperature: float) -> HeadLoss:
    """orda-kernel: distillation_loss, KL term alone; it multiplies by tau^2, undone here."""
    _require_cuda("orda-kernel's fused kernels")
    module = import_peer("orda_kernel")

    def loss(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
    ) -> torch.Tensor:
        labels = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
        output = module.distillation_loss(
            hidden,
            weight,
            labels,
            module.SeparateTeacher(teacher_hidden, teacher_weight),
            student_ce_weight=0.0,
            kl_weight=1.0,
            kl_temperature=temperature,
        )
        return output.loss / temperature**2

    return loss


def head_peers(temperature: float, compile: bool = True, third_party: bool = True) -> list[Peer]:
    """Everything that computes forward KL from hidden states and two heads."""
    peers = [Peer("eager", lambda: eager_head_forward_kl(temperature), third_party=False)]
    if compile:
        peers.append(
            Peer(
                "torch.compile(eager)",
                lambda: compiled(eager_head_forward_kl(temperature)),
                third_party=False,
            )
        )
    if third_party:
        peers += [
            Peer("TRL ChunkedDivergenceFunction", lambda: trl_chunked_divergence(temperature)),
            Peer("Liger LigerFusedLinearJSD", lambda: liger_fused_linear_jsd(temperature)),
            Peer("orda distillation_loss", lambda: orda_distillation(temperature)),
        ]
    return peers
