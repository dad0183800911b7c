"""What README shows for a model of transformers, in its Trainer: with k=None the training of the
model's own loss.
"""

import os
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

transformers = pytest.importorskip("transformers", reason="the package transformers is missing")
pytest.importorskip("accelerate", reason="its Trainer needs the package accelerate")

README = (Path(__file__).parent.parent / "README.md").read_text()
CLASSES, LENGTH = 500, 20


def shown(options: str) -> str:
    """The lines of README, with these options of the head in place of its own."""
    (block,) = re.findall(
        r"^( {4}import types\n.*?MethodType\(forward, model\)\n)", README, re.M | re.S
    )
    code, replaced = re.subn(
        r"k=20, \*\*options", f'{options}, reduction="sum"', textwrap.dedent(block)
    )
    assert replaced == 1
    return code


def model_of(options: str | None, tied: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=CLASSES, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    if options is not None:
        exec(shown(options), {"model": model})
    return model


def trained(
    model: torch.nn.Module, folder: Path, count: int = 1, **options: Any
) -> tuple[dict[str, torch.Tensor], float]:
    """Weights and the loss of evaluation, after three steps of eight rows on `count` ranks."""
    torch.manual_seed(1)
    rows = torch.randint(0, CLASSES, (8, LENGTH))
    labels = rows.masked_fill(torch.rand(rows.shape) < 0.3, -100)
    mask = torch.ones(LENGTH, dtype=torch.int64)
    data = [
        {"input_ids": row, "labels": of_row, "attention_mask": mask}
        for row, of_row in zip(rows, labels, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=4 // count,
        gradient_accumulation_steps=2, learning_rate=1e-2, optim="sgd", seed=1, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no",
        per_device_eval_batch_size=8 // count, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    weights = {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t
        for name, t in model.state_dict().items()
    }
    return weights, trainer.evaluate()["eval_loss"]


def assert_same(
    found: tuple[dict[str, torch.Tensor], float],
    wanted: tuple[dict[str, torch.Tensor], float],
    start: dict[str, torch.Tensor],
    updates: int = 0,
) -> set[str]:
    """Within what float32 rounds in three steps, and where weights are large beside their updates
    by what each of `updates` rounds. Returns the names of what has been trained.
    """
    trained, ulp = set(), torch.finfo(torch.float32).eps
    assert found[0].keys() == wanted[0].keys()
    for name, weight in wanted[0].items():
        moved = (weight - start[name]).abs().max().item()
        within = 1e-4 * moved + updates * ulp * weight.abs().max().item()
        torch.testing.assert_close(found[0][name], weight, rtol=0, atol=within)
        if moved > 0:
            trained.add(name)
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)
    return trained


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trainer(tied: bool, tmp_path: Path) -> None:
    """Same weights, and another loss for another k."""
    wanted = trained(model_of(None, tied), tmp_path)
    found = trained(model_of("k=None", tied), tmp_path)
    start = model_of(None, tied).state_dict()
    assert assert_same(found, wanted, start) == start.keys()
    sparse = trained(model_of("k=5", tied), tmp_path)[1]
    assert sparse < 0.9 * wanted[1]  # of five classes, not of 500


def on_a_rank(rank: int, folder: Path, way: str) -> tuple[dict[str, torch.Tensor], float]:
    # what torchrun would say of the group, which is there already
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
    }  # fmt: skip
    options = {"fsdp": True, "fsdp_config": {"fsdp_version": 2}} if way == "fsdp" else {}
    return trained(model_of("k=5", True), folder / str(rank), 2, **options)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_trainer_of_two_ranks(way: str, tmp_path: Path) -> None:
    """The same batches, each rank with its half of them: the same weights."""
    if ranks.available("cpu") < 2:
        pytest.skip("torch was built without gloo")
    wanted = trained(model_of("k=5", True), tmp_path)
    start = model_of("k=5", True).state_dict()
    for found in ranks.run(2, "cpu", on_a_rank, tmp_path, way):
        assert assert_same(found, wanted, start) == start.keys()


@pytest.mark.parametrize("saved", [[], ["lm_head"]], ids=["head frozen", "head trained"])
def test_adapters(saved: list[str], tmp_path: Path) -> None:
    """LoRA of the package peft, which wraps a head that is trained beside the adapters."""
    peft = pytest.importorskip("peft", reason="the package peft is missing")

    def adapted(options: str | None) -> torch.nn.Module:
        model = model_of(options, False)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved, init_lora_weights=False
        )
        return peft.get_peft_model(model, config)

    wanted, found = (trained(adapted(options), tmp_path) for options in (None, "k=None"))
    moved = assert_same(found, wanted, adapted(None).state_dict(), updates=3)
    assert len(moved) == 4 + len(saved)


def test_calls() -> None:
    """What a loop passes beside labels: as the model itself takes it."""
    ids = torch.arange(2 * LENGTH).view(2, LENGTH)
    plain = model_of(None, False)
    embedded = plain.get_input_embeddings()(ids).detach()
    calls: tuple[dict[str, Any], ...] = (
        {"input_ids": ids, "labels": ids},
        {"inputs_embeds": embedded, "labels": ids},
        {"inputs_embeds": embedded, "labels": ids, "return_dict": False},
        {"inputs_embeds": embedded},
        {"input_ids": ids, "return_dict": False},
    )
    for call in calls:
        # all 500 of the softmax, the gradient of five
        wanted, found = plain(**call), model_of('k=5, normalizer="full"', False)(**call)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=0)


def test_generate() -> None:
    prompt = torch.arange(5).unsqueeze(0)
    wanted, found = (
        model_of(options, False).generate(prompt, max_new_tokens=5, do_sample=False)
        for options in (None, "k=20")
    )
    assert torch.equal(found, wanted)
