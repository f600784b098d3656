"""Text that every Python installation carries, a tokenizer trained on it, and blocks of ids."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_FILE = "<|end|>"

# Installed packages differ between machines; tests and code tables are not language.
_SKIPPED_FOLDERS = frozenset(
    [
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "ensurepip",
        "lib-dynload",
        "turtledemo",
    ]
)
_SKIPPED_PREFIX = "_sysconfigdata"  # build paths of the interpreter
_VALIDATION_PERIOD = 16


def collect_files(root: Path | None = None, limit_bytes: int | None = None) -> list[Path]:
    """The Python sources under `root` (default: the standard library), sorted by relative path.

    `limit_bytes` keeps an evenly spaced part of the files of about that size. Raises
    FileNotFoundError naming `root` where there are no sources (a zipped standard library).
    """
    root = Path(root if root is not None else sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        skipped = _SKIPPED_FOLDERS.intersection(parts[:-1]) or parts[-1].startswith(_SKIPPED_PREFIX)
        if not skipped and path.is_file():
            found.append(path)
    if not found:
        raise FileNotFoundError(f"root: no Python sources under {root}")
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    total = sum(path.stat().st_size for path in found)
    if limit_bytes is None or total <= limit_bytes:
        return found
    keep = max(2, int(len(found) * limit_bytes / total))
    return [found[index * len(found) // keep] for index in range(keep)]


def split_files(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(training, validation): every 16th file validates, so the two share no file."""
    if len(files) < 2:
        raise ValueError(f"files: got {len(files)}, expected at least 2 to split")
    validation = [path for index, path in enumerate(files) if index % _VALIDATION_PERIOD == 1]
    training = [path for index, path in enumerate(files) if index % _VALIDATION_PERIOD != 1]
    return training, validation


def read_texts(files: Sequence[Path]) -> list[str]:
    """Contents of the files; one in another encoding than UTF-8 is left out."""
    texts = []
    for path in files:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return texts


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level byte-pair tokenizer with at most `vocabulary` entries."""
    tokenizer = Tokenizer(models.BPE())
    # A word takes one leading space with it, so indentation stays a token of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_FILE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(texts))
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Ids of all texts in one row, int64, each text followed by the end token."""
    end = tokenizer.token_to_id(END_OF_FILE)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts)):
        ids.extend(encoding.ids)
        ids.append(end)
    return np.asarray(ids, dtype=np.int64)


def cut_blocks(ids: np.ndarray, length: int, limit: int | None = None) -> np.ndarray:
    """Blocks (n, length + 1): inputs are [:, :-1], aligned labels [:, 1:].

    Neighbouring blocks share one id, so every id but the first is predicted once. `limit` keeps
    an evenly spaced part.
    """
    count = (len(ids) - 1) // length
    if count < 1:
        raise ValueError(f"ids: got {len(ids)}, expected more than length = {length}")
    starts = np.arange(count) * length
    if limit is not None and count > limit:
        starts = starts[np.arange(limit) * count // limit]
    return np.stack([ids[start : start + length + 1] for start in starts])
