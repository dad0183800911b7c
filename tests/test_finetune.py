"""The fine-tuning example on a tiny network: its losses agree at k = V, its judge is dense."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import finetune_smollm as example  # noqa: E402

CLASSES, FEATURES, WINDOW = 300, 8, 16


@pytest.fixture(params=[True, False], ids=["head-only", "whole-model"])
def problem(request, monkeypatch):
    """A network, windows to train on and to judge by, and settings."""
    torch.manual_seed(0)
    monkeypatch.setattr(example, "WINDOW", WINDOW)
    settings = example.Settings(
        head_only=request.param, steps=8, validation_windows=2, optimizer="sgd", learning_rate=1e-2
    )
    embedding = nn.Embedding(CLASSES, FEATURES)
    network = example.Network(nn.Sequential(embedding, nn.Tanh()), embedding.weight)
    tokens = torch.randint(CLASSES, (4000,)).tolist()
    training, validation = example.split(tokens, settings, torch.device("cpu"))
    if settings.head_only:
        training, validation = (
            example.hidden_states(network, windows, "") for windows in (training, validation)
        )
        network = example.Network(nn.Identity(), nn.Parameter(embedding.weight.detach().clone()))
    return network, training, validation, settings


def test_the_losses_train_alike_where_k_is_all(problem, monkeypatch):
    lines = [line for line in example.make_lines() if line.k is None]
    lines.append(example.Line("sparse", "", example.fused_linear_sparse_ce, CLASSES))
    # a line that ends dense, from its first step on
    monkeypatch.setattr(example.KSchedule, "__call__", lambda schedule, step: schedule.num_classes)
    lines.append(example.Line("end", "", example.fused_linear_sparse_ce, 5, ends_dense=True))
    dense, *others = (example.train(line, *problem) for line in lines)
    network, _, validation, _ = problem
    before = example.evaluate(network, validation)
    for result in others:
        assert result["head_peak_bytes"] > 0 and result["head_ms"] > 0
        for own, wanted in zip(result["history"], dense["history"], strict=True):
            assert own["tokens"] == wanted["tokens"]
            # float32 roundings of losses near log V, over a few steps
            assert own["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
            assert own["training_loss"] == pytest.approx(wanted["training_loss"], rel=1e-5)
    # the start is the same for all: training has left it alone, and has changed its copy
    assert example.evaluate(network, validation) == before
    assert abs(dense["history"][-1]["loss"] - before["loss"]) > 1e-3


def test_perplexity_is_the_dense_one_and_shares_are_of_the_dense_softmax(problem):
    network, _, validation, _ = problem
    with torch.no_grad():
        logits = (network.trunk(validation.inputs) @ network.weight.t()).flatten(0, 1).double()
    target = validation.target.flatten()
    found = example.evaluate(network, validation)
    wanted = F.cross_entropy(logits, target)
    assert found["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(wanted.exp().item(), rel=1e-5)
    for k in example.KS:
        mass, best = logits.softmax(-1).topk(k)
        hit = (best == target.unsqueeze(-1)).any(-1).double().mean().item()
        mass = mass.sum(-1).mean().item()
        assert found["mass_in_support"][k] == pytest.approx(mass, rel=1e-5)
        assert found["targets_in_support"][k] == pytest.approx(hit)


def test_the_split_keeps_what_is_judged_out_of_training():
    settings = example.Settings(
        head_only=True, steps=1, validation_windows=1, optimizer="sgd", learning_rate=1.0
    )
    size = 10 * (2 * example.WINDOW + 1)
    parts = example.split(list(range(size)), settings, torch.device("cpu"))
    for (inputs, target), begin in zip(parts, (0, 9 * size // 10), strict=True):
        assert inputs[0, 0] == begin and torch.equal(target, inputs + 1)
    with pytest.raises(SystemExit, match="expected 1 windows of 512 tokens in its last tenth"):
        example.split(list(range(5000)), settings, torch.device("cpu"))


def test_a_paragraph_of_the_default_text_stands_there_once():
    text, about = example.load_text(None)
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs) and len(text) > 100_000
    assert "Python" in about
