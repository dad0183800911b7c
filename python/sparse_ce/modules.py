"""Module faces of the functions. They hold options and pass them on."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from . import checks
from .continuous import continuous_output_loss, nearest
from .functional import fused_sparse_ce
from .linear import fused_linear_sparse_ce
from .plif import MonotonicPLIF
from .support import Support


class _Options(nn.Module):
    """Holds options of a function as attributes, which may change between steps."""

    _names: tuple[str, ...]

    def _hold(self, **options: Any) -> None:
        checks.options(options)
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def _held(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def _shown(self, *always: str) -> str:
        """For a repr: those of other values than a new one has."""
        usual = inspect.signature(type(self).__init__).parameters
        values = {name: getattr(self, name) for name in (*always, *self._names)}
        return ", ".join(
            f"{name}={value!r}"
            for name, value in values.items()
            if name in always or value != usual[name].default
        )


class SparseCrossEntropyLoss(_Options):
    """``fused_sparse_ce`` as a module: ``loss = SparseCrossEntropyLoss(k=20)(logits, target)``.

    Its options are those of :func:`fused_sparse_ce`, and attributes that may change between steps:
    ``criterion.k = schedule(step)``. A class ``weight`` is a buffer and moves with the module, a
    ``link`` a submodule, whose parameter is then one of this module. In ``torch.compile`` call the
    function and pass k: of a module's integers each new value compiles anew.
    """

    weight: Tensor | None

    def __init__(
        self,
        k: int | None,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        normalizer: str = "topk",
        tail_samples: int = 0,
        link: MonotonicPLIF | None = None,
        reduction: str = "mean",
        return_support: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.k(k)
        checks.weight_of_module("weight", weight)
        if link is not None:
            checks.link(link, MonotonicPLIF)
        self.k = k
        self.register_buffer("weight", weight)
        self.link = link
        self._hold(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            normalizer=normalizer,
            tail_samples=tail_samples,
            reduction=reduction,
            return_support=return_support,
            backend=backend,
        )

    def forward(self, logits: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Support]:
        result: Tensor | tuple[Tensor, Support] = fused_sparse_ce(
            logits, target, self.k, weight=self.weight, link=self.link, **self._held()
        )
        return result

    def extra_repr(self) -> str:
        return self._shown("k")


class SparseLinearCrossEntropy(nn.Linear, _Options):
    """An output layer with its loss, ``fused_linear_sparse_ce`` as a module: with a target the
    loss, without one the logits, to which no ``softcap`` is applied: models do that themselves.

    A ``torch.nn.Linear`` in all else: its parameters, its ``state_dict``, its initialisation. A
    model whose output layer is one trains as ``loss = model.lm_head(hidden, target)`` and generates
    as before. Its options are those of :func:`fused_linear_sparse_ce`, and attributes that may
    change between steps, k too; a ``class_weight`` is a buffer, which is not in the ``state_dict``.

    Args:
        in_features, out_features, bias, device, dtype: as ``torch.nn.Linear``; the bias is off
            unless asked for, as in language models.
        k: how many classes to keep; None: all.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        k: int | None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        normalizer: str = "topk",
        tail_samples: int = 0,
        softcap: float | None = None,
        reduction: str = "mean",
        return_support: bool = False,
        weight_grad: str = "dense",
        backward: str = "auto",
        chunk_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        checks.bias_of_module(bias)
        super().__init__(in_features, out_features, bias, device, dtype)
        checks.k(k)
        checks.weight_of_module("class_weight", class_weight, out_features)
        self.k = k
        self.register_buffer("class_weight", class_weight, persistent=False)
        self._hold(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            normalizer=normalizer,
            tail_samples=tail_samples,
            softcap=softcap,
            reduction=reduction,
            return_support=return_support,
            weight_grad=weight_grad,
            backward=backward,
            chunk_bytes=chunk_bytes,
            backend=backend,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, k: int | None, **options: Any) -> Self:
        """In the place of an output layer, with its parameters themselves: tied ones stay tied.

        A plain layer: what hooks, a parametrisation or a ``forward`` of its own do would be lost,
        and is an error. Options are those of the class.
        """
        checks.plain_linear(linear, (nn.Linear.forward, cls.forward), options)
        head = cls(linear.in_features, linear.out_features, k, device="meta", **options)
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, target: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Support]:
        if target is None:
            return super().forward(hidden)
        result: Tensor | tuple[Tensor, Support] = fused_linear_sparse_ce(
            hidden,
            self.weight,
            target,
            self.k,
            bias=self.bias,
            class_weight=self.class_weight,
            **self._held(),
        )
        return result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._shown('k')}"


class ContinuousOutputHead(_Options):
    """An output layer without a softmax: ``loss = head(hidden, target)`` trains a projection to the
    pre-trained vectors of words, ``head.predict(hidden, k)`` names the nearest ones.

    Its only parameters are those of ``projection``, an ``nn.Linear(in_features, D)``. The table is
    a buffer, frozen, and not in the ``state_dict``: it comes from a file and would be saved with
    every checkpoint. ``ignore_index``, ``reduction`` and ``backend`` are those of
    :func:`continuous_output_loss`, and attributes that may change between steps.
    Source: Li et al., arXiv 1902.11269.

    Args:
        in_features: size of the hidden states.
        embedding: (V, D) the table, as for :func:`continuous_output_loss`. It is not copied.
        distance: "cosine" or "l2".
        unk: the row that stands for words whose row is zero: of fastText, those without a vector.
        table_device: where the table stays when the module moves, such as "cpu" beside a trunk on a
            GPU: only the rows of a batch travel. It then keeps its dtype too. None: it moves with
            the module.
        bias, device, dtype: of the projection.
    """

    embedding: Tensor
    missing: Tensor | None
    ignore_index: int
    backend: str

    def __init__(
        self,
        in_features: int,
        embedding: Tensor,
        *,
        distance: str = "cosine",
        unk: int | None = None,
        table_device: torch.device | str | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.table("embedding", embedding)
        checks.distance(distance)
        self._hold(ignore_index=ignore_index, reduction=reduction, backend=backend)
        checks.unk(unk, embedding, ignore_index)
        self.distance, self.unk, self.table_device = distance, unk, table_device
        self.projection = nn.Linear(in_features, embedding.shape[1], bias, device, dtype)
        place = self.projection.weight.device if table_device is None else table_device
        embedding = embedding.to(place)
        self.register_buffer("embedding", embedding, persistent=False)
        missing = None if unk is None else ~embedding.any(-1)
        self.register_buffer("missing", missing, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What moves and casts a module; a table that stays is kept out of it."""
        staying = ("embedding", "missing") if self.table_device is not None else ()
        kept = {name: self._buffers.pop(name) for name in staying}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(kept)
        return self

    def forward(
        self, hidden: Tensor, target: Tensor | None = None, target_vectors: Tensor | None = None
    ) -> Tensor:
        """The loss of hidden (..., in_features) and target (...) int64 or int32.

        ``target_vectors`` are vectors of words outside the vocabulary: (M, D) beside a target,
        where V + j names the j-th of them, or (..., D) instead of it, one for each row.
        """
        checks.hidden(hidden, self.projection)
        output = self.projection(hidden)
        if target is None:
            vectors = checks.row_vectors(target_vectors, output)
            rows = torch.arange(vectors.shape[0], device=output.device).view(output.shape[:-1])
            # no rows need no vectors, and a table has one at least
            vectors = vectors if vectors.shape[0] else self.embedding
            # an ignore_index of the user's would ignore the row of that number
            options = {**self._held(), "ignore_index": -100}
            return continuous_output_loss(output, rows, vectors, self.distance, **options)
        checks.target(target, output, beside="output")
        return continuous_output_loss(
            output,
            self._known(target),
            self.embedding,
            self.distance,
            target_vectors=target_vectors,
            **self._held(),
        )

    def _known(self, target: Tensor) -> Tensor:
        """With `unk` in the place of words whose row is zero."""
        if self.missing is None or self.unk is None:
            return target
        known = self.missing.shape[0]
        y = target.to(self.missing.device)
        inside = (y >= 0) & (y < known) & (y != self.ignore_index)
        missing = inside & self.missing[y.clamp(0, known - 1)]
        return target.masked_fill(missing.to(target.device), self.unk)

    @torch.no_grad()
    def predict(self, hidden: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k nearest vectors by cosine: (cosines, rows), each (..., k), the nearest first.

        Exact, in float32 (float64 for float64), O(N V D), in blocks of the table of at most 64 MB:
        from another device the table travels block by block. Of cosines that are equal as computed
        the lowest row comes first: a product may give equal vectors another last bit. Rows of zeros
        come last, at -inf. ``k >= V``: all.
        """
        checks.k(k, optional=False)
        checks.hidden(hidden, self.projection)
        output = self.projection(hidden)
        checks.table("embedding", self.embedding, output)
        with torch.autocast(output.device.type, enabled=False):
            return nearest(
                output,
                self.embedding,
                min(k, self.embedding.shape[0]),
                self.backend,
            )

    def extra_repr(self) -> str:
        shown = self._shown("distance", "unk", "table_device")
        return f"vectors={self.embedding.shape[0]}, {shown}"
