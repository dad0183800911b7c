"""An output layer and its loss in one: a composition of the operators of schema.py.

With z = hidden weight' + bias, row by row, and g the k + 1 non-zeros of dloss/dz (ops.py):

    dhidden_n = sum_j g_nj weight[class_nj]                       a weighted gather of k + 1 rows
    dweight_c = sum over the pairs (n, j) of class c of g_nj hidden_n           a segment sum

Forward multiplies a chunk of tokens at a time into one reused buffer and lists the support of the
chunk; the logits of all tokens never exist, nor does any dense gradient of them. Saved are hidden
and weight by reference, and 8 k bytes per token. The matrix product is not repeated in backward.

Where k + 1 is no longer small the gathers lose against matrix products (`is_sparse`): backward then
places the gradient of a chunk of tokens densely and multiplies. The dense softmax and k beyond
MAX_LIST_K save O(N) and repeat the product of forward.

Logits may be capped, z = c tanh(x / c) of a product x. That is monotone: where the softmax is that
of a list no more than the list is capped, and its k + 1 slopes, 1 - (z / c)^2, are saved besides;
the softmax of all classes is that of a buffer that is capped in place.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import backends, checks, functional, ops, schema, tail
from .support import Support

# Of the buffer for the logits of a chunk of tokens. On two cores products of fewer tokens than fill
# it are slower, and larger ones no faster (bench/linear.py). On an H200 the step took 1 to 3 % less
# with each doubling from 128 to 512 MB (N=8192, D=4096, V=128256), in one noisy trial.
CHUNK_BYTES, CHUNK_BYTES_GPU = 128 << 20, 256 << 20

# The largest share (k + 1) / V of non-zeros at which gathers win, by device and size of an element.
# On the CPU measured by bench/linear.py --break-even, and safe on the machines seen: an AMD EPYC
# could gather up to 0.2 (bench/results/break-even-cpu.json). On a GPU, in bfloat16, an H200 gathers
# faster up to 0.007 at V = 32000, and for every k that was tried at 128256
# (bench/results/break-even-nvidia-h200-torch2.11.0-cuda13.0.json); no other dtype was tried.
_BREAK_EVEN = {("cpu", 8): 0.1, ("cpu", 4): 0.1, ("cpu", 2): 0.05}
_BREAK_EVEN_GPU = 0.007


def break_even(device_type: str, dtype: torch.dtype) -> float:
    return _BREAK_EVEN.get((device_type, dtype.itemsize), _BREAK_EVEN_GPU)


def is_sparse(k: int, num_classes: int, device_type: str, dtype: torch.dtype) -> bool:
    """Whether backward gathers: the rule of backward="auto"."""
    return True if k + 1 <= break_even(device_type, dtype) * num_classes else False


def parts(rows: int, size: int) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def rows_of_chunk(rows: int, most: int) -> int:
    """In chunks of one size: a last one of few tokens would read all of the weight. Matrix products
    go by 128 rows.
    """
    step = 128 if most >= 128 else 1
    chunks = max(1, -(-rows // max(step, most // step * step)))
    return max(1, -(-rows // (chunks * step)) * step)


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chunk_rows: int,
    softcap: float | None,
    backend: str,
) -> Iterator[tuple[slice, Tensor]]:
    """The logits of one chunk of tokens after the other, in one buffer. Weight is transposed."""
    rows = hidden.shape[0]
    empty: Any = backends.implementation(backend, "sparse_linear_buffer")
    buffer = empty(hidden, min(chunk_rows, rows), weight.shape[1])
    for part in parts(rows, chunk_rows):
        out = buffer[: part.stop - part.start]
        if bias is None:
            torch.mm(hidden[part], weight, out=out)
        else:
            torch.addmm(bias, hidden[part], weight, out=out)
        if softcap is not None:
            out.div_(softcap).tanh_().mul_(softcap)
        yield part, out


def of_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    chunk_rows: int,
    backend: str,
    of_chunk: Callable[[Tensor, slice], tuple[Tensor, ...]],
    softcap: float | None = None,
) -> tuple[Tensor, ...]:
    """What `of_chunk` finds in the logits of each chunk of tokens, side by side."""
    found = []
    for part, logits in _logits(
        hidden.to(dtype), weight.to(dtype).t(), None if bias is None else bias.to(dtype),
        chunk_rows, softcap, backend,
    ):  # fmt: skip
        found.append(of_chunk(logits, part))
    if not found:
        # an empty batch has a chunk too, for the shapes
        nothing = hidden.new_empty((0, weight.shape[0]), dtype=dtype)
        found.append(of_chunk(nothing, slice(0, 0)))
    if len(found) == 1:
        return tuple(found[0])
    return tuple(torch.cat(outputs) for outputs in zip(*found, strict=True))


def slopes_of(z: Tensor, softcap: float) -> Tensor:
    """dz / dx where z = softcap tanh(x / softcap)."""
    return 1 - (z / softcap).square()


def look_below(
    logits: Tensor, target: Tensor, indices: Tensor, softcap: float
) -> tuple[Tensor, ...]:
    """`tail.look` for the softmax of the k largest alone, which are `indices`, and the slopes of
    the cap, which changes k + 1 numbers of a row: it is monotone.
    """
    z = tail.beside_target(logits, indices, target)
    z = softcap * torch.tanh(z.to(schema.statistics_dtype(logits.dtype)) / softcap)
    row_max = z[..., 0]
    log_sum = (z[..., :-1] - row_max.unsqueeze(-1)).exp().sum(-1).log()
    draws = indices[..., :0]
    return indices, row_max, log_sum, torch.zeros_like(row_max), draws, z, slopes_of(z, softcap)


def _forward(regime: str) -> Callable[..., tuple[Tensor, ...]]:
    """Both regimes: the forward of each chunk, its outputs side by side. In the list regime that is
    topk_ce, or tail_ce where there are `samples`; and the slopes of the cap, where there is one, of
    the list and, at last, of the target.
    """

    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        k: int,
        label_smoothing: float,
        dtype: torch.dtype,
        chunk_rows: int,
        softcap: float | None,
        *rest: Any,  # in the list regime uniform, samples and how backward goes; the backend
    ) -> tuple[Tensor, ...]:
        backend, num_classes = rest[-1], weight.shape[0]
        of_logits: Any = backends.implementation(backend, f"{regime}_ce_fwd")
        uniform, samples = rest[:2] if regime == "topk" else (None, None)
        # where the softmax is that of a list, no more than the list is capped
        cap = None if regime == "topk" and samples is None else softcap

        def of_chunk(logits: Tensor, part: slice) -> Any:
            y = target[part]
            if regime == "threshold":
                return of_logits(logits, y, class_weight, k, 1.0, label_smoothing)
            if samples is None:
                if softcap is None:
                    return of_logits(logits, y, class_weight, k, label_smoothing)
                indices = of_logits(logits, y, None, k, 0.0)[2]
                return look_below(logits, y, indices, softcap)
            drawn = None if uniform is None else uniform[part]
            looked = tail.look(logits, y, drawn, k, samples, backend)
            if softcap is None:
                return looked
            _, classes = tail.list_of(looked[0], y, looked[4], num_classes)
            z = tail.beside_target(logits, classes, y)
            return *looked, slopes_of(z.to(looked[1].dtype), softcap)

        found = of_chunks(hidden, weight, bias, dtype, chunk_rows, backend, of_chunk, cap)
        if regime == "threshold":
            return found
        if softcap is None:
            none = hidden.new_empty((hidden.shape[0], 0), dtype=schema.statistics_dtype(dtype))
            found = (*found, none)
        if samples is None and softcap is None:
            return found
        outputs: tuple[Tensor, ...] = tail.listed(
            found[:-1], target, class_weight, samples or 0, label_smoothing, num_classes
        )
        if samples is None:  # the target has no share in the softmax of the others
            outputs = (*outputs[:2], *(t[..., :k].contiguous() for t in outputs[2:]))
        return *outputs, found[-1]

    return forward


def idle_rows(*upstream: Tensor | None) -> Tensor:
    """(N) bool: rows without an upstream gradient. Their gradient is 0, be they NaN themselves."""
    found = [d == 0 if d.dim() == 1 else (d == 0).all(-1) for d in upstream if d is not None]
    return torch.stack(found).all(0)


def by_products(
    hidden: Tensor,
    weight: Tensor,
    idle: Tensor,
    dtype: torch.dtype,
    needed: list[bool],
    chunks: Callable[[Tensor, Tensor], Iterator[tuple[slice, Tensor]]],
) -> tuple[Tensor, Tensor, Tensor]:
    """By matrix products with the dense gradient of the logits of each chunk, which `chunks` makes
    of hidden and weight in the dtype of the products.
    """
    statistics = schema.statistics_dtype(dtype)
    dhidden, dweight, dbias = empty_gradients(hidden, weight, needed, statistics)
    hidden, wide = hidden.to(dtype), weight.to(dtype)
    for t in (dweight, dbias):
        t.zero_()
    for part, dlogits in chunks(hidden, wide):
        if needed[0]:
            # 0 times an infinite weight is NaN
            dhidden[part] = (dlogits @ wide).masked_fill_(idle[part].unsqueeze(-1), 0)
        if needed[1]:
            left = hidden[part].masked_fill(idle[part].unsqueeze(-1), 0)
            if dtype == statistics:
                dweight.addmm_(dlogits.t(), left)
            else:
                # sums over chunks in float32: only the product of one chunk is rounded
                dweight += dlogits.t() @ left
        if needed[2]:
            dbias += dlogits.sum(0, dtype=statistics)
        # before the next one is made
        del dlogits
    return dhidden, dweight.to(weight.dtype), dbias


def empty_gradients(
    hidden: Tensor, weight: Tensor, needed: list[bool], dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, with no element where they are not needed."""
    dtype = dtype or weight.dtype
    classes = weight.shape[0]
    return (
        hidden.new_empty(hidden.shape if needed[0] else (0,)),
        weight.new_empty(weight.shape if needed[1] else (0,), dtype=dtype),
        # what the bias has autograd knows
        hidden.new_empty(
            (classes,) if needed[2] else (0,), dtype=schema.statistics_dtype(hidden.dtype)
        ),
    )


def by_rows(
    g: Tensor,
    classes: Tensor,
    hidden: Tensor,
    weight: Tensor,
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """By sums of rows, of the pairs g and classes (N, m)."""
    num_classes = weight.shape[0]
    dhidden, dweight, dbias = empty_gradients(hidden, weight, [False] * 3)
    if needed[0]:
        gather: Any = backends.implementation(backend, "sparse_linear_dhidden")
        dhidden = gather(g, classes, weight, hidden.dtype)
    add: Any = backends.implementation(backend, "sparse_linear_dweight")
    if needed[1]:
        dweight = add(g, classes, hidden, num_classes, weight.dtype)
    if needed[2]:
        # the bias is the weight of a hidden feature that is always 1
        ones = torch.ones_like(g[:, :1])
        dbias = add(g, classes, ones, num_classes, g.dtype).squeeze(-1)
    return dhidden, dweight, dbias


def pairs_below(slopes: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`ops.coefficients`, of the logits before they are capped."""
    g, classes = ops.coefficients(*arguments)
    return ops.upstream_times(g, slopes) if slopes.shape[-1] > 0 else g, classes


def _topk_backward(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dprobs: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    indices: Tensor,
    probs: Tensor,
    slopes: Tensor,
    class_weight: Tensor | None,
    k: int,
    label_smoothing: float,
    dtype: torch.dtype,
    chunk_rows: int,
    sparse: bool,
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    num_classes = weight.shape[0]
    # the softmax of all by a list of tail.py, or slopes that topk_ce's backward knows nothing of
    of_pairs = indices.shape[-1] > k or slopes.shape[-1] > 0
    if sparse or of_pairs:
        g, classes = pairs_below(
            slopes, dloss, dlse, dprobs, target, indices, probs, class_weight, label_smoothing,
            num_classes, k,
        )  # fmt: skip
    if not sparse:
        bwd: Any = backends.implementation(backend, "topk_ce_bwd")
        if of_pairs and indices.shape[-1] == k:
            g, classes = tail.with_target(g, classes)

        def of_chunk(part: slice) -> Tensor:
            if of_pairs:
                pairs = tail.joined(g[part], classes[part])
                return tail.placed(*pairs, k, num_classes, dtype, backend)
            a, b, q = (d if d is None else d[part] for d in (dloss, dlse, dprobs))
            dlogits: Tensor = bwd(
                a, b, q, target[part], indices[part], probs[part], class_weight,
                label_smoothing, num_classes, dtype,
            )  # fmt: skip
            return dlogits

        def chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
            return ((part, of_chunk(part)) for part in parts(hidden.shape[0], chunk_rows))

        return by_products(hidden, weight, idle_rows(dloss, dlse, dprobs), dtype, needed, chunks)
    return by_rows(g, classes, hidden, weight, needed, backend)


def _threshold_backward(
    dloss: Tensor | None,
    dlse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    cut: Tensor,
    cut_index: Tensor,
    classes_kept: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    dtype: torch.dtype,
    chunk_rows: int,
    softcap: float | None,
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    bwd: Any = backends.implementation(backend, "threshold_ce_bwd")

    def chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        shift = None if bias is None else bias.to(dtype)
        for part, z in _logits(hidden, weight.t(), shift, chunk_rows, softcap, backend):
            a, b = (d if d is None else d[part] for d in (dloss, dlse))
            statistics = (t[part] for t in (row_max, log_sum, cut, cut_index, classes_kept))
            dlogits = bwd(a, b, z, target[part], *statistics, class_weight, label_smoothing)
            if softcap is not None:
                # slopes in the buffer, which is needed no more; a row of NaN may have no gradient
                dlogits.mul_(z.div_(softcap).square_().neg_().add_(1).nan_to_num_(0))
            yield part, dlogits
            # before the next one is made
            del dlogits

    return by_products(hidden, weight, idle_rows(dloss, dlse), dtype, needed, chunks)


# Registration: what runs, its shapes, its derivatives.

topk_linear_ce_fwd = ops.Operator("topk_linear_ce_fwd", _forward("topk"))
topk_linear_ce_bwd = ops.Operator("topk_linear_ce_bwd", _topk_backward)
threshold_linear_ce_fwd = ops.Operator("threshold_linear_ce_fwd", _forward("threshold"))
threshold_linear_ce_bwd = ops.Operator("threshold_linear_ce_bwd", _threshold_backward)


@torch.library.register_fake("sparse_ce::topk_linear_ce_fwd")
def _(hidden, weight, bias, target, class_weight, k, label_smoothing, dtype, *rest):  # type: ignore[no-untyped-def]
    _, softcap, _, samples, _, _ = rest
    listed = k if samples is None else k + 1 + samples
    rows, statistics = hidden.shape[0], schema.statistics_dtype(dtype)
    loss, lse = (hidden.new_empty(rows, dtype=statistics) for _ in range(2))
    indices = hidden.new_empty((rows, listed), dtype=torch.int32)
    probs = hidden.new_empty((rows, listed), dtype=statistics)
    slopes = hidden.new_empty((rows, 0 if softcap is None else listed + 1), dtype=statistics)
    return loss, lse, indices, probs, slopes


@torch.library.register_fake("sparse_ce::threshold_linear_ce_fwd")
def _(hidden, weight, bias, target, class_weight, k, label_smoothing, dtype, *rest):  # type: ignore[no-untyped-def]
    statistics = schema.statistics_dtype(dtype)
    found = (hidden.new_empty(hidden.shape[0], dtype=statistics) for _ in range(5))
    return (*found, *(hidden.new_empty(hidden.shape[0], dtype=torch.int32) for _ in range(2)))


@torch.library.register_fake("sparse_ce::topk_linear_ce_bwd")
def _(dloss, dlse, dprobs, hidden, weight, *rest):  # type: ignore[no-untyped-def]
    return empty_gradients(hidden, weight, rest[-2])


@torch.library.register_fake("sparse_ce::threshold_linear_ce_bwd")
def _(dloss, dlse, hidden, weight, *rest):  # type: ignore[no-untyped-def]
    return empty_gradients(hidden, weight, rest[-2])


def given(gradients: tuple[Tensor, ...], needed: list[bool]) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needed, strict=True)]


def _topk_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, target, class_weight, k, label_smoothing, dtype, chunk_rows, *rest = inputs
    _, _, _, sparse, ctx.backend = rest
    ctx.options = (k, label_smoothing, dtype, chunk_rows, sparse)
    ctx.mark_non_differentiable(output[2], output[4])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, target, *output[2:], class_weight)


def _topk_autograd(
    ctx: Any, dloss: Tensor | None, dlse: Tensor | None, _: None, dprobs: Tensor | None, __: None
) -> tuple[Tensor | None, ...]:
    if dloss is None and dlse is None and dprobs is None:
        return (None,) * 14
    needed = list(ctx.needs_input_grad[:3])
    gradients = topk_linear_ce_bwd(
        dloss, dlse, dprobs, *ctx.saved_tensors, *ctx.options, needed, ctx.backend
    )
    return (*given(gradients, needed), *(None,) * 11)


def _threshold_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, class_weight, _, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, *output[2:], class_weight)


def _threshold_autograd(
    ctx: Any, dloss: Tensor | None, dlse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if dloss is None and dlse is None:
        return (None,) * 11
    needed = list(ctx.needs_input_grad[:3])
    *options, backend = ctx.options
    gradients = threshold_linear_ce_bwd(dloss, dlse, *ctx.saved_tensors, *options, needed, backend)
    return (*given(gradients, needed), *(None,) * 8)


_REFUSAL = (
    "fused_linear_sparse_ce",
    "; fused_sparse_ce(torch.nn.functional.linear(hidden, weight), ...) has second derivatives",
)
_no_second_derivative = ops.first_derivative_only(*_REFUSAL)

topk_linear_ce_fwd.differentiable(_topk_autograd, _topk_context)
threshold_linear_ce_fwd.differentiable(_threshold_autograd, _threshold_context)
for _op in (topk_linear_ce_bwd, threshold_linear_ce_bwd):
    _op.differentiable(_no_second_derivative)


class _RowSparse(torch.autograd.Function):
    """The list regime with the gradient of the weight as its touched rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, ...]:
        outputs = topk_linear_ce_fwd(hidden, weight, *options)
        _topk_context(ctx, (hidden, weight, *options), outputs)
        return tuple(outputs)

    @staticmethod
    def backward(
        ctx: Any,
        dloss: Tensor | None,
        dlse: Tensor | None,
        _: None,
        dprobs: Tensor | None,
        __: None,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, target, indices, probs, slopes, class_weight = ctx.saved_tensors
        k, label_smoothing, *_ = ctx.options
        needed = [ctx.needs_input_grad[0], False, ctx.needs_input_grad[2]]
        gradients = topk_linear_ce_bwd(
            dloss, dlse, dprobs, *ctx.saved_tensors, *ctx.options, needed, ctx.backend
        )
        found = given(gradients, needed)
        if ctx.needs_input_grad[1]:
            g, classes = pairs_below(
                slopes, dloss, dlse, dprobs, target, indices, probs, class_weight,
                label_smoothing, weight.shape[0], k,
            )  # fmt: skip
            # what has no gradient touches nothing: it goes to a row beyond the last, left out below
            touched, places = torch.unique(
                classes.masked_fill(g == 0, weight.shape[0]), return_inverse=True
            )
            rows = ops.sparse_linear_dweight(
                g, places.int(), hidden, touched.shape[0], weight.dtype, ctx.backend
            )
            touched = touched[touched < weight.shape[0]]
            rows = rows[: touched.shape[0]]
            found[1] = torch.sparse_coo_tensor(
                touched.long().unsqueeze(0), rows, weight.shape, is_coalesced=True,
                check_invariants=False,
            )  # fmt: skip
        found = ops.without_derivative(*_REFUSAL, (hidden, weight), found)
        return (*found, *(None,) * 11)


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# As backends.resolve: torch.compile of torch 2.11 would break the graph here.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Of the logits: that of hidden, or what autocast makes of it."""
    device = hidden.device.type
    autocast = _has_autocast(device) and torch.is_autocast_enabled(device)
    if autocast and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def rows_that_count(target: Tensor, ignore_index: int) -> Tensor | None:
    """The places of the rows that are not ignored; None: all. On a GPU, and in a compiled graph, to
    count them would be to wait for them.
    """
    if target.device.type != "cpu" or not checks.has_values(target):
        return None
    kept = (target != ignore_index).nonzero().squeeze(-1)
    return None if kept.shape[0] == target.shape[0] else kept


def rows_of_buffer(
    hidden: Tensor, num_classes: int, dtype: torch.dtype, chunk_bytes: int | None
) -> int:
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES_GPU
    return rows_of_chunk(hidden.shape[0], chunk_bytes // (num_classes * dtype.itemsize))


@overload
def fused_linear_sparse_ce(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    k: int | None,
    *,
    bias: Tensor | None = ...,
    class_weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    normalizer: str = ...,
    tail_samples: int = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    return_support: Literal[False] = ...,
    weight_grad: str = ...,
    backward: str = ...,
    chunk_bytes: int | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def fused_linear_sparse_ce(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    k: int | None,
    *,
    bias: Tensor | None = ...,
    class_weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    normalizer: str = ...,
    tail_samples: int = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    return_support: Literal[True],
    weight_grad: str = ...,
    backward: str = ...,
    chunk_bytes: int | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Support]: ...
def fused_linear_sparse_ce(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    k: int | None,
    *,
    bias: Tensor | None = None,
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
) -> Tensor | tuple[Tensor, Support]:
    """``fused_sparse_ce`` of ``hidden @ weight.T + bias``, without the logits: the output layer of
    a model and its loss, trained for little more than the price of the forward product.

    The gradient of the logits has k + 1 non-zeros per token, so that the gradients of hidden and
    weight are sums of k + 1 rows per token instead of matrix products. Source of the loss: Sun et
    al., Sparse-softmax, arXiv 2112.12433, eq. 5.

    Memory: one buffer of ``chunk_bytes`` for the logits of some tokens, O(N k) numbers saved, and
    the gradients that are asked for. Only those are computed: a frozen weight or trunk costs
    nothing. Ignored tokens leave before the product on the CPU; on a GPU, where counting them would
    be a synchronisation, they go through it and get zeros.

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64.
        weight: (V, D), its dtype may be another: the product is taken in the dtype of hidden (under
            autocast in that of autocast), its gradient comes in its own, summed in float32.
        target: (...) int64 or int32 class indices.
        k: how many classes to keep; None or ``k >= V``: all of them, the dense softmax.
        bias: (V,) or None.
        class_weight: (V,) weight of each class: ``weight`` of ``fused_sparse_ce``.
        ignore_index, label_smoothing, normalizer, tail_samples, reduction, return_support, backend:
            as there.
        softcap: a float c: the loss of ``c tanh(logits / c)``, as some models cap their logits
            (Gemma's ``final_logit_softcapping``). It does not change their order, so that a list
            is of the largest logits themselves, capped in float32. Where there is no list, with
            k=None and k beyond 1024 without ``return_support``, and with "full" all are capped, in
            their dtype as models do: there rounding makes ties. The ``Support`` is of what is
            capped.
        weight_grad: "dense", or "row_sparse": a sparse COO tensor of the rows that the batch
            touched, for ``torch.optim.SparseAdam`` and very large V. Not under torch.compile.
        backward: "sparse" sums rows, "dense" multiplies matrices chunk by chunk, "auto" takes the
            faster by a measured rule. The dense softmax, and k beyond 1024, always
            multiply; "row_sparse" always sums rows.
        chunk_bytes: target for the size of the logits' buffer; None is 128 MB on the CPU and 256 MB
            on a GPU.

    Returns:
        As ``fused_sparse_ce``. There is no second derivative: asking for one is an error.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: on the CPU, a target outside [0, V), as in ``fused_sparse_ce``.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    checks.linear(hidden, weight, bias)
    num_classes, device = weight.shape[0], hidden.device.type
    checks.target(target, hidden, "hidden")
    checks.k(k)
    checks.class_weight(class_weight, weight)
    checks.ignore_index(ignore_index)
    checks.label_smoothing(label_smoothing)
    checks.normalizer(normalizer)
    checks.tail_samples(tail_samples, normalizer)
    checks.softcap(softcap)
    checks.reduction(reduction)
    checks.return_support(return_support)
    checks.weight_grad(weight_grad)
    checks.backward(backward)
    checks.chunk_bytes(chunk_bytes)
    checks.backend(backend)
    checks.target_range(target, num_classes, ignore_index)
    k = num_classes if k is None else min(k, num_classes)
    dtype = product_dtype(hidden)
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    row_target = target.reshape(-1).to(torch.int64).contiguous()
    if class_weight is not None:
        class_weight = class_weight.to(schema.statistics_dtype(dtype)).contiguous()
    fewer = functional.is_fewer(k, num_classes)
    samples = functional.samples_of(normalizer, tail_samples) if fewer else None
    large_k = functional.is_large(k if samples is None else k + 1 + samples)
    listed = return_support or samples is not None or (not large_k and fewer)
    name = backends.resolve(backend, device, dtype, listed and large_k)
    if weight_grad == "row_sparse" and checks.is_traced():
        raise ValueError(
            "weight_grad: expected 'dense' under torch.compile and torch.func, got 'row_sparse'"
        )
    if weight_grad == "row_sparse" and not (listed and fewer):
        raise ValueError(
            "weight_grad: expected 'dense' for k=None and k >= V, whose gradient has no rows of "
            f"zeros, and for k > {backends.MAX_LIST_K}, whose classes are not listed, got "
            "'row_sparse'"
        )
    sparse = backward == "sparse" or weight_grad == "row_sparse"
    if backward == "auto" and not sparse:
        sparse = is_sparse(k + (samples or 0), num_classes, device, dtype)

    kept = None if return_support else rows_that_count(row_target, ignore_index)
    counted = row_target
    if kept is not None:
        rows, counted = rows[kept], row_target[kept]
    chunk_rows = rows_of_buffer(rows, num_classes, dtype, chunk_bytes)
    arguments = (
        rows, weight.contiguous(), bias, counted, class_weight, k, float(label_smoothing), dtype,
        chunk_rows, None if softcap is None else float(softcap),
    )  # fmt: skip
    support = None
    if listed:
        row_sparse = weight_grad == "row_sparse" and ops.is_recording()
        op: Any = _RowSparse.apply if row_sparse else topk_linear_ce_fwd
        uniform = functional.uniform_of(rows, dtype, samples, tail_samples)
        loss, lse, indices, probs, _ = op(*arguments, uniform, samples, sparse, name)
        if return_support:
            support = functional.support_of(target, indices, probs, lse, k, num_classes)
    else:
        loss = threshold_linear_ce_fwd(*arguments, name)[0]
    reduced = functional.reduce(
        loss, counted, class_weight, ignore_index, reduction, name, target.shape, kept
    )
    return reduced if support is None else (reduced, support)
