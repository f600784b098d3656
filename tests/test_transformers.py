"""DistillationTrainer on tiny models: rows, normalisation, vocabularies, ranks, evaluation."""

import copy
import os
import socket

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from ranks import run_ranks  # noqa: E402

import kdkernels as kd  # noqa: E402
from kdkernels.integrations.transformers import DistillationTrainer  # noqa: E402

VOCABULARY = 61
LENGTH = 12


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only lose by threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(seed=0, vocabulary=VOCABULARY, **changes):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        initializer_range=0.3,  # logits far enough apart for the loss to be no rounding error
        **changes,
    )
    return transformers.LlamaForCausalLM(config)


def make_examples(count=8, seed=1):
    """Sequences of one length with right padding and prompts of different lengths left out."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        tokens = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
        keep = torch.arange(LENGTH) < LENGTH - index % 5
        labels = torch.where(keep & (torch.arange(LENGTH) >= index % 3), tokens, -100)
        examples.append({"input_ids": tokens, "attention_mask": keep.long(), "labels": labels})
    return examples


class GradientRecorder(transformers.TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}
        self.gradients.append(grads)


def make_arguments(folder, **changes):
    defaults = dict(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=3,
        train_sampling_strategy="sequential",
    )
    return transformers.TrainingArguments(**{**defaults, **changes})


def make_trainer(folder, *, student=None, teacher=None, examples=None, arguments=None, **changes):
    recorder = GradientRecorder()
    trainer = DistillationTrainer(
        student if student is not None else make_model(0),
        make_arguments(folder, **(arguments or {})),
        teacher_model=teacher if teacher is not None else make_model(7),
        train_dataset=examples if examples is not None else make_examples(),
        callbacks=[recorder],
        **changes,
    )
    return trainer, recorder


def batch_of(examples):
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def row_losses(student, teacher, batch, *, valid=VOCABULARY):
    """Independent statement: one (value, label cross entropy) for each row, python loops."""
    student.eval()
    z = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    with torch.no_grad():
        a = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    values, labels = [], []
    for b in range(z.shape[0]):
        for t in range(z.shape[1] - 1):
            if batch["labels"][b, t + 1] == -100 or batch["attention_mask"][b, t] == 0:
                continue
            log_q = z[b, t, :valid].log_softmax(-1)
            log_p = a[b, t, :valid].log_softmax(-1)
            values.append((log_p.exp() * (log_p - log_q)).sum())
            labels.append(-log_q[batch["labels"][b, t + 1]])
    return torch.stack(values), torch.stack(labels)


def assert_same_gradients(left, right, tolerance=1e-6):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


def eager_loss(student_logits, teacher_logits, labels, num_items):
    log_q = F.log_softmax(student_logits.float(), -1)
    log_p = F.log_softmax(teacher_logits.float(), -1)
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return rows[labels != -100].sum() / num_items


def test_the_loss_falls_and_the_teacher_stays(tmp_path):
    teacher = make_model(7)
    before = copy.deepcopy(teacher.state_dict())
    arguments = dict(max_steps=30, optim="adamw_torch", learning_rate=2e-2)
    trainer, _ = make_trainer(tmp_path, teacher=teacher, arguments=arguments)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training


def test_gradient_and_logs_are_those_of_the_rows(tmp_path):
    """Shift, padding, prompt labels and label weight against loops over rows in float64."""
    examples = make_examples()
    trainer, recorder = make_trainer(
        tmp_path, examples=examples, loss_parameters={"label_weight": 0.25}
    )
    trainer.train()
    student = make_model(0)
    values, labels = row_losses(student, make_model(7), batch_of(examples))
    expected = values.mean() + 0.25 * labels.mean()
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert_same_gradients(recorder.gradients[0], wanted, 2e-6)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert entry["label_loss"] == pytest.approx(labels.mean().item(), rel=1e-5)
    assert entry["distillation_loss"] == pytest.approx(values.mean().item(), rel=1e-5)


def test_a_callable_equals_the_named_loss(tmp_path):
    named, named_recorder = make_trainer(tmp_path, arguments=dict(max_steps=3))
    eager, eager_recorder = make_trainer(tmp_path, arguments=dict(max_steps=3), loss=eager_loss)
    named.train()
    eager.train()
    for left, right in zip(named_recorder.gradients, eager_recorder.gradients, strict=True):
        assert_same_gradients(left, right, 1e-5)
    assert "distillation_loss" not in eager.state.log_history[0]
    assert "label_loss" in eager.state.log_history[0]


@pytest.mark.parametrize("loss", ["forward_kl", eager_loss], ids=["named", "callable"])
def test_accumulation_equals_the_big_batch(tmp_path, loss):
    """The examples hold different numbers of rows, so a mean of means would differ."""
    _, whole = run(tmp_path, loss=loss)
    arguments = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    parts_trainer, parts = run(tmp_path, loss=loss, arguments=arguments)
    assert len(parts.gradients) == 1
    assert_same_gradients(parts.gradients[0], whole.gradients[0])
    whole_trainer, _ = run(tmp_path, loss=loss)
    for key in ("loss", "label_loss"):
        left, right = (t.state.log_history[0][key] for t in (parts_trainer, whole_trainer))
        assert left == pytest.approx(right, rel=1e-5)


def run(folder, **changes):
    trainer, recorder = make_trainer(folder, **changes)
    trainer.train()
    return trainer, recorder


def test_what_stands_in_the_padding_does_not_matter(tmp_path):
    examples = make_examples()
    changed = copy.deepcopy(examples)
    for example in changed:
        padding = example["attention_mask"] == 0
        example["input_ids"][padding] = 5
        example["labels"][padding] = 5  # collators that copy input_ids label the padding too
    _, left = run(tmp_path, examples=examples)
    _, right = run(tmp_path, examples=changed)
    assert_same_gradients(left.gradients[0], right.gradients[0])


def test_batches_without_labels_use_the_inputs(tmp_path):
    examples = make_examples()
    full = [{**e, "labels": e["input_ids"].clone()} for e in examples]
    bare = [{key: e[key] for key in ("input_ids", "attention_mask")} for e in examples]
    _, left = run(tmp_path, examples=full)
    _, right = run(tmp_path, examples=bare)
    assert_same_gradients(left.gradients[0], right.gradients[0])


def test_aligned_labels_need_no_shift(tmp_path):
    """shift_labels=False on labels moved by hand, and a collator's own `shift_labels`."""
    examples = make_examples()
    _, shifted = run(tmp_path, examples=examples)
    aligned, collated = [], []
    for example in examples:
        keep = example["attention_mask"].bool()
        labels = F.pad(example["labels"][1:], (0, 1), value=-100)
        labels = torch.where(keep & F.pad(keep[1:], (0, 1), value=False), labels, -100)
        aligned.append({**example, "labels": labels})
        collated.append({**example, "shift_labels": labels})
    _, moved = run(tmp_path, examples=aligned, shift_labels=False)
    assert_same_gradients(shifted.gradients[0], moved.gradients[0])
    arguments = dict(remove_unused_columns=False)
    _, brought = run(tmp_path, examples=collated, arguments=arguments)
    assert_same_gradients(shifted.gradients[0], brought.gradients[0])


@pytest.mark.parametrize("loss", ["forward_kl", eager_loss], ids=["named", "callable"])
@pytest.mark.parametrize("padded", ["teacher", "student"])
def test_padded_vocabularies_compare_the_common_columns(tmp_path, loss, padded):
    """Columns beyond the smaller head's size change nothing, whatever they hold."""

    def pad(model):
        wide = make_model(0, vocabulary=VOCABULARY + 11)
        with torch.no_grad():
            for name, parameter in wide.named_parameters():
                source = model.get_parameter(name)
                parameter[: source.shape[0]] = source
                parameter[source.shape[0] :] = 3.0
        return wide

    _, plain = run(tmp_path, loss=loss)
    models = {"student": make_model(0), "teacher": make_model(7)}
    models[padded] = pad(models[padded])
    _, wide = run(tmp_path, loss=loss, **models)
    for name, gradient in plain.gradients[0].items():
        found = wide.gradients[0][name]
        torch.testing.assert_close(found[: len(gradient)], gradient, rtol=1e-5, atol=1e-6)
        assert not found[len(gradient) :].any()
    both = {name: pad(make_model(seed)) for name, seed in (("student", 0), ("teacher", 7))}
    _, sized = run(tmp_path, loss=loss, vocab_size=VOCABULARY, **both)
    for name, gradient in plain.gradients[0].items():
        found = sized.gradients[0][name][: len(gradient)]
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


def test_the_tokenizer_says_which_columns_are_real(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"t{index}": index for index in range(50)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0")
    trainer, _ = make_trainer(tmp_path, processing_class=tokenizer)
    assert trainer._valid_columns(VOCABULARY, VOCABULARY) == 50
    trainer, _ = make_trainer(tmp_path, processing_class=tokenizer, vocab_size=40)
    assert trainer._valid_columns(VOCABULARY, VOCABULARY) == 40
    trainer, _ = make_trainer(tmp_path)
    assert trainer._valid_columns(VOCABULARY + 3, VOCABULARY + 9) == VOCABULARY


def test_evaluation_averages_over_rows(tmp_path):
    """Batches of 3, 3 and 2 with different row counts: a mean of batch means would differ."""
    examples = make_examples()
    arguments = dict(per_device_eval_batch_size=3)
    trainer, _ = make_trainer(tmp_path, eval_dataset=examples, arguments=arguments)
    metrics = trainer.evaluate()
    values, labels = row_losses(make_model(0), make_model(7), batch_of(examples))
    assert metrics["eval_loss"] == pytest.approx(values.mean().item(), rel=1e-5)
    assert metrics["eval_label_loss"] == pytest.approx(labels.mean().item(), rel=1e-5)
    output = trainer.predict(examples)
    assert output.predictions.shape == (8, LENGTH, VOCABULARY)
    assert output.label_ids.shape == (8, LENGTH)
    assert output.metrics["test_label_loss"] == pytest.approx(labels.mean().item(), rel=1e-5)


def test_compute_loss_by_hand(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    batch = batch_of(make_examples())
    values, _ = row_losses(make_model(0), make_model(7), batch)
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert loss.item() == pytest.approx(values.mean().item(), rel=1e-5)
    assert outputs.logits.shape == (8, LENGTH, VOCABULARY)
    assert loss.requires_grad
    half = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=2 * len(values))
    assert half.item() == pytest.approx(values.mean().item() / 2, rel=1e-5)


def test_a_step_without_rows_is_zero(tmp_path):
    examples = [{**e, "labels": torch.full_like(e["labels"], -100)} for e in make_examples()]
    trainer, recorder = run(tmp_path, examples=examples)
    assert trainer.state.log_history[0]["loss"] == 0.0
    assert all(not gradient.any() for gradient in recorder.gradients[0].values())


@pytest.mark.parametrize(
    "arguments", [dict(bf16=True), dict(gradient_checkpointing=True)], ids=["bf16", "checkpointing"]
)
def test_modes_of_training(tmp_path, arguments):
    _, plain = run(tmp_path)
    trainer, found = run(tmp_path, arguments=arguments, eval_dataset=make_examples())
    tolerance = 0.05 if "bf16" in arguments else 1e-6
    for name, gradient in plain.gradients[0].items():
        error = (found.gradients[0][name] - gradient).norm() / gradient.norm()
        assert error < tolerance, name
    assert trainer.evaluate()["eval_loss"] > 0


def test_autocast_reaches_the_teacher(tmp_path):
    trainer, _ = make_trainer(tmp_path, arguments=dict(bf16=True))
    logits = trainer._teacher_logits({"input_ids": make_examples()[0]["input_ids"][None]})
    assert logits.dtype == torch.bfloat16
    assert not logits.requires_grad


def test_inplace_logits_give_the_same_gradient(tmp_path):
    _, plain = run(tmp_path)
    _, inplace = run(tmp_path, inplace_logits=True)
    assert_same_gradients(plain.gradients[0], inplace.gradients[0])


def test_masked_model_distils_without_shift(tmp_path):
    def masked(seed):
        torch.manual_seed(seed)
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            num_attention_heads=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.3,
            **sizes,
        )
        return transformers.BertForMaskedLM(config)

    examples = make_examples()
    student, teacher = masked(0), masked(1)
    trainer, _ = run(
        tmp_path, student=student, teacher=teacher, examples=examples, shift_labels=False
    )
    batch = batch_of(examples)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    student, teacher = masked(0).eval(), masked(1).eval()
    with torch.no_grad():
        rows = batch["labels"] != -100
        log_q = student(**inputs).logits[rows].double().log_softmax(-1)
        log_p = teacher(**inputs).logits[rows].double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


class ScheduledLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, student, teacher, labels=None, num_items=None):
        return eager_loss(student, teacher, labels, num_items)

    def step(self):
        self.steps += 1


def test_a_catalogue_loss_is_found_by_name(tmp_path, monkeypatch):
    built = []

    def build(name, **parameters):
        if name != "a_paper":
            raise ValueError(f"name: {name}")
        built.append(ScheduledLoss())
        return built[-1]

    monkeypatch.setattr(kd, "loss", build, raising=False)
    arguments = dict(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    _, found = run(tmp_path, loss="a_paper", arguments=arguments)
    _, plain = run(tmp_path, loss="forward_kl", arguments=arguments)
    assert_same_gradients(found.gradients[1], plain.gradients[1], 1e-5)
    assert built[0].steps == 2
    with pytest.raises(ValueError, match="no_such"):
        make_trainer(tmp_path, loss="no_such")


class NoLogits(torch.nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return {"hidden": input_ids}


def bad_shape(student, teacher, labels, num_items):
    return (student - teacher).sum(-1)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (dict(teacher="not a module"), TypeError, "teacher_model"),
        (dict(loss=3), TypeError, "loss"),
        (dict(loss="forward_lk"), ValueError, "forward_lk"),
        (dict(loss="entropy"), ValueError, "entropy"),
        (dict(loss_parameters=[1]), TypeError, "loss_parameters"),
        (dict(loss_parameters={"temperature": -1.0}), ValueError, "loss_parameters.*temperature"),
        (dict(loss_parameters={"tempreature": 1.0}), TypeError, "loss_parameters.*tempreature"),
        (dict(loss_parameters={"num_items": 4}), ValueError, "loss_parameters.*num_items"),
        (dict(loss=eager_loss, loss_parameters={"beta": 1}), ValueError, "loss_parameters"),
        (dict(loss=eager_loss, inplace_logits=True), ValueError, "inplace_logits"),
        (dict(shift_labels=1), TypeError, "shift_labels"),
        (dict(vocab_size=2.5), TypeError, "vocab_size"),
        (dict(vocab_size=0), ValueError, "vocab_size"),
        (dict(compute_loss_func=eager_loss), ValueError, "compute_loss_func"),
        (dict(arguments=dict(label_smoothing_factor=0.1)), ValueError, "label_smoothing_factor"),
    ],
)
def test_bad_arguments_are_named(tmp_path, changes, error, match):
    with pytest.raises(error, match=match):
        make_trainer(tmp_path, **changes)


def test_bad_batches_and_models_are_named(tmp_path):
    model = make_model(0)
    with pytest.raises(ValueError, match="teacher_model.*shares"):
        make_trainer(tmp_path, student=model, teacher=model)
    batch = batch_of(make_examples())
    trainer, _ = make_trainer(tmp_path, vocab_size=VOCABULARY + 1)
    with pytest.raises(ValueError, match="vocab_size"):
        trainer.compute_loss(trainer.model, dict(batch))
    trainer, _ = make_trainer(tmp_path, teacher=NoLogits())
    with pytest.raises(TypeError, match="teacher_model"):
        trainer.compute_loss(trainer.model, dict(batch))
    trainer, _ = make_trainer(tmp_path, loss=bad_shape)
    with pytest.raises(ValueError, match="loss.*0-d"):
        trainer.compute_loss(trainer.model, dict(batch))
    trainer, _ = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="labels"):
        trainer.compute_loss(trainer.model, {**batch, "labels": batch["labels"][:, :-1]})
    trainer, _ = make_trainer(tmp_path, shift_labels=False)
    with pytest.raises(ValueError, match="labels"):
        trainer.compute_loss(trainer.model, {"input_ids": batch["input_ids"]})


def distributed_worker(rank, port, folder, average):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
    )
    arguments = dict(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
        average_tokens_across_devices=average,
        per_device_eval_batch_size=2,
    )
    trainer, recorder = make_trainer(folder, arguments=arguments, eval_dataset=make_examples())
    trainer.train()
    return recorder.gradients[0], trainer.state.log_history[0] if rank == 0 else None


@pytest.mark.parametrize("average", [True, False], ids=["all_rows", "own_rows"])
def test_two_ranks_equal_one_process(tmp_path, average):
    """Two gloo ranks x 2 micro-batches x 2 examples against one batch of 8."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (gradients, entry), _ = run_ranks(distributed_worker, tmp_path, (port, str(tmp_path), average))
    examples = make_examples()
    if average:
        trainer, single = run(tmp_path, examples=examples)
        assert_same_gradients(gradients, single.gradients[0], 2e-6)
        for key in ("loss", "label_loss", "distillation_loss"):
            assert entry[key] == pytest.approx(trainer.state.log_history[0][key], rel=1e-5)
        return
    # Each rank by itself: rank r holds every second batch of 2.
    halves = [examples[0:2] + examples[4:6], examples[2:4] + examples[6:8]]
    parts = []
    for half in halves:
        _, recorder = run(tmp_path, examples=half, arguments=dict(per_device_train_batch_size=4))
        parts.append(recorder.gradients[0])
    means = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    assert_same_gradients(gradients, means, 2e-6)
