"""Adaptive sparse softmax on the glyph task: classes that have been learnt drop out.

    python examples/adaptive_glyphs.py            # about eight minutes on two quiet cores
    python examples/adaptive_glyphs.py --quick    # a smoke run

Data, network and augmentation are those of classify_glyphs.py. For each of several seeds, from the
same start and on the same micro-batches, the network learns with

    dense           torch's cross-entropy
    smoothing       the same with label smoothing
    dense+k20       two dense epochs, then Sparse-softmax with k = 20
    adaptive        adaptive_sparse_ce: a class that the target beats by delta drops out
    accumulation    the same, and an update takes two micro-batches once enough rows are learnt

A row is learnt when the target beats every other class by delta: its adaptive loss is 0. The share
of such rows is measured for every line, whatever its loss. Accuracies that were published for the
five stand beside ours (Lv et al., Adaptive Sparse Softmax, arXiv 2508.03175, from the picture in
the authors' repository): intents of sentences, 150 and one of none, by BERT. Another task.

Written to --out: adaptive_glyphs.png and adaptive_glyphs.json. Needs matplotlib and pillow.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from classify_glyphs import (
    BATCH,
    TEST_FACE,
    TRAIN_FACES,
    Clock,
    Glyphs,
    K,
    augment,
    describe_machine,
    evaluate,
    load_glyphs,
    make_network,
    scores,
)
from console import Progress
from matplotlib.figure import Figure
from sparse_ce import AdaptiveAccumulation, KSchedule, adaptive_sparse_ce, fused_sparse_ce
from torch import Tensor

DELTA = 0.1  # the published default
SMOOTHING = 0.1
MAX_STEPS = 2  # micro-batches to an update, the published default
EVALUATIONS = 2  # an epoch
QUICK_CLASSES = 32
NEAR = 0.95  # of what the worst run ends with: the accuracy to which the way is measured
Loss = Callable[[Tensor, Tensor, int], Tensor]  # of logits (N, V), target (N), step


@dataclass(frozen=True)
class Line:
    name: str
    label: str
    published: float  # accuracy on Clinc-OOS, BERT, %
    loss: Loss | None  # None: the adaptive one
    accumulates: bool = False


def cross_entropy(logits: Tensor, target: Tensor, step: int, smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=smoothing)


def make_lines(num_classes: int, steps: int) -> list[Line]:
    schedule = KSchedule(num_classes, K, warmup_steps=2 * steps, anneal_steps=0)

    def sparse(logits: Tensor, target: Tensor, step: int) -> Tensor:
        return fused_sparse_ce(logits, target, schedule(step))

    smooth = partial(cross_entropy, smoothing=SMOOTHING)
    return [
        Line("dense", "dense cross-entropy", 88.60, cross_entropy),
        Line("smoothing", f"label smoothing {SMOOTHING}", 88.64, smooth),
        Line("dense+k20", f"2 dense epochs, then k = {K}", 89.02, sparse),
        Line("adaptive", f"adaptive, delta = {DELTA}", 89.07, None),
        Line("accumulation", "adaptive, accumulating", 88.78, None, accumulates=True),
    ]


def train(
    line: Line, glyphs: Glyphs, test_images: Tensor, epochs: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """One line from one seed: what had happened at each evaluation.

    Seconds are those of training steps: evaluations, and the count of learnt rows where the loss
    does not need it, are off the clock.
    """
    device, num_classes = glyphs.train.device, len(glyphs.characters)
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    network = make_network(num_classes).to(device, memory_format=torch.channels_last)
    tiles = glyphs.train.flatten(0, 1)
    test_target = torch.arange(num_classes, device=device)
    steps = len(tiles) // BATCH
    points = {round(steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    # a step of the schedule per micro-batch: all lines have seen as much at the same learning rate
    learning_rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    accumulation = AdaptiveAccumulation(max_steps=MAX_STEPS) if line.accumulates else None
    clock, history, step, updates, seconds = Clock(device), [], 0, 0, 0.0

    for _ in range(epochs):
        order = torch.randperm(len(tiles), device=device, generator=generator)
        marks, losses, learnt = [], [], []
        for place, batch in enumerate(order[: steps * BATCH].view(steps, BATCH), 1):
            begin = clock.mark()
            target = batch % num_classes
            logits = network(augment(tiles[batch], generator))
            if line.loss is None:
                loss, support = adaptive_sparse_ce(logits, target, DELTA, return_support=True)
            else:
                loss, support = line.loss(logits, target, step), None
            micro_batches = 1
            if accumulation is not None:
                micro_batches = accumulation.steps(support.learnt, support.counted)
            (loss / micro_batches).backward()
            if accumulation is None or accumulation.is_complete():
                optimizer.step()
                optimizer.zero_grad()
                updates += 1
            learning_rate.step()
            marks.append((begin, clock.mark()))
            step += 1

            losses.append(loss.detach())
            learnt.append(share_learnt(logits, target) if support is None else support.learnt)
            progress.show(step)
            if place in points:
                seconds += sum(clock.seconds(*pair) for pair in marks)
                answers = evaluate(network, test_images, test_target)
                history.append(
                    {
                        "epoch": step / steps,
                        "updates": updates,
                        "seconds": seconds,
                        "training_loss": torch.stack(losses).mean().item(),
                        "learnt": torch.stack(learnt).float().mean().item(),
                        **scores(answers, test_target, glyphs.shared),
                    }
                )
                network.train()
                marks, losses, learnt = [], [], []
    return {"seed": seed, "history": history}


def share_learnt(logits: Tensor, target: Tensor) -> Tensor:
    """Which rows the adaptive loss would call learnt."""
    return adaptive_sparse_ce(logits.detach(), target, DELTA, return_support=True)[1].learnt


def way_to(accuracy: float, history: list[dict[str, Any]], name: str) -> float:
    """What `name` had come to when the test accuracy first was there, linear between points."""
    start = {"top1": 0.0, name: 0.0}
    for before, after in pairwise([start, *history]):
        if after["top1"] >= accuracy:
            part = (accuracy - before["top1"]) / (after["top1"] - before["top1"])
            return before[name] + part * (after[name] - before[name])
    raise ValueError(f"accuracy: expected one that the run reaches, got {accuracy:.3f}")


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds: of each line the mean and the standard deviation of what the table shows."""
    last = [run["history"][-1]["top1"] for result in results for run in result["runs"]]
    accuracy, lines = NEAR * min(last), {}
    for result in results:
        runs = [run["history"] for run in result["runs"]]
        values = {name: [run[-1][name] for run in runs] for name in runs[0][-1] if name != "epoch"}
        for name in ("updates", "seconds"):
            values[f"{name}_to_accuracy"] = [way_to(accuracy, run, name) for run in runs]
        lines[result["name"]] = {
            name: {"mean": mean(each), "deviation": stdev(each) if len(each) > 1 else None}
            for name, each in values.items()
        }
    return {"accuracy": accuracy, "lines": lines}


def table(results: list[dict[str, Any]], found: dict[str, Any]) -> str:
    mark = f"{found['accuracy']:.1%}"
    names = ["loss", "top-1, %", "top-5, %", "learnt, %", "updates", "s"]
    names += [f"updates to {mark}", f"s to {mark}", "published, %"]
    rows = [names, ["---"] * len(names)]
    for result in results:
        line = found["lines"][result["name"]]

        def cell(name: str, form: str = ".0f", scale: float = 1, line: Any = line) -> str:
            value, deviation = (line[name][part] for part in ("mean", "deviation"))
            spread = "" if deviation is None else f" ± {scale * deviation:{form}}"
            return f"{scale * value:{form}}{spread}"

        row = [result["label"], *(cell(name, ".1f", 100) for name in ("top1", "top5", "learnt"))]
        row += [cell("updates"), cell("seconds"), cell("updates_to_accuracy")]
        rows.append([*row, cell("seconds_to_accuracy"), f"{result['published']:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# Okabe and Ito's palette: told apart with any colour vision
STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#999999", "marker": "o", "linewidth": 5},
    "smoothing": {"color": "#E69F00", "marker": "v", "linestyle": "-."},
    "dense+k20": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    "adaptive": {"color": "#000000", "marker": "^"},
    "accumulation": {"color": "#D55E00", "marker": "X", "linestyle": ":"},
}


def draw_picture(path: Path, results: list[dict[str, Any]]) -> None:
    with matplotlib.rc_context({"font.size": 12}):
        # without pyplot: needs no display
        figure = Figure(figsize=(13, 5.6), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, name in zip(panels, ("top1", "learnt"), strict=True):
            for result in results:
                histories = [run["history"] for run in result["runs"]]
                epochs = [point["epoch"] for point in histories[0]]
                values = [[100 * point[name] for point in history] for history in histories]
                points = list(zip(*values, strict=True))
                style = {"linewidth": 2, "markersize": 6, **STYLES[result["name"]]}
                label = f"{result['label']}: {mean(points[-1]):.1f} %"
                axes.plot(epochs, [mean(point) for point in points], label=label, **style)
                low, high = ([best(point) for point in points] for best in (min, max))
                axes.fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, loc="upper left")
            axes.set(xlabel="epoch", ylim=(-2, 102), xticks=range(1, round(epochs[-1]) + 1))
        seeds = len(results[0]["runs"])
        spread = f"mean of {seeds} seeds, lowest to highest" if seeds > 1 else "one seed"
        panels[0].set(
            title=f"Accuracy on {TEST_FACE}, a face never trained on", ylabel=f"top-1, %: {spread}"
        )
        panels[1].set(
            title=f"Training rows whose target beats all others by {DELTA}", ylabel="learnt rows, %"
        )
        figure.savefig(path, dpi=130)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Adaptive sparse softmax beside other losses, on glyphs of many classes."
    )
    add = parser.add_argument
    add("--epochs", type=int, help="at least 3; default 5, with --quick 3")
    add("--seeds", type=int, help="how many: 0, 1, ...; default 3, with --quick 2")
    add("--threads", type=int, default=2, help="of torch on the CPU; default 2")
    add("--out", type=Path, default=Path("out", "adaptive_glyphs"), metavar="DIR")
    add("--quick", action="store_true", help=f"a smoke run on {QUICK_CLASSES} characters")
    arguments = parser.parse_args()
    if arguments.epochs is None:
        arguments.epochs = 3 if arguments.quick else 5
    if arguments.seeds is None:
        arguments.seeds = 2 if arguments.quick else 3
    for name, least in (("epochs", 3), ("seeds", 1), ("threads", 1)):
        value = getattr(arguments, name)
        if value < least:
            parser.error(f"--{name}: expected at least {least}, got {value}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.deterministic = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started, machine = time.perf_counter(), describe_machine(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))

    glyphs = load_glyphs(QUICK_CLASSES if arguments.quick else None, device)
    num_classes = len(glyphs.characters)
    steps = len(TRAIN_FACES) * num_classes // BATCH
    lines = make_lines(num_classes, steps)
    runs = len(lines) * arguments.seeds
    print(
        f"{num_classes} classes; {len(TRAIN_FACES)} faces train, {TEST_FACE} tests\n"
        f"{len(lines)} lines x {arguments.seeds} seeds = {runs} runs of {arguments.epochs} epochs "
        f"of {steps} micro-batches of {BATCH}"
    )
    # varied like the training glyphs, once, the same for all runs
    test_images = augment(glyphs.test, torch.Generator(device).manual_seed(1))
    results = [
        {"name": line.name, "label": line.label, "published": line.published, "runs": []}
        for line in lines
    ]
    # seed by seed, so that what else the machine does meets all lines alike
    began = time.perf_counter()
    for seed in range(arguments.seeds):
        for i, line in enumerate(lines):
            progress = Progress(f"  seed {seed}, {line.label}", arguments.epochs * steps)
            run = train(line, glyphs, test_images, arguments.epochs, seed, progress)
            results[i]["runs"].append(run)
            done, last = seed * len(lines) + i + 1, run["history"][-1]
            left = (time.perf_counter() - began) * (runs / done - 1)
            progress.done(
                f"top-1 {last['top1']:5.1%}  learnt {last['learnt']:5.1%}  "
                f"{last['updates']} updates  {last['seconds']:.0f} s  "
                f"(about {left / 60:.0f} min left)"
            )

    found = summary(results)
    print(f"""
{table(results, found)}

± the standard deviation over seeds. Learnt: rows of the last half epoch of training whose target
beats all other classes by {DELTA}. Updates: optimiser steps. s: of training steps alone. To
{found["accuracy"]:.1%}: {NEAR:.0%} of what the worst run ends with, linear between evaluations.
Published: Clinc-OOS, 151 intents, fine-tuned BERT, no spread given: another task, with another
start. That paper reports about 1.2 times faster training for accumulation.
""")
    if arguments.quick:
        print("A smoke run: too few classes and steps for its numbers to mean anything.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture, numbers = (arguments.out / f"adaptive_glyphs.{suffix}" for suffix in ("png", "json"))
    draw_picture(picture, results)
    report = {
        "machine": machine,
        "settings": {
            "delta": DELTA,
            "label_smoothing": SMOOTHING,
            "k": K,
            "max_steps": MAX_STEPS,
            "batch": BATCH,
            "epochs": arguments.epochs,
            "seeds": arguments.seeds,
            "quick": arguments.quick,
        },
        "data": {
            "classes": num_classes,
            "training_faces": TRAIN_FACES,
            "test_face": TEST_FACE,
        },
        "summary": found,
        "lines": results,
        "seconds": time.perf_counter() - started,
    }
    numbers.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['seconds']:.0f} s; wrote {picture} and {numbers}")


if __name__ == "__main__":
    main()
