"""The demo's parts: text, tokenizer, measurement, verdict, report, exit codes."""

import copy
import json
import math
import mmap

import numpy as np
import pytest
import torch

for library in ("tokenizers", "transformers", "accelerate", "matplotlib", "tqdm"):
    pytest.importorskip(library)

from kdkernels.demo import main, report, run, text  # noqa: E402
from kdkernels.demo.memory import PeakMemory  # noqa: E402
from kdkernels.demo.settings import EAGER, KERNELS, LABELS, choose_setting  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only lose by threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_sources(root, count=40):
    for index in range(count):
        folder = root / f"package_{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        body = "\n".join(f"def function_{index}_{j}(value):\n    return value + {j}" for j in "123")
        (folder / f"module_{index:02}.py").write_text(body)
    for name in (
        "site-packages/other.py",
        "test/test_x.py",
        "_sysconfigdata_linux.py",
        "notes.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("left out")


def test_files_are_collected_in_order_and_without_strangers(tmp_path):
    write_sources(tmp_path)
    files = text.collect_files(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in files]
    assert len(names) == 40
    assert names == sorted(names)
    assert not any("left out" in path.read_text() for path in files)
    some = text.collect_files(tmp_path, limit_bytes=sum(p.stat().st_size for p in files) // 4)
    assert len(some) in (9, 10) and set(some) < set(files)
    with pytest.raises(FileNotFoundError, match="root"):
        text.collect_files(tmp_path / "nothing")


def test_the_standard_library_has_enough_text():
    files = text.collect_files()
    assert sum(path.stat().st_size for path in files) > 3_000_000
    assert not any("site-packages" in path.parts for path in files)


def test_the_split_shares_no_file(tmp_path):
    write_sources(tmp_path)
    files = text.collect_files(tmp_path)
    training, validation = text.split_files(files)
    assert training and validation
    assert not set(training) & set(validation)
    assert set(training) | set(validation) == set(files)
    assert text.split_files(files) == (training, validation)
    with pytest.raises(ValueError, match="files"):
        text.split_files(files[:1])


def test_the_tokenizer_is_deterministic_and_lossless(tmp_path):
    write_sources(tmp_path)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\xff")
    texts = text.read_texts(text.collect_files(tmp_path))
    assert len(texts) == 40  # the file that is no UTF-8 is left out
    first, second = (text.train_tokenizer(texts, 300) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert 256 < first.get_vocab_size() <= 300
    sample = texts[0] + "\n\tünseen ☃"
    assert first.decode(first.encode(sample).ids) == sample
    ids = text.encode_texts(first, texts[:2])
    assert list(ids).count(first.token_to_id(text.END_OF_FILE)) == 2
    assert ids.dtype == np.int64 and ids.max() < 300


def test_blocks_predict_every_id_once():
    ids = np.arange(23)
    blocks = text.cut_blocks(ids, 5)
    assert blocks.shape == (4, 6)
    assert np.array_equal(blocks[:, :-1].ravel(), np.arange(20))
    assert np.array_equal(blocks[:, 1:].ravel(), np.arange(1, 21))
    assert text.cut_blocks(ids, 5, limit=2).tolist() == [blocks[0].tolist(), blocks[2].tolist()]
    with pytest.raises(ValueError, match="ids"):
        text.cut_blocks(ids[:5], 5)


def test_peak_memory_sees_a_tensor_that_is_gone():
    memory = PeakMemory("cpu")
    memory.start()
    # Pages of its own: a heap may hold 64 MiB that another test has freed.
    with mmap.mmap(-1, 64 * 2**20) as pages:
        pages[:: mmap.PAGESIZE] = bytes(len(pages) // mmap.PAGESIZE)
    memory.stop()
    if memory.growth is None:
        pytest.skip(memory.method)
    if "VmHWM" in memory.method:
        assert 60 * 2**20 < memory.growth < 100 * 2**20
        memory.start()
        memory.stop()
        assert memory.growth < 20 * 2**20


@pytest.fixture
def results():
    losses = [5.0 / (1 + 0.02 * step) for step in range(60)]
    one = {
        "perplexity": 812.5,
        "step_seconds": 0.21,
        "loss_seconds": 0.08,
        "peak_bytes": 300 * 2**20,
        "peak_method": "peak resident set",
        "losses": losses,
        "parameters": 4_200_000,
        "threads": 2,
        "transformers": "5.23.0",
    }
    return {name: copy.deepcopy(one) for name in (LABELS, EAGER, KERNELS)}


def test_the_verdict_passes_within_tolerance(results):
    results[KERNELS]["losses"] = [loss * (1 + 0.9e-4) for loss in results[KERNELS]["losses"]]
    results[KERNELS]["perplexity"] *= 1.004
    results[KERNELS]["losses"][50] = 99.0  # beyond the compared steps
    verdict = report.judge_equality(results)
    assert verdict["passed"]
    assert verdict["compared_steps"] == 50
    assert verdict["loss_difference"] == pytest.approx(0.9e-4, rel=1e-3)
    assert " agree" in report.verdict_sentence(verdict)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kernels: kernels["losses"].__setitem__(49, kernels["losses"][49] * 1.0002),
        lambda kernels: kernels["losses"].__setitem__(3, math.nan),
        lambda kernels: kernels["losses"].pop(),
        lambda kernels: kernels.update(losses=[]),
        lambda kernels: kernels.update(perplexity=kernels["perplexity"] * 0.994),
        lambda kernels: kernels.update(perplexity=math.inf),
    ],
)
def test_the_verdict_fails_when_values_differ(results, spoil):
    assert report.judge_equality(results)["passed"]
    spoil(results[KERNELS])
    verdict = report.judge_equality(results)
    assert not verdict["passed"]
    assert "DIFFER" in report.verdict_sentence(verdict)


def make_report(results):
    return {
        "setting": choose_setting("cpu", True).to_dict(),
        "teacher": results[LABELS],
        "results": results,
        "verdict": report.judge_equality(results),
        "machine": "Measured on a test.",
    }


def test_the_report_is_written_beside_other_files(tmp_path, results):
    (tmp_path / "mine.txt").write_text("kept")
    results[LABELS]["peak_bytes"] = None
    results[EAGER].update(loss_seconds=0.16, peak_bytes=600 * 2**20)
    for _ in range(2):  # a second run replaces its own files
        paths = report.write_report(tmp_path, make_report(results))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "demo.json",
        "demo.md",
        "demo.png",
        "mine.txt",
    ]
    stored = json.loads(paths[0].read_text())
    assert {"setting", "teacher", "results", "verdict", "machine"} <= stored.keys()
    assert set(stored["results"]) == {LABELS, EAGER, KERNELS}
    page = paths[1].read_text()
    assert "| eager KL | 812.5 | 210.0 | 160.0 | 600 |" in page
    assert "| labels only | 812.5 | 210.0 | 80.0 | not measured |" in page
    assert "loss part 2.00, step 1.00, peak memory 2.00 times" in page
    assert page.rstrip().endswith("Measured on a test.")
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_the_exit_code_is_the_verdict(tmp_path, results, monkeypatch, capsys):
    teacher = results[LABELS]
    monkeypatch.setattr(
        run, "run_variants", lambda *args: {"teacher": teacher, **copy.deepcopy(results)}
    )
    arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path / "out"), "--steps", "60"]
    assert main(arguments) == 0
    assert "agree" in capsys.readouterr().out
    stored = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert stored["setting"]["steps"] == 60 and stored["verdict"]["passed"]
    results[KERNELS]["losses"][0] *= 1.001
    assert main(arguments) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_bad_options_are_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file"), "--device", "cpu"]) == 2
    assert "--out" in capsys.readouterr().err
    for bad in (["--steps", "0"], ["--steps", "few"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as stop:
            main(bad)
        assert stop.value.code == 2
        assert bad[0] in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["--device", "cuda", "--out", str(tmp_path)]) == 2
        assert "--device" in capsys.readouterr().err


def test_a_variant_trains_and_is_measured(tmp_path):
    """The children's own code in this process: two students on a very small vocabulary."""
    from kdkernels.demo import variant

    setting = choose_setting("cpu", True)
    sizes = dict(vocabulary=64, length=16, steps=7, teacher_steps=7, student_width=32)
    job = {
        "setting": {**setting.to_dict(), **sizes, "teacher_width": 32},
        "device": "cpu",
        "seed": 0,
        "scratch": str(tmp_path / "scratch"),
        "teacher": str(tmp_path / "teacher"),
    }
    generator = np.random.default_rng(0)
    for name in ("training", "validation"):
        job[name] = str(tmp_path / f"{name}.npy")
        np.save(job[name], generator.integers(0, 64, (40, 17)))
    found = {
        name: variant.run_variant({**job, "variant": name})
        for name in ("teacher", LABELS, EAGER, KERNELS)
    }
    for result in found.values():
        assert len(result["losses"]) == 7
        assert 0 < result["loss_seconds"] < result["step_seconds"]
        assert 1 < result["perplexity"] < 200
    assert report.judge_equality(found)["passed"]
    assert found[LABELS]["losses"] != found[EAGER]["losses"]
    assert found[LABELS]["losses"][0] == pytest.approx(math.log(64), rel=0.1)
