"""Classify some 2,200 characters: dense cross-entropy and the sparse one, compared on real input.

    python examples/classify_glyphs.py            # three to four minutes on two cores
    python examples/classify_glyphs.py --quick    # a smoke run

The data are the twelve DejaVu faces that matplotlib ships: one class per character that all of
them have, drawn once at 64 x 64 pixels and varied on the fly (size, shift, rotation, slant, blur,
noise). Eleven faces train. DejaVu Serif is never trained on: it is the test. The same small
network, from the same start and on the same batches, learns with

    dense        torch's cross-entropy over all classes
    dense+k20    two dense epochs, then k = 20
    annealed     one dense epoch, then k shrinking to 20
    k20          k = 20 from the first step, for two epochs: it fails, and its loss looks fine

The last is how not to use the loss. A switch to k = 20 before most targets are among the 20 best
fails like it. A network whose last hidden layer is normalised may get out of that trap, late:
``Support.hit`` shows which of the two happens.

Written to --out: classify_glyphs.png and classify_glyphs.json. Needs matplotlib and pillow.
"""

import argparse
import json
import math
import platform
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import sparse_ce
import torch
import torch.nn.functional as F
from console import Progress
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont
from sparse_ce import KSchedule, Support, backends, fused_sparse_ce
from torch import Tensor, nn

TEST_FACE = "DejaVuSerif"
TRAIN_FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
)  # fmt: skip
FACES = (TEST_FACE, *TRAIN_FACES)

K = 20
BATCH = 128
TILE = 64  # pixels a side of a drawn glyph
INPUT = 32  # pixels a side of what the network sees
QUICK_CLASSES = 128


@dataclass(frozen=True)
class Glyphs:
    characters: list[str]  # the character that stands for each class, V of them
    found: int  # characters before merging
    train: Tensor  # (11, V, TILE, TILE) uint8
    test: Tensor  # (V, TILE, TILE) uint8, the face that is never trained on
    shared: Tensor  # (V) bool: the test glyph is the same picture as that of a training face


def face_paths() -> list[Path]:
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    paths = [folder / f"{face}.ttf" for face in FACES]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise SystemExit(
            f"fonts: expected the {len(FACES)} DejaVu faces that matplotlib ships in {folder}, "
            f"got none of {', '.join(missing)}; "
            "`pip install --force-reinstall matplotlib` brings them back"
        )
    return paths


def common_characters(paths: list[Path]) -> list[str]:
    """The characters that all faces have, without combining marks and format characters."""
    charmaps = [FT2Font(str(path)).get_charmap() for path in paths]
    common = map(chr, sorted(set.intersection(*map(set, charmaps))))
    return [char for char in common if unicodedata.category(char) not in ("Mn", "Cf")]


def draw(path: Path, characters: list[str]) -> np.ndarray:
    """(V, TILE, TILE) uint8: white on black, on a common baseline, centred by the advance width."""
    font = ImageFont.truetype(str(path), 40, layout_engine=ImageFont.Layout.BASIC)
    tiles = np.empty((len(characters), TILE, TILE), np.uint8)
    for tile, char in zip(tiles, characters, strict=True):
        image = Image.new("L", (TILE, TILE))
        ImageDraw.Draw(image).text((TILE // 2, 45), char, font=font, fill=255, anchor="ms")
        tile[:] = np.asarray(image)
    return tiles


def merge_lookalikes(tiles: np.ndarray) -> list[int]:
    """(faces, characters, TILE, TILE) -> the first character of each class.

    Two characters are one class when at least half of the faces draw them as the same picture, as
    Latin A and Greek Alpha; so are two that each are one with a third.
    """
    same: Counter[tuple[int, int]] = Counter()
    for face in tiles:
        places: dict[bytes, list[int]] = {}
        for i, tile in enumerate(face):
            places.setdefault(tile.tobytes(), []).append(i)
        for place in places.values():
            same.update(combinations(place, 2))
    first = list(range(tiles.shape[1]))
    for (a, b), faces in sorted(same.items()):
        if 2 * faces >= len(tiles):
            low, high = sorted((first[a], first[b]))
            first = [low if i == high else i for i in first]
    return sorted(set(first))


def load_glyphs(limit: int | None, device: torch.device) -> Glyphs:
    paths = face_paths()
    characters = common_characters(paths)[:limit]
    tiles = np.stack([draw(path, characters) for path in paths])
    inked = np.flatnonzero(tiles.any((0, 2, 3)))
    tiles, characters = tiles[:, inked], [characters[i] for i in inked]
    kept = merge_lookalikes(tiles)
    glyphs = torch.from_numpy(tiles[:, kept]).to(device)
    test, train = glyphs[0], glyphs[1:]
    return Glyphs(
        characters=[characters[i] for i in kept],
        found=len(characters),
        train=train,
        test=test,
        shared=(train == test).flatten(2).all(-1).any(0),
    )


def augment(tiles: Tensor, generator: torch.Generator) -> Tensor:
    """(B, TILE, TILE) uint8 -> (B, 1, INPUT, INPUT) float32, each glyph varied by chance."""
    batch, device = len(tiles), tiles.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, device=device, generator=generator) * (high - low) + low

    size, angle, slant = uniform(0.9, 1.1), uniform(-0.06, 0.06), uniform(-0.12, 0.12)
    cos, sin = angle.cos() / size, angle.sin() / size
    shift_x, shift_y = uniform(-0.05, 0.05), uniform(-0.05, 0.05)
    affine = (cos, slant * cos - sin, shift_x, sin, slant * sin + cos, shift_y)
    theta = torch.stack(affine, -1).view(batch, 2, 3)
    grid = F.affine_grid(theta, [batch, 1, INPUT, INPUT], align_corners=False)
    image = F.grid_sample(tiles.unsqueeze(1).float().div_(255), grid, align_corners=False)
    image = torch.lerp(image, F.avg_pool2d(image, 3, 1, 1), uniform(0, 1).view(-1, 1, 1, 1))
    noise = torch.randn(image.shape, device=device, generator=generator)
    return image.addcmul_(noise, uniform(0, 0.12).view(-1, 1, 1, 1))


def make_network(num_classes: int) -> nn.Sequential:
    """(B, 1, 32, 32) -> (B, num_classes) logits; 0.64 M parameters at 2,200 classes."""

    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(channels_out), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(1, 16), *block(16, 32), *block(32, 64),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 192), nn.ReLU(), nn.Linear(192, num_classes),
    )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One way to train. Without a schedule the loss is torch's own cross-entropy."""

    name: str
    label: str
    schedule: KSchedule | None
    epochs: int


def make_lines(num_classes: int, steps: int, epochs: int) -> list[Line]:
    def schedule(dense_epochs: int, anneal_epochs: int) -> KSchedule:
        return KSchedule(num_classes, K, dense_epochs * steps, anneal_epochs * steps)

    return [
        Line("dense", "dense cross-entropy", None, epochs),
        Line("dense+k20", f"2 dense epochs, then k = {K}", schedule(2, 0), epochs),
        Line("annealed", f"k annealed to {K}", schedule(1, (epochs - 1) // 2), epochs),
        Line("k20", f"k = {K} from scratch", schedule(0, 0), 2),
    ]


class Clock:
    """Points in time of a device; on a GPU events in its stream, so that nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self.gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


@torch.inference_mode()
def evaluate(network: nn.Module, images: Tensor, target: Tensor) -> Support:
    """The network's top K classes of each image."""
    network.eval()
    logits = torch.cat([network(part) for part in images.split(512)])
    return fused_sparse_ce(logits, target, K, return_support=True)[1]


def scores(support: Support, target: Tensor, shared: Tensor) -> dict[str, float]:
    first = support.accuracy(target).float()
    return {
        "top1": first.mean().item(),
        "top5": (support.indices[:, :5] == target.unsqueeze(-1)).any(-1).float().mean().item(),
        f"top{K}": support.hit(target).float().mean().item(),
        "top1_unshared": first[~shared].mean().item(),
    }


def train(
    line: Line, glyphs: Glyphs, test_images: Tensor, epochs: int, seed: int
) -> tuple[dict[str, Any], Support]:
    """One line: what happened in each epoch, and the network's last answers to the test."""
    device, num_classes = glyphs.train.device, len(glyphs.characters)
    # one seed for all lines: the same start, the same batches, the same noise
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    network = make_network(num_classes).to(device, memory_format=torch.channels_last)
    tiles = glyphs.train.flatten(0, 1)
    test_target = torch.arange(num_classes, device=device)
    steps = len(tiles) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    # a line that stops early runs the first epochs of the same schedule
    learning_rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    clock, history, step, started = Clock(device), [], 0, time.perf_counter()
    print(line.label)

    for epoch in range(1, line.epochs + 1):
        progress = Progress(f"  epoch {epoch}/{line.epochs}", steps)
        network.train()
        losses, hits, marks = torch.zeros((), device=device), torch.zeros((), device=device), []
        order = torch.randperm(len(tiles), device=device, generator=generator)
        for batch in order[: steps * BATCH].view(steps, BATCH):
            points = [clock.mark()]
            target = batch % num_classes
            logits = network(augment(tiles[batch], generator))

            k = num_classes if line.schedule is None else line.schedule(step)
            support = None
            points.append(clock.mark())
            if line.schedule is None:
                loss = F.cross_entropy(logits, target)
            elif k == num_classes:
                loss = fused_sparse_ce(logits, target, k)
            else:
                loss, support = fused_sparse_ce(logits, target, k, return_support=True)
            points.append(clock.mark())

            # the hook runs between the backward pass of the loss and that of the network
            logits.register_hook(lambda _, points=points: points.append(clock.mark()))
            optimizer.zero_grad()
            points.append(clock.mark())
            loss.backward()
            optimizer.step()
            learning_rate.step()
            points.append(clock.mark())

            marks.append(points)
            losses += loss.detach()
            # a dense support holds every class
            hits += 1.0 if support is None else support.hit(target).float().mean()
            step += 1
            progress.show(step - (epoch - 1) * steps)

        in_step = in_loss = 0.0
        for start, forward, forward_end, backward, backward_end, end in marks:
            in_step += clock.seconds(start, end)
            in_loss += clock.seconds(forward, forward_end) + clock.seconds(backward, backward_end)
        answers = evaluate(network, test_images, test_target)
        record = {
            "epoch": epoch,
            "k": k,
            "training_loss": losses.item() / steps,
            "in_support": hits.item() / steps,
            "loss_share_of_step": in_loss / in_step,
            "step_ms": 1000 * in_step / steps,
            **scores(answers, test_target, glyphs.shared),
        }
        history.append({name: round(value, 6) for name, value in record.items()})
        progress.done(
            f"k {k:>4}  loss {record['training_loss']:.2f}  "
            f"in support {record['in_support']:6.1%}  "
            f"test top-1 {record['top1']:5.1%}  top-5 {record['top5']:5.1%}"
        )
    seconds = time.perf_counter() - started
    return {"name": line.name, "label": line.label, "seconds": seconds, "epochs": history}, answers


def table(results: list[dict[str, Any]]) -> str:
    columns = "{:28}{:>7}{:>8}{:>8}{:>8}{:>7}{:>12}{:>11}{:>9}"
    head = ("", "epochs", "top-1", "top-5", "top-1*", "loss", "in support", "loss time", "seconds")
    lines = [columns.format(*head)]
    lines.append("-" * len(lines[0]))
    for result in results:
        last = result["epochs"][-1]
        shares = [f"{last[name]:.1%}" for name in ("top1", "top5", "top1_unshared")]
        lines.append(
            columns.format(
                result["label"],
                last["epoch"],
                *shares,
                f"{last['training_loss']:.2f}",
                f"{last['in_support']:.1%}",
                f"{last['loss_share_of_step']:.1%}",
                f"{result['seconds']:.0f}",
            )
        )
    return "\n".join(lines)


# Okabe and Ito's palette: told apart with any colour vision
STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#BBBBBB", "marker": "o", "markersize": 13, "linewidth": 7},
    "dense+k20": {"color": "#0072B2", "marker": "s", "markersize": 7, "linestyle": "--"},
    "annealed": {"color": "#000000", "marker": "^", "markersize": 6, "linestyle": ":"},
    "k20": {"color": "#D55E00", "marker": "X", "markersize": 9},
}
RIGHT = "#0072B2"


def plot_accuracy(axes: Axes, results: list[dict[str, Any]]) -> None:
    for result in results:
        epochs, label = result["epochs"], f"{result['label']}: {result['epochs'][-1]['top1']:.1%}"
        style = {"linewidth": 2, "label": label, **STYLES[result["name"]]}
        axes.plot([e["epoch"] for e in epochs], [100 * e["top1"] for e in epochs], **style)
    last, color = results[-1]["epochs"][-1], STYLES["k20"]["color"]
    axes.annotate(
        f"training loss {last['training_loss']:.2f} (log {K} = {math.log(K):.2f}),\n"
        f"but {last['in_support']:.1%} of the targets in the support",
        (last["epoch"], 100 * last["top1"]),
        xytext=(25, 14),
        textcoords="offset points",
        va="center",
        color=color,
        arrowprops={"arrowstyle": "-", "color": color},
    )
    axes.set(
        title=f"Accuracy on {TEST_FACE}, a face never trained on",
        xlabel="epoch",
        ylabel="top-1 accuracy, %",
        ylim=(-2, 100),
        xticks=range(1, results[0]["epochs"][-1]["epoch"] + 1),
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")


def plot_guesses(
    axes: Axes, glyphs: Glyphs, images: Tensor, support: Support, groups: dict[str, list[int]]
) -> None:
    """A row per test glyph: its noisy image, the glyph itself and the five best guesses."""
    columns = (0.0, 1.15, 2.6, 3.75, 4.9, 6.05, 7.2)
    for x, text in ((0.5, "input"), (1.65, "truth"), (5.4, "five best guesses")):
        axes.text(x, -0.2, text, ha="center", va="bottom")
    top = 0.0
    for heading, rows in groups.items():
        axes.text(0, top + 0.1, heading, style="italic", va="center")
        top += 0.4
        for row in rows:
            guesses = support.indices[row, :5].tolist()
            tiles = [images[row, 0].clamp(0, 1).mul(255), glyphs.test[row], *glyphs.test[guesses]]
            for x, tile in zip(columns, tiles, strict=True):
                box = (x, x + 1, top + 1, top)
                axes.imshow(255 - tile.cpu().numpy(), cmap="gray", vmin=0, vmax=255, extent=box)
                frame = Rectangle((x, top), 1, 1, fill=False, edgecolor="#BBBBBB", linewidth=1)
                axes.add_patch(frame)
            for x, guess, p in zip(columns[2:], guesses, support.probs[row, :5], strict=True):
                text, color, weight = f"{p.item():.0%}", "#444444", "normal"
                if guess == row:
                    text, color, weight = f"\N{CHECK MARK} {text}", RIGHT, "bold"
                    frame = Rectangle((x, top), 1, 1, fill=False, edgecolor=color, linewidth=3.5)
                    axes.add_patch(frame)
                axes.text(
                    x + 0.5, top + 1.05, text, ha="center", va="top", color=color, weight=weight
                )
            top += 1.38
    axes.set(
        title="Test glyphs, and the guesses of the dashed line's network",
        xlim=(-0.05, 8.25),
        ylim=(top, -0.5),
    )
    axes.axis("off")


def draw_picture(
    path: Path,
    results: list[dict[str, Any]],
    glyphs: Glyphs,
    images: Tensor,
    support: Support,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(glyphs.characters), generator=generator).to(images.device)
    wrong = order[support.indices[order, 0] != order]
    groups = {
        "picked at random": order[:5].tolist(),
        "picked at random from its mistakes": wrong[-3:].tolist(),
    }
    with matplotlib.rc_context({"font.size": 12}):
        # without pyplot: needs no display
        figure = Figure(figsize=(13, 8.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot_accuracy(left, results)
        plot_guesses(right, glyphs, images, support, groups)
        figure.savefig(path, dpi=130)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Many-class glyph classification with dense and sparse cross-entropy."
    )
    parser.add_argument("--epochs", type=int, help="at least 3; default 7, with --quick 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU; default 2")
    parser.add_argument("--out", type=Path, default=Path("out", "classify_glyphs"), metavar="DIR")
    parser.add_argument(
        "--quick", action="store_true", help=f"a smoke run on {QUICK_CLASSES} characters"
    )
    arguments = parser.parse_args()
    if arguments.epochs is None:
        arguments.epochs = 3 if arguments.quick else 7
    if arguments.epochs < 3:
        parser.error(f"--epochs: expected at least 3, got {arguments.epochs}")
    return arguments


def describe_machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparse_ce": sparse_ce.__version__,
        "matplotlib": matplotlib.__version__,
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "sparse_ce_backend": backends.resolve("auto", device.type, torch.float32, False),
    }


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.deterministic = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    machine = describe_machine(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))

    glyphs = load_glyphs(QUICK_CLASSES if arguments.quick else None, device)
    num_classes, num_shared = len(glyphs.characters), int(glyphs.shared.sum())
    print(
        f"{glyphs.found} characters, {num_classes} classes after merging lookalikes; "
        f"{len(TRAIN_FACES)} faces train, {TEST_FACE} tests\n"
        f"{num_shared} of its glyphs are the same picture in a training face: "
        "top-1* leaves them out\n"
    )
    # the test is varied like the training glyphs, once, the same for all lines
    test_generator = torch.Generator(device).manual_seed(arguments.seed + 1)
    test_images = augment(glyphs.test, test_generator)
    steps = len(TRAIN_FACES) * num_classes // BATCH
    results, answers = [], {}
    for line in make_lines(num_classes, steps, arguments.epochs):
        result, answers[line.name] = train(
            line, glyphs, test_images, arguments.epochs, arguments.seed
        )
        results.append(result)

    dense = results[0]["epochs"][-1]["top1"]
    deviation = math.sqrt(dense * (1 - dense) / num_classes)
    print(f"""
{table(results)}

top-1, top-5  on the face never trained on; one standard error of a top-1 is {deviation:.1%},
              and another seed moves it by 1 to 2 points
loss          in training; k = {K} compares a target with {K} classes, the dense softmax
              with all, so these losses are not comparable
in support    targets that were among the k classes, in training
loss time     share of a training step that the loss takes, forward and backward: so small that
              this run compares accuracy, and says nothing about speed (bench/ does)
              (loss, in support and loss time: of the last epoch)
""")
    if arguments.quick:
        print("A smoke run: too few classes and steps for its numbers to mean anything.")
    else:
        scratch = results[-1]["epochs"][-1]
        guessed = answers["k20"].indices.unique().numel()
        print(
            f"k = {K} from scratch: a training loss of {scratch['training_loss']:.2f} looks like "
            f"success, but {K} equal logits give log {K} = {math.log(K):.2f}.\n"
            f"In the support were {scratch['in_support']:.1%} of the targets, where chance gives "
            f"{K / num_classes:.1%}; its {K} best guesses for all test glyphs\n"
            f"come from {guessed} of the {num_classes} classes. Start dense, or anneal."
        )

    arguments.out.mkdir(parents=True, exist_ok=True)
    picture, numbers = (arguments.out / f"classify_glyphs.{suffix}" for suffix in ("png", "json"))
    draw_picture(picture, results, glyphs, test_images, answers["dense+k20"], arguments.seed)
    report = {
        "machine": machine,
        "settings": {
            "k": K,
            "batch": BATCH,
            "epochs": arguments.epochs,
            "seed": arguments.seed,
            "quick": arguments.quick,
        },
        "data": {
            "characters": glyphs.found,
            "classes": num_classes,
            "test_glyphs_shared_with_training": num_shared,
            "training_faces": TRAIN_FACES,
            "test_face": TEST_FACE,
        },
        "parameters": sum(p.numel() for p in make_network(num_classes).parameters()),
        "standard_error_top1": deviation,
        "lines": results,
        "seconds": time.perf_counter() - started,
    }
    numbers.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{report['seconds']:.0f} s; wrote {picture} and {numbers}")


if __name__ == "__main__":
    main()
