"""Schedules: for k, and for how many micro-batches an update takes."""

from torch import Tensor

from . import checks


class KSchedule:
    """``schedule(step)`` is the k of that step: dense, then shrinking geometrically, then ``k``, at
    the end dense again.

    Args:
        num_classes: k of the dense steps.
        k: what is left of it.
        warmup_steps: dense steps at first.
        anneal_steps: steps in which k falls from ``num_classes`` to ``k``, by the same factor each.
        dense_from: the step from which on all are dense again; None: none is.

    ``k`` alone starves a network that trains from scratch: only the current top k classes of a row
    get a gradient, and its loss falls to log k, which looks like success. It never trains the
    probability of the tail down either: a dense end of a quarter of the steps does (README,
    Fine-tuning). Stateless: nothing to save in a checkpoint. Triton compiles a kernel once per
    power of two that k passes, all else never again.

    >>> schedule = KSchedule(num_classes=2000, k=20, warmup_steps=100, anneal_steps=200)
    >>> [schedule(step) for step in (0, 99, 200, 300, 10_000)]
    [2000, 2000, 200, 20, 20]
    >>> schedule = KSchedule(2000, 20, warmup_steps=0, anneal_steps=0, dense_from=750)
    >>> [schedule(step) for step in (0, 749, 750)]
    [20, 20, 2000]
    """

    def __init__(
        self,
        num_classes: int,
        k: int,
        warmup_steps: int = 0,
        anneal_steps: int = 0,
        dense_from: int | None = None,
    ) -> None:
        checks.schedule(num_classes, k, warmup_steps, anneal_steps, dense_from)
        self.num_classes = num_classes
        self.k = min(k, num_classes)
        self.warmup_steps = warmup_steps
        self.anneal_steps = anneal_steps
        self.dense_from = dense_from

    def __call__(self, step: int) -> int:
        """k at optimiser step ``step`` = 0, 1, ..."""
        if step < self.warmup_steps or (self.dense_from is not None and step >= self.dense_from):
            return self.num_classes
        if step >= self.warmup_steps + self.anneal_steps:
            return self.k
        done = (step - self.warmup_steps) / self.anneal_steps
        return round(float(self.num_classes * (self.k / self.num_classes) ** done))

    def __repr__(self) -> str:
        return (
            f"KSchedule(num_classes={self.num_classes}, k={self.k}, "
            f"warmup_steps={self.warmup_steps}, anneal_steps={self.anneal_steps}, "
            f"dense_from={self.dense_from})"
        )


class AdaptiveAccumulation:
    """Gradient accumulation over the more micro-batches the more rows are learnt already.

    With N rows that count in a micro-batch, L of them learnt, an update takes the gradients of
    ``round(scale * N / (N - L))`` micro-batches: at least 1, never fewer than the update before, at
    most one more, and at most ``max_steps``. Source: Lv et al., Adaptive Sparse Softmax, arXiv
    2508.03175; their code decides at the first micro-batch after an update, and so does this.
    Repaired here: ignored rows count neither as rows nor as learnt; where all rows are learnt the
    number is ``max_steps`` and not a division by nearly zero; backward runs for each micro-batch,
    so that no graph outlives it.

    >>> accumulation = AdaptiveAccumulation(max_steps=4)
    >>> for x, target in batches:  # doctest: +SKIP
    ...     loss, support = adaptive_sparse_ce(model(x), target, return_support=True)
    ...     (loss / accumulation.steps(support.learnt, support.counted)).backward()
    ...     if accumulation.is_complete():
    ...         optimizer.step()
    ...         optimizer.zero_grad()

    An epoch may end within an update: its gradients wait for the next batch. ``steps`` waits for a
    GPU, once per update. ``state_dict`` and ``load_state_dict`` are for checkpoints, which belong
    after an update.

    Args:
        scale: the factor before N, lambda in the paper.
        max_steps: the most micro-batches to an update.
    """

    def __init__(self, *, scale: float = 1.0, max_steps: int = 2) -> None:
        checks.accumulation(scale, max_steps)
        self.scale = scale
        self.max_steps = max_steps
        self._steps = 1
        self._done = 0

    def steps(self, learnt: Tensor, counted: Tensor | None = None) -> int:
        """Micro-batches of the update that this one belongs to; its loss is to be divided by it.

        Args:
            learnt: bool, any shape: which rows are, ``AdaptiveSupport.learnt``.
            counted: bool, the same shape: which rows are not ignored; None: all.
        """
        checks.learnt(learnt, counted)
        if self._done == 0:
            rows = int(learnt.numel() if counted is None else counted.sum())
            left = rows - int((learnt if counted is None else learnt & counted).sum())
            if rows > 0:
                wanted = self.scale * rows / left if left > 0 else self.max_steps
                # a factor may be so large that the product is no integer
                wanted = round(min(wanted, self.max_steps))
                self._steps = min(max(wanted, self._steps), self._steps + 1, self.max_steps)
        return self._steps

    def is_complete(self) -> bool:
        """To be called once after each backward: True where the optimizer is to step."""
        self._done = (self._done + 1) % self._steps
        return self._done == 0

    def __repr__(self) -> str:
        return f"AdaptiveAccumulation(scale={self.scale}, max_steps={self.max_steps})"

    def state_dict(self) -> dict[str, int]:
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._steps = min(state["steps"], self.max_steps)
        self._done = 0
