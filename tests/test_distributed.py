"""Training in several processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import as_script
import numpy as np
import pytest
from conftest import ROOT, Script
from safetensors.numpy import load_file

# Dropout draws other numbers in every process. All stages but self-training take part.
COMMON = (
    *("--model", "nin-text-small", "--limit", 300, "--epochs", 2, "--dropout", 0),
    *("--word-dropout", 0, "--precision", "fp32"),
)


def ranks(tmp_path: Path, script: str, *arguments: object) -> None:
    """A script in two processes with the environment that torchrun would give them.

    They have imported already what takes the three interpreters of `torchrun` a quarter minute.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def run(rank: int) -> tuple[int, str]:
        streams = tuple(tmp_path / f"{name}-{rank}" for name in ("in", "out", "err"))
        streams[0].touch()
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        path, words = ROOT / "scripts" / f"{script}.py", list(map(str, arguments))
        status = as_script.run(path, words, tmp_path, environment, streams)
        return status, streams[2].read_text(encoding="utf-8")

    with ThreadPoolExecutor(2) as pool:
        finished = list(pool.map(run, range(2)))
    assert [status for status, _ in finished] == [0, 0], [err for _, err in finished]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def torchrun(
    folder: Path,
    *arguments: object,
    script: str = "train_text",
    nodes: int = 1,
    processes: int = 2,
) -> subprocess.CompletedProcess[str]:
    """A script in two processes, of one torchrun or, as on two machines, of one each.

    Args:
        folder: to work in.
        arguments: of the script.
        script: its name.
        nodes: how many torchruns there are.
        processes: of a single torchrun.

    Returns:
        The first, or only, torchrun; it fails if another does.
    """
    place = ["--standalone", "--nproc-per-node", str(processes)]
    if nodes == 2:
        place = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *place, "--node-rank", str(rank)),
                *(str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)),
            ],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(nodes)
    ]
    try:
        out, err = started[0].communicate(timeout=280)
        status = max(process.wait(timeout=60) for process in started)
    finally:
        for process in started:
            process.kill()
    return subprocess.CompletedProcess(started[0].args, status, out, err)


def test_two_processes_give_the_weights_of_one_with_the_same_batches(
    tmp_path: Path, script: Script
) -> None:
    """Two with batches of 8, one with 16, and one that accumulates two batches of 8."""
    stages = (*COMMON, "--pretrain-epochs", 0)
    script("train_text", *stages, "--batch-size", 16, "--output-dir", "one")
    accumulated = (*stages, "--batch-size", 8, "--gradient-accumulation", 2)
    script("train_text", *accumulated, "--output-dir", "accumulated")
    finished = torchrun(tmp_path, *stages, "--batch-size", 8, "--output-dir", "two")
    assert finished.returncode == 0, finished.stderr
    # One process speaks; that of some versions of torch lets gloo say something, too.
    (line,) = (line for line in finished.stdout.splitlines() if line.startswith("{"))
    assert json.loads(line)["output_dir"] == "two"
    assert finished.stderr.count("epoch 2/2") == 1
    one = load_file(tmp_path / "one" / "model.safetensors")
    for other in ("two", "accumulated"):
        weights = load_file(tmp_path / other / "model.safetensors")
        assert weights.keys() == one.keys()
        for name, weight in weights.items():
            np.testing.assert_allclose(weight, one[name], atol=1e-4, err_msg=f"{other}: {name}")


@pytest.mark.parametrize(
    ("further", "stages"),
    [
        ((), {"pretraining", "probe 1", "pretraining-again", "probe 2", "self-training"}),
        (("--ngrams", 0), {"training", "self-training"}),
    ],
)
def test_all_stages_run_in_two_processes(further: tuple, stages: set[str], tmp_path: Path) -> None:
    """With unlabelled texts, and the processes agree: the weights repeat, as on two machines."""
    data = tmp_path / "reviews"
    data.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 120), ("test", 30), ("unsupervised", 240)):
        rows = []
        for i in range(n):
            words = rng.choice(["plot", "film", "cast"], 8).tolist()
            words[3] = ("dull", "witty")[i % 2]
            row = {"text": " ".join(words), "label": -1 if split == "unsupervised" else i % 2}
            rows.append(json.dumps(row))
        (data / f"{split}.jsonl").write_text("\n".join(rows))
    options = ("--dataset", data, "--model", "nin-text-small", "--epochs", 1, "--batch-size", 8)
    options += further
    ranks(tmp_path, "train_text", *options, "--output-dir", "first")
    if further:
        ranks(tmp_path, "train_text", *options, "--output-dir", "second")
    else:
        finished = torchrun(tmp_path, *options, "--output-dir", "second", nodes=2)
        assert finished.returncode == 0, finished.stderr
    metrics = json.loads((tmp_path / "first" / "metrics.json").read_text())
    assert set(metrics["stage_seconds"]) == stages
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    for name, weight in first.items():
        np.testing.assert_array_equal(weight, second[name], err_msg=name)


def test_images_train_in_two_processes(tmp_path: Path) -> None:
    """With batch normalization, whose statistics differ between them until they are judged."""
    options = ("--limit", 100, "--epochs", 1, "--batch-size", 16)
    ranks(tmp_path, "train_image", *options, "--output-dir", "first")
    finished = torchrun(tmp_path, *options, "--output-dir", "second", script="train_image")
    assert finished.returncode == 0, finished.stderr
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    assert any("running_mean" in name for name in first)
    for name, weight in first.items():
        np.testing.assert_array_equal(weight, second[name], err_msg=name)


def test_a_mistake_is_a_sentence(tmp_path: Path) -> None:
    finished = torchrun(tmp_path, "--batch-size", 0)
    assert finished.returncode != 0
    assert finished.stdout == ""
    assert "error: --batch-size must be at least 1, not 0" in finished.stderr
