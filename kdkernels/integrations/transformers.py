"""`DistillationTrainer`: the Hugging Face Trainer with a live teacher and a loss of kdkernels.

The Trainer's own bookkeeping is kept where it is right for distillation and replaced where it is
not: what one row is (after the label shift and the padding), how many rows an optimiser step
holds over its micro-batches and ranks, and what an evaluation averages over. Written against the
sources of transformers 5.17 to 5.23.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.trainer_pt_utils import nested_detach
from transformers.utils import logging

from ._step_loss import IGNORE_INDEX, StepLoss, label_loss_sum, logits_of
from .capture import capture, split_heads

__all__ = ["DistillationTrainer", "capture", "split_heads"]

logger = logging.get_logger(__name__)


class DistillationTrainer(transformers.Trainer):
    r"""Trains `model` (the student) to follow the logits of `teacher_model`.

    Rows. One row is one position whose prediction counts. `labels` (B, T), int64, select it: not
    -100 and not padding by `attention_mask` (B, T). With `shift_labels=True` (causal models)
    position t predicts the label of t + 1, so the first label of a sequence never counts; with
    False (masked and encoder-decoder models) logits and labels are aligned as they come. A batch
    that carries `shift_labels` (padding-free collators) brings its aligned labels there. Without
    labels a causal batch is its own label: `input_ids`.

    Normalisation. The loss of an optimiser step is the sum of the row values divided by the rows
    of the whole step: over all gradient accumulation micro-batches and, while
    `args.average_tokens_across_devices` (the default), over all ranks. Data parallel wrappers
    average gradients, so the loss of a rank is multiplied by the number of ranks. With
    `average_tokens_across_devices=False` each rank divides by its own rows. This is the
    Trainer's definition, with rows instead of labels.

    Vocabulary. The heads may be padded to different widths. The valid columns are
    `vocab_size` if given, otherwise the smallest of: the student's and the teacher's
    `config.vocab_size`, their logit widths, and the highest id + 1 of the tokenizer when
    `processing_class` is one. Columns beyond count as logit -inf on either side.

    Precision. The teacher runs in evaluation mode, without gradients, under the same autocast as
    the student. It is moved to the device whole and never wrapped: FSDP and DeepSpeed shard the
    student only.

    Logs. `loss` is the mean over the logging window, as always. `label_loss` (nats; cross entropy
    of the student at temperature 1) and, where the parts can be told apart, `distillation_loss`
    (`loss` less `label_weight * label_loss`) are those of the optimiser step that is logged.
    `evaluate` and `predict` return `<prefix>_loss` and `<prefix>_label_loss`, both exact means
    over all rows of all batches, not means of batch means (`exp(eval_label_loss)` is the
    perplexity). Over several ranks samples that the sampler repeats to fill the last batch count
    twice.

    Args:
        model: the student, as `transformers.Trainer` takes it (or `model_init`).
        args: `transformers.TrainingArguments`.
        teacher_model: module returning logits (B, T, V_teacher) for the student's inputs, as a
            tensor, in `.logits` or first in a tuple. It is frozen in place and set to evaluation
            mode. Inputs its `forward` does not name are left out.
        loss: a kind of `kd.divergence` ("forward_kl", the default, as Hinton et al. 2015,
            arXiv 1503.02531; or a tuple of weighted kinds), a name of `kd.catalogue()`, or a
            callable `loss(student_logits, teacher_logits, labels=..., num_items=...)` giving a
            scalar. A callable gets logits (B, T, V) cut to the valid columns and aligned labels
            (B, T), and must divide the sum of its selected rows by `num_items` (0-d tensor, at
            least 1); for one rank of one micro-batch that is more than the rows it sees.
        loss_parameters: parameters of a named loss, such as `temperature`,
            `temperature_squared`, `label_weight`. For a callable: none.
        shift_labels: causal shift, see above. Default True.
        vocab_size: number of valid columns, see above.
        inplace_logits: let the gradient overwrite the student's logits, which saves one logit
            tensor. Only for named divergences; the logits of a training step must not be used
            afterwards (hooks, captured outputs). Default False.
        **trainer_arguments: every other argument of `transformers.Trainer`, by name.

    Raises:
        TypeError: an argument of the wrong type; a teacher whose output carries no logits.
        ValueError: an unknown loss or parameter of it; a teacher that shares parameters with the
            student; shapes of student, teacher and labels that do not match; `vocab_size` beyond
            the logits; trainer settings that name another loss (`compute_loss_func`,
            `label_smoothing_factor`) or cut sequences over devices (context or sequence
            parallelism).
    """

    # The loss is divided by the rows of all micro-batches, so training_step must not divide again.
    # Read by transformers >= 5.18; older versions ask model_accepts_loss_kwargs, set below.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: transformers.TrainingArguments | None = None,
        *,
        teacher_model: nn.Module,
        loss: str | tuple | Callable[..., torch.Tensor] = "forward_kl",
        loss_parameters: dict[str, Any] | None = None,
        shift_labels: bool = True,
        vocab_size: int | None = None,
        inplace_logits: bool = False,
        **trainer_arguments: Any,
    ) -> None:
        self._check_arguments(teacher_model, shift_labels, vocab_size, inplace_logits)
        if trainer_arguments.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: got a function, expected None; pass it as loss=")
        if args is not None and args.label_smoothing_factor != 0:
            raise ValueError(
                f"args.label_smoothing_factor: got {args.label_smoothing_factor}, expected 0; "
                "label cross entropy is weighted by loss_parameters={'label_weight': ...}"
            )
        super().__init__(model, args, **trainer_arguments)
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise ValueError(
                "args.parallelism_config: got context or sequence parallelism, expected whole "
                "sequences on each rank (the label shift crosses the cuts)"
            )
        self.model_accepts_loss_kwargs = True  # see loss_is_scaled_for_ga
        self.shift_labels = shift_labels
        self.vocab_size = vocab_size
        self.inplace_logits = inplace_logits
        if shift_labels and self._is_encoder_decoder():
            raise ValueError(
                "shift_labels: got True with an encoder-decoder student, expected False "
                "(its decoder inputs are shifted already)"
            )
        self.teacher_model = self._prepare_teacher(teacher_model)
        self._teacher_parameters = inspect.signature(teacher_model.forward).parameters
        self._step_loss = StepLoss(loss, loss_parameters, self.args.device, inplace_logits)
        if callable(getattr(self._step_loss.module, "step", None)):
            self.add_callback(_ScheduleCallback(self._step_loss.module))
        self._tokenizer_size = _tokenizer_size(self.processing_class)
        self._warn_about_sizes()
        self._parts: dict[str, torch.Tensor] = {}  # summed over the micro-batches of one step
        self._parts_step = -1
        self._evaluation_sums: torch.Tensor | None = None  # (3,): loss, label loss, rows

    # ---- construction ---------------------------------------------------------------------------

    @staticmethod
    def _check_arguments(teacher_model, shift_labels, vocab_size, inplace_logits) -> None:
        if not isinstance(teacher_model, nn.Module):
            raise TypeError(
                f"teacher_model: got {type(teacher_model).__name__}, expected a torch.nn.Module"
            )
        for name, value in (("shift_labels", shift_labels), ("inplace_logits", inplace_logits)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")
        if vocab_size is None:
            return
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
            raise TypeError(f"vocab_size: got {type(vocab_size).__name__}, expected an int")
        if vocab_size < 1:
            raise ValueError(f"vocab_size: got {vocab_size}, expected at least 1")

    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    def _prepare_teacher(self, teacher: nn.Module) -> nn.Module:
        trained = {id(parameter) for parameter in self.model.parameters()}
        if any(id(parameter) in trained for parameter in teacher.parameters()):
            raise ValueError(
                "teacher_model: got a module that shares parameters with model, expected its own "
                "(copy.deepcopy): the teacher is frozen"
            )
        # Dispatched and quantised models own their placement.
        placed = getattr(teacher, "hf_device_map", None) or getattr(
            teacher, "quantization_method", None
        )
        if not placed:
            teacher.to(self.args.device)
        return teacher.eval().requires_grad_(False)

    def _warn_about_sizes(self) -> None:
        sizes = [_config_size(self.model), _config_size(self.teacher_model)]
        known = self.vocab_size is not None or self._tokenizer_size is not None
        if None not in sizes and sizes[0] != sizes[1] and not known:
            logger.warning(
                f"Student and teacher have {sizes[0]} and {sizes[1]} vocabulary entries; the "
                f"first {min(sizes)} are compared. Pass processing_class (the tokenizer) or "
                "vocab_size to say how many are real."
            )

    def _valid_columns(self, student_width: int, teacher_width: int) -> int:
        if self.vocab_size is not None:
            if self.vocab_size > min(student_width, teacher_width):
                raise ValueError(
                    f"vocab_size: got {self.vocab_size}, expected at most the logits' width "
                    f"(student {student_width}, teacher {teacher_width})"
                )
            return self.vocab_size
        sizes = [_config_size(self.model), _config_size(self.teacher_model), self._tokenizer_size]
        return min(student_width, teacher_width, *(size for size in sizes if size is not None))

    # ---- rows -----------------------------------------------------------------------------------

    def _aligned_labels(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Labels (B, T) aligned with the logits, -100 on every position that is not a row."""
        if inputs.get("shift_labels") is not None:
            return inputs["shift_labels"]
        labels = inputs.get("labels")
        if labels is None:
            if not self.shift_labels or inputs.get("input_ids") is None:
                raise ValueError(
                    f"labels: got a batch with {sorted(inputs)}, expected labels (B, T), or "
                    "input_ids with shift_labels=True"
                )
            labels = inputs["input_ids"]
        prefix = "decoder_" if self._is_encoder_decoder() else ""
        keep = inputs.get(prefix + "attention_mask")
        keep = keep.bool() if keep is not None and keep.shape == labels.shape else None
        if not self.shift_labels:
            return labels if keep is None else labels.masked_fill(~keep, IGNORE_INDEX)
        # The logits stay whole; shifting the labels instead costs no copy of (B, T, V).
        shifted = F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
        if keep is not None:
            # A padded position has no meaningful state, a padded target no meaningful label.
            both = F.pad(keep[..., 1:] & keep[..., :-1], (0, 1), value=False)
            shifted = shifted.masked_fill(~both, IGNORE_INDEX)
        return shifted

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Rows of one optimiser step: all micro-batches and, if averaged so, all ranks."""
        if not batch_samples:
            return None
        counts = [self._aligned_labels(batch).ne(IGNORE_INDEX).sum() for batch in batch_samples]
        rows = torch.stack([count.to(device) for count in counts]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # Tensor-parallel ranks hold the same batch, so the sum counts it once for each.
            rows = self.accelerator.gather(rows).sum() / self.get_tp_size()
        return rows

    # ---- one step -------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of one micro-batch, scaled so that the gradients of a step add up.

        Args:
            model: the student, wrapped or not.
            inputs: one batch, `input_ids` (B, T) and what the models take beside it.
            return_outputs: also return the student's outputs.
            num_items_in_batch: rows of the whole optimiser step; None: the rows of this batch.

        Returns:
            The loss (0-d, nats times the loss's own factors), or (loss, outputs).
        """
        student, teacher, labels, outputs = self._forward(model, inputs)
        scale = 1
        if num_items_in_batch is None:
            num_items_in_batch = labels.ne(IGNORE_INDEX).sum()
        elif self.args.average_tokens_across_devices:
            scale = self.accelerator.num_processes // self.get_tp_size()
        num_items = torch.as_tensor(num_items_in_batch, device=student.device).clamp(min=1)
        inplace = self.inplace_logits and torch.is_grad_enabled() and not return_outputs
        # Measured first: with inplace_logits the logits are gone after the loss.
        label_loss = None
        if model.training and self._logs_this_step():
            label_loss = self._label_loss(student, labels) / num_items
        loss = self.distillation_loss(student, teacher, labels, num_items, inplace) * scale
        if label_loss is not None:
            self._record_parts(loss.detach(), label_loss * scale)
        return (loss, outputs) if return_outputs else loss

    def distillation_loss(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor,
        num_items: torch.Tensor,
        inplace: bool = False,
    ) -> torch.Tensor:
        """Sum of the selected rows' losses divided by `num_items` (0-d).

        Args:
            student: logits (B, T, V_s). With `inplace` their memory may take the gradient.
            teacher: logits (B, T, V_t).
            labels: (B, T), int64, aligned with the logits; -100 selects nothing.
            num_items: 0-d, rows of the whole optimiser step, at least 1.
            inplace: see `inplace_logits`.
        """
        valid = self._valid_columns(student.shape[-1], teacher.shape[-1])
        return self._step_loss(student, teacher, labels, num_items, valid, inplace)

    def _label_loss(self, student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        valid = self._valid_columns(student.shape[-1], student.shape[-1])
        return label_loss_sum(student[..., :valid], labels)

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> tuple:
        """Student logits (B, T, V_s), teacher logits (B, T, V_t), labels (B, T), outputs."""
        labels = self._aligned_labels(inputs)
        inputs = {key: value for key, value in inputs.items() if key != "shift_labels"}
        # Labels are kept from the models: they would compute a loss of their own.
        given = inputs.pop("labels", None)
        if self._is_encoder_decoder() and inputs.get("decoder_input_ids") is None:
            unwrapped = self.accelerator.unwrap_model(model)
            inputs["decoder_input_ids"] = unwrapped.prepare_decoder_input_ids_from_labels(given)
        # The teacher first: its activations are gone before the student's are kept.
        teacher = self._teacher_logits(inputs)
        outputs = model(**inputs)
        student = logits_of(outputs, "model")
        if student.shape[:-1] != teacher.shape[:-1]:
            raise ValueError(
                f"teacher_model: got logits {tuple(teacher.shape)}, expected "
                f"{(*student.shape[:-1], 'V')} as the student's"
            )
        if labels.shape != student.shape[:-1]:
            raise ValueError(
                f"labels: got {tuple(labels.shape)}, expected {tuple(student.shape[:-1])}, the "
                "leading shape of the student's logits"
            )
        return student, teacher, labels.to(student.device), outputs

    @torch.no_grad()
    def _teacher_logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        accepted = self._teacher_parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
            inputs = {key: value for key, value in inputs.items() if key in accepted}
        if "use_cache" in accepted:
            inputs = {**inputs, "use_cache": False}
        self.teacher_model.eval()  # a callback that calls .train() on everything must not matter
        with self.accelerator.autocast():
            return logits_of(self.teacher_model(**inputs), "teacher_model")

    # ---- logging --------------------------------------------------------------------------------

    def _logs_this_step(self) -> bool:
        """Whether the step being computed is one whose logs are written."""
        strategy, step = self.args.logging_strategy, self.state.global_step + 1
        if strategy == "steps":
            first = step == 1 and self.args.logging_first_step
            return first or step % self.state.logging_steps == 0
        return strategy == "epoch"  # which step ends an epoch is not known in advance

    def _record_parts(self, loss: torch.Tensor, label_loss: torch.Tensor) -> None:
        if self._parts_step != self.state.global_step:
            self._parts, self._parts_step = {}, self.state.global_step
        parts = {"label_loss": label_loss}
        if self._step_loss.label_weight is not None:
            parts["distillation_loss"] = loss - self._step_loss.label_weight * label_loss
        for name, value in parts.items():
            self._parts[name] = self._parts[name] + value if name in self._parts else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as the Trainer does, with the parts of the loss beside `loss`."""
        if "loss" in logs and self._parts:
            for name, value in self._parts.items():
                logs[name] = self.accelerator.reduce(value, reduction="mean").item()
            self._parts = {}
        super().log(logs, start_time)

    # ---- evaluation -----------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """(loss, student outputs, labels) of one batch; the loss is this batch's mean row.

        The last two are None with `prediction_loss_only`; labels are as the batch carried them.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            student, teacher, labels, outputs = self._forward(model, inputs)
            rows = labels.ne(IGNORE_INDEX).sum()
            num_items = rows.clamp(min=1)
            loss = self.distillation_loss(student, teacher, labels, num_items).detach()
            label_loss = self._label_loss(student, labels)
            sums = torch.stack([loss.double() * rows, label_loss.double(), rows.double()])
        if self._evaluation_sums is not None:
            self._evaluation_sums = self._evaluation_sums.to(sums.device) + sums
        if prediction_loss_only:
            return loss, None, None
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        logits: Any = outputs
        if isinstance(outputs, dict):
            logits = tuple(v for k, v in outputs.items() if k not in [*ignore_keys, "loss"])
        logits = nested_detach(logits)
        if isinstance(logits, tuple) and len(logits) == 1:
            logits = logits[0]
        given = [inputs[name] for name in self.label_names if inputs.get(name) is not None]
        given = nested_detach(tuple(given))
        return loss, logits, (given[0] if len(given) == 1 else given or None)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop; `<prefix>_loss` and `<prefix>_label_loss` are means over rows."""
        self._evaluation_sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        try:
            output = super().evaluation_loop(*args, **kwargs)
            loss, label_loss, rows = self.accelerator.reduce(self._evaluation_sums).tolist()
        finally:
            self._evaluation_sums = None
        bound = inspect.signature(super().evaluation_loop).bind(*args, **kwargs)
        prefix = bound.arguments.get("metric_key_prefix", "eval")
        if rows > 0:
            output.metrics[f"{prefix}_loss"] = loss / rows
            output.metrics[f"{prefix}_label_loss"] = label_loss / rows
        return output


class _ScheduleCallback(transformers.TrainerCallback):
    """Moves the schedules of a catalogue loss once an optimiser step."""

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.loss.step()


def _config_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def _tokenizer_size(processing_class: Any) -> int | None:
    """Highest id + 1; len() is too small for a tokenizer whose ids have holes."""
    if not isinstance(processing_class, transformers.PreTrainedTokenizerBase):
        return None
    return max(processing_class.get_vocab().values(), default=-1) + 1 or None
