"""Trains one variant in a process of its own, so that its peak memory is its own.

Run by `kdkernels.demo.run` as `python -m kdkernels.demo.variant job.json`; the result is written
to the path the job names.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from kdkernels.demo.memory import PeakMemory
from kdkernels.demo.settings import EAGER, KERNELS, TEACHER, TITLES, Setting
from kdkernels.integrations.transformers import DistillationTrainer

# The first steps fill allocators and caches and are not timed.
UNTIMED_STEPS = 5


def make_model(width: int, layers: int, vocabulary: int, length: int, seed: int):
    """A Llama with tied embeddings, drawn from `seed`."""
    transformers.set_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 32),
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attention_dropout=0.0,
    )
    return transformers.LlamaForCausalLM(config)


def eager_kl(student_logits, teacher_logits, labels, num_items):
    """KL(p || q) as it stands in most training scripts: two log-softmaxes and F.kl_div."""
    log_q = F.log_softmax(student_logits, dim=-1)
    log_p = F.log_softmax(teacher_logits, dim=-1)
    # Every position of the demo's blocks is a row, so no selection is needed.
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / num_items


class Stopwatch:
    """Wall-clock times of whole steps and of their loss part, in seconds."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.steps: list[float] = []
        self.losses: list[float] = []

    def now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def time_loss(self, function, student: torch.Tensor) -> torch.Tensor:
        """Runs `function`; its forward and, later, its backward down to the logits are timed."""
        start = self.now()
        loss = function()
        self.losses.append(self.now() - start)
        if loss.requires_grad:
            started: list[float] = []
            loss.register_hook(lambda gradient: started.append(self.now()))
            student.register_hook(lambda gradient: self._add_backward(started[0]))
        return loss

    def _add_backward(self, start: float) -> None:
        self.losses[-1] += self.now() - start


class MeasuredMixin:
    """Records the loss of every step."""

    stopwatch: Stopwatch

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.step_losses.append(loss.item())
        return loss


class LabelTrainer(MeasuredMixin, transformers.Trainer):
    """Cross entropy with labels that are aligned already; no teacher."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = model(input_ids=inputs["input_ids"]).logits
        labels = inputs["labels"]
        return self.stopwatch.time_loss(
            lambda: F.cross_entropy(student.flatten(0, 1), labels.flatten()), student
        )


class StudentTrainer(MeasuredMixin, DistillationTrainer):
    """DistillationTrainer with a stopwatch around logits -> loss -> gradient of the logits."""

    def distillation_loss(self, student, teacher, labels, num_items, inplace=False):
        compute = super().distillation_loss
        return self.stopwatch.time_loss(
            lambda: compute(student, teacher, labels, num_items, inplace), student
        )


class Watcher(transformers.TrainerCallback):
    """Step times, the peak of memory and the progress bar."""

    def __init__(self, trainer, memory: PeakMemory, title: str, steps: int) -> None:
        self._trainer, self._memory = trainer, memory
        self._bar = tqdm(total=steps, desc=f"{title:<12}", unit="step", dynamic_ncols=True)
        self._start = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._memory.start()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._start = self._trainer.stopwatch.now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._trainer.stopwatch.steps.append(self._trainer.stopwatch.now() - self._start)
        self._bar.set_postfix(loss=f"{self._trainer.step_losses[-1]:.3f}", refresh=False)
        self._bar.update(1)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._memory.stop()
        self._bar.close()


@torch.no_grad()
def validation_perplexity(model, blocks: np.ndarray, device: str) -> float:
    """exp of the mean cross entropy over all rows of blocks (n, T + 1)."""
    model.eval()
    total, rows = 0.0, 0
    for start in range(0, len(blocks), 4):
        batch = torch.from_numpy(blocks[start : start + 4]).to(device)
        logits = model(input_ids=batch[:, :-1]).logits.flatten(0, 1).float()
        total += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
        rows += logits.shape[0]
    return math.exp(total / rows)


def training_arguments(job: dict, setting: Setting, steps: int) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=job["scratch"],
        use_cpu=job["device"] == "cpu",
        per_device_train_batch_size=setting.batch,
        max_steps=steps,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(setting.warmup_steps, max(1, steps // 5)),
        optim="adamw_torch",
        # Entries whose gradient is rounding noise would otherwise move by a whole learning rate in
        # a random direction, and two correct losses would part ways.
        adam_epsilon=1e-6,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=job["seed"],
        dataloader_pin_memory=False,
    )


def run_variant(job: dict) -> dict:
    """Trains what the job names and returns its numbers; the teacher is saved beside."""
    setting, name, device = Setting(**job["setting"]), job["variant"], job["device"]
    training, validation = (np.load(job[key]) for key in ("training", "validation"))
    examples = [{"input_ids": row[:-1], "labels": row[1:]} for row in torch.from_numpy(training)]
    if name == TEACHER:
        width, layers, steps = setting.teacher_width, setting.teacher_layers, setting.teacher_steps
    else:
        width, layers, steps = setting.student_width, setting.student_layers, setting.steps
    seed = job["seed"] + (1 if name == TEACHER else 0)
    model = make_model(width, layers, setting.vocabulary, setting.length, seed)
    arguments = training_arguments(job, setting, steps)
    if name in (EAGER, KERNELS):
        trainer = StudentTrainer(
            model,
            arguments,
            teacher_model=transformers.LlamaForCausalLM.from_pretrained(job["teacher"]),
            loss=eager_kl if name == EAGER else "forward_kl",
            shift_labels=False,
            train_dataset=examples,
        )
    else:
        trainer = LabelTrainer(model, arguments, train_dataset=examples)
    trainer.stopwatch, trainer.step_losses = Stopwatch(device), []
    memory = PeakMemory(device)
    trainer.add_callback(Watcher(trainer, memory, TITLES[name], steps))
    trainer.train()
    if name == TEACHER:
        model.save_pretrained(job["teacher"])
    skip = min(UNTIMED_STEPS, steps - 1)
    return {
        "perplexity": validation_perplexity(model, validation, device),
        "step_seconds": statistics.median(trainer.stopwatch.steps[skip:]),
        "loss_seconds": statistics.median(trainer.stopwatch.losses[skip:]),
        "peak_bytes": memory.growth,
        "peak_method": memory.method,
        "losses": trainer.step_losses,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
    }


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    Path(job["result"]).write_text(json.dumps(run_variant(job)))


if __name__ == "__main__":
    main(sys.argv[1])
