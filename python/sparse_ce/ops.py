"""The public operators: signatures of schema.py bound to dispatch, shape functions and derivatives.

Every derivative of topk_ce is written on the k + 1 numbers of a row. With a = dloss (zero where the
target is no hit), b = dlse, q = dprobs, e = label smoothing, w the class weights, y the target,
sums over the support:

    A         = (1 - e) w_y + (e / k) sum w_i
    dlogits_i = p_i (a A + b - sum_j p_j q_j + q_i) - a (e / k) w_i        on the support
    dlogits_y -= a (1 - e) w_y                                             there or elsewhere

Source of the loss: Sun et al., Sparse-softmax, arXiv 2112.12433, eq. 4 and 5.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import backends, schema

_LIBRARY = torch.library.Library("sparse_ce", "FRAGMENT")  # type: ignore[no-untyped-call]

# What takes part in a call to which nobody listens.
_PLAIN = frozenset((Tensor, nn.Parameter, type(None), int, float, bool, str, torch.dtype, list))


def _is_heard(inputs: Sequence[Any]) -> bool:
    """Whether anything beside autograd takes part in a call: a compiler, torch.func, forward mode,
    a mode or a subclass of tensors, a trace, a profiler.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        # autograd.grad(is_grads_batched=True), functional.jacobian(vectorize=True)
        or torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")
        # which records nothing, whatever is asked for within
        or (torch.is_inference_mode_enabled() and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
        # which runs on devices that may have listeners of their own
        or inputs[-1] == "eager"
        or not _PLAIN.issuperset(map(type, inputs))
    )


def is_recording() -> bool:
    """Whether autograd is: a function of torch asks for the gradient mode alone."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class Operator:
    """The public operator `sparse_ce::<op>`, that `run` implements, or the backend that its last
    argument names.

    Where nobody but autograd listens it is called past the dispatcher of torch, through which an
    operator in Python goes three times: that was the half of a call with little to do.
    """

    def __init__(self, op: str, run: Callable[..., Any] | None = None) -> None:
        self.name = op
        self.overload = getattr(torch.ops.sparse_ce, op).default
        self._function: Any = None

        def of_backend(*inputs: Any) -> Any:
            *rest, backend = inputs
            return backends.implementation(backend, op)(*rest)

        self._run = run or of_backend
        torch.library.impl(f"sparse_ce::{op}", "CompositeExplicitAutograd")(self._run)

    def __call__(self, *inputs: Any) -> Any:
        if _is_heard(inputs):
            return self.overload(*inputs)
        return self._recorded(None, inputs)

    def reduced(self, inputs: Sequence[Any], ignore_index: int, mean: bool) -> Any:
        """The losses of a call reduced, as reduce_fwd does that, and what the call returns: of
        threshold_ce_fwd not all of it. The second and third input are target and weight.

        Where nobody listens it is one node of autograd, in C++: two in Python took longer than the
        kernels of 256 rows of 100 classes.
        """
        *rest, backend = inputs
        if not _is_heard(inputs):
            loss = backends.loss(backend, self.name)
            if loss is not None:
                return loss(*rest, ignore_index, mean, backend)
        outputs = self(*inputs)
        loss_of_rows, target, weight = outputs[0], *inputs[1:3]
        reduced = reduce_fwd(loss_of_rows, target, weight, ignore_index, mean, backend)[0]
        return reduced, *outputs

    def _recorded(self, keys: Any, inputs: Sequence[Any]) -> Any:
        if self._function is not None and is_recording() and torch._C._any_requires_grad(*inputs):
            return self._function.apply(*inputs, keys)
        return self._below(keys, inputs)

    def _below(self, keys: Any, inputs: Sequence[Any]) -> Any:
        """Without a derivative, for whoever listens at `keys`: None where nobody does."""
        with torch._C._AutoDispatchBelowAutograd():
            if keys is None:
                return self._run(*inputs)
            return self.overload.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    def differentiable(
        self, backward: Callable[..., Any], context: Callable[..., None] | None = None
    ) -> None:
        """What torch.library.register_autograd does, `context` being its setup_context, without the
        walk over the schema at every call.

        Under torch.func each of its levels comes here by itself, as to the operators of torch, so
        that the function is one of a single level. Forward mode, which would lose the derivative
        without a word, is refused.
        """

        def forward(ctx: Any, *inputs_and_keys: Any) -> Any:
            *inputs, keys = inputs_and_keys
            if torch._C._are_functorch_transforms_active():
                # a function runs without derivatives, but the levels below have theirs
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    output = self._below(keys, inputs)
            else:
                output = self._below(keys, inputs)
            if context is not None:
                context(ctx, inputs, output)
            return output

        def derivative(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
            return *backward(ctx, *upstream), None

        def autograd(keys: Any, *inputs: Any) -> Any:
            if forward_ad._current_level >= 0:
                _refuse_tangents(inputs)
            if not torch._C._are_functorch_transforms_active():
                return self._recorded(keys, inputs)
            from torch._functorch import utils as torch_func

            with torch_func.enable_single_level_autograd_function():
                return self._recorded(keys, inputs)

        methods = {
            "forward": staticmethod(forward),
            "backward": staticmethod(derivative),
            "_compiled_autograd_key": torch.autograd.Function._compiled_autograd_key,
        }
        base = torch.autograd.function._SingleLevelFunction
        self._function = type(self.name, (base,), methods)
        _LIBRARY.impl(self.name, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def first_derivative_only(what: str, instead: str = "") -> Callable[..., NoReturn]:
    """The derivative of a backward that has none."""

    def backward(*_: Any) -> NoReturn:
        raise RuntimeError(
            f"{what}: expected a first derivative only, got a backward of its backward{instead}"
        )

    return backward


class _WithoutDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, what: str, instead: str, count: int, *tensors: Any) -> Any:
        ctx.what, ctx.instead = what, instead
        # what a function passes on as it is becomes a view, and a sparse tensor has none
        return tuple(None if g is None else g.detach() for g in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        first_derivative_only(ctx.what, ctx.instead)()


def without_derivative(
    what: str, instead: str, of: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients that a function of torch computes from `of`: whoever asks for their derivative is
    refused as by `first_derivative_only`, where torch would take them for constants without a word.
    """
    if torch.compiler.is_compiling():
        # which refuses by itself
        return list(gradients)
    apply: Any = _WithoutDerivative.apply
    return list(apply(what, instead, len(of), *of, *gradients))


def _refuse_tangents(inputs: Sequence[Any]) -> None:
    unpack: Any = forward_ad.unpack_dual
    for value in inputs:
        if isinstance(value, Tensor) and unpack(value).tangent is not None:
            raise NotImplementedError(
                "sparse_ce: expected derivatives in reverse mode only (backward, autograd.grad, "
                "func.grad, vjp, jacrev), got a tangent of forward mode (jvp, jacfwd, hessian)"
            )


topk_ce_fwd = Operator("topk_ce_fwd")
topk_ce_bwd = Operator("topk_ce_bwd")
threshold_ce_fwd = Operator("threshold_ce_fwd")
threshold_ce_bwd = Operator("threshold_ce_bwd")
tail_fwd = Operator("tail_fwd")
labels_ce_fwd = Operator("labels_ce_fwd")
labels_ce_bwd = Operator("labels_ce_bwd")
plif_tables = Operator("plif_tables")
plif_scale = Operator("plif_scale")
plif_dslopes = Operator("plif_dslopes")
plif_fwd = Operator("plif_fwd")
plif_bwd = Operator("plif_bwd")
plif_ce_fwd = Operator("plif_ce_fwd")
plif_ce_bwd = Operator("plif_ce_bwd")
plif_topk_ce_fwd = Operator("plif_topk_ce_fwd")
plif_topk_ce_bwd = Operator("plif_topk_ce_bwd")
sparse_linear_buffer = Operator("sparse_linear_buffer")
sparse_linear_dhidden = Operator("sparse_linear_dhidden")
sparse_linear_dweight = Operator("sparse_linear_dweight")
reduce_fwd = Operator("reduce_fwd")
reduce_bwd = Operator("reduce_bwd")
cosine_fwd = Operator("cosine_fwd")
cosine_bwd = Operator("cosine_bwd")


# topk_ce


@torch.library.register_fake("sparse_ce::topk_ce_fwd")
def _(logits, target, weight, k, label_smoothing, backend):  # type: ignore[no-untyped-def]
    rows, dtype = logits.shape[:-1], schema.statistics_dtype(logits.dtype)
    loss, lse = logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=dtype)
    return (
        loss,
        lse,
        logits.new_empty((*rows, k), dtype=torch.int32),
        logits.new_empty((*rows, k), dtype=dtype),
    )


@torch.library.register_fake("sparse_ce::topk_ce_bwd")
def _(  # type: ignore[no-untyped-def]
    dloss,
    dlse,
    dprobs,
    target,
    indices,
    probs,
    weight,
    label_smoothing,
    num_classes,
    dtype,
    backend,
):
    return probs.new_empty((*probs.shape[:-1], num_classes), dtype=dtype)


def _topk_fwd_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, _, ctx.label_smoothing, ctx.backend = inputs
    _, _, indices, probs = output
    ctx.num_classes, ctx.dtype = logits.shape[-1], logits.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(target, indices, probs, weight)


def _topk_fwd_backward(
    ctx: Any, dloss: Tensor | None, dlse: Tensor | None, _: None, dprobs: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dloss is None and dlse is None and dprobs is None:
        return None, None, None, None, None, None
    target, indices, probs, weight = ctx.saved_tensors
    dlogits = topk_ce_bwd(
        dloss, dlse, dprobs, target, indices, probs, weight,
        ctx.label_smoothing, ctx.num_classes, ctx.dtype, ctx.backend,
    )  # fmt: skip
    return dlogits, None, None, None, None, None


def _topk_bwd_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (
        dloss,
        dlse,
        dprobs,
        target,
        indices,
        probs,
        weight,
        ctx.label_smoothing,
        ctx.num_classes,
        _,
        _,
    ) = inputs
    ctx.save_for_backward(dloss, dlse, dprobs, target, indices, probs, weight)


def _topk_bwd_backward(ctx: Any, ddlogits: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative, in differentiable tensor operations on (N, k): right at any order."""
    a, b, q, target, indices, p, weight = ctx.saved_tensors
    keep, smooth = 1.0 - ctx.label_smoothing, ctx.label_smoothing / indices.shape[-1]
    index = indices.long()
    g = ddlogits.gather(-1, index).to(p.dtype)  # (N, k): ddlogits on the support
    gp = (g * p).sum(-1)
    hit = (target >= 0) & (target < ctx.num_classes)
    y = target.clamp(0, ctx.num_classes - 1)
    s = torch.zeros_like(gp) if b is None else b
    da = None
    if a is not None:
        g_y = ddlogits.gather(-1, y.unsqueeze(-1)).squeeze(-1).to(p.dtype)
        w_y = torch.ones_like(gp) if weight is None else weight[y]
        w = torch.ones_like(p) if weight is None else weight[index]
        factor = keep * w_y + smooth * w.sum(-1)
        s = s + torch.where(hit, a * factor, 0)
        da = torch.where(hit, factor * gp - smooth * (w * g).sum(-1) - keep * w_y * g_y, 0)
    if q is not None:
        s = s - (p * q).sum(-1)
    dq = None if q is None else p * (g - gp.unsqueeze(-1))
    dp = g * s.unsqueeze(-1) if q is None else g * (s.unsqueeze(-1) + q) - gp.unsqueeze(-1) * q
    return da, None if b is None else gp, dq, None, None, dp, None, None, None, None, None


topk_ce_fwd.differentiable(_topk_fwd_backward, _topk_fwd_context)
topk_ce_bwd.differentiable(_topk_bwd_backward, _topk_bwd_context)


def upstream_times(upstream: Tensor, value: Tensor) -> Tensor:
    """What has no upstream gradient stays 0 where its own numbers are NaN."""
    return torch.where(upstream == 0, 0, upstream * value)


def coefficients(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dprobs: Tensor | None,
    target: Tensor,
    indices: Tensor,
    probs: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    num_classes: int,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The gradient of the logits of topk_ce as pairs: coefficients (N, k + 1), classes (N, k + 1)
    int32. Lists of tail.py are longer than k.

    The last pair is the target's, which may stand among the others as well: they add up.
    """
    hit = (target >= 0) & (target < num_classes)
    y = target.clamp(0, num_classes - 1)
    at_target = torch.zeros_like(probs[..., 0])
    spread = None
    if dloss is not None:
        at_target = a = torch.where(hit, dloss, 0)
        if label_smoothing:
            at_target = a * (1 - label_smoothing)
            kept = indices[..., :k]
            w = torch.ones_like(kept) if class_weight is None else class_weight[kept.long()]
            spread = (a * (label_smoothing / k)).unsqueeze(-1) * w
        if class_weight is not None:
            at_target = at_target * class_weight[y]
    share = at_target if dlse is None else dlse + at_target
    if spread is not None:
        share = share + spread.sum(-1)
    factor = share.unsqueeze(-1)
    if dprobs is not None:
        factor = factor + dprobs - upstream_times(dprobs, probs).sum(-1, keepdim=True)
    g = upstream_times(factor, probs)
    if spread is not None:
        g = g - torch.nn.functional.pad(spread, (0, g.shape[-1] - k))
    pairs = torch.cat([g, -at_target.unsqueeze(-1)], -1)
    return pairs, torch.cat([indices, y.unsqueeze(-1).int()], -1)


# threshold_ce


@torch.library.register_fake("sparse_ce::threshold_ce_fwd")
def _(logits, target, weight, k, delta, label_smoothing, backend):  # type: ignore[no-untyped-def]
    rows, dtype = logits.shape[:-1], schema.statistics_dtype(logits.dtype)
    statistics = (logits.new_empty(rows, dtype=dtype) for _ in range(5))
    return (*statistics, *(logits.new_empty(rows, dtype=torch.int32) for _ in range(2)))


@torch.library.register_fake("sparse_ce::threshold_ce_bwd")
def _(dloss, dlse, logits, *rest):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _threshold_fwd_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, _, _, ctx.label_smoothing, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, weight, *output[2:])


def _threshold_fwd_backward(
    ctx: Any, dloss: Tensor | None, dlse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if dloss is None and dlse is None:
        return (None,) * 7
    logits, target, weight, *statistics = ctx.saved_tensors
    dlogits = threshold_ce_bwd(
        dloss, dlse, logits, target, *statistics, weight, ctx.label_smoothing, ctx.backend
    )
    return (dlogits, *(None,) * 6)


def _threshold_bwd_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dloss, dlse, logits, target, _, _, cut, cut_index, kept, weight, ctx.label_smoothing, _ = inputs
    ctx.save_for_backward(dloss, dlse, logits, target, cut, cut_index, kept, weight)


def _threshold_bwd_backward(ctx: Any, ddlogits: Tensor) -> tuple[Tensor | None, ...]:
    """As for topk_ce, on (N, V). All that depends on the logits is attributed to the logits."""
    a, b, logits, target, cut, cut_index, count, weight = ctx.saved_tensors
    num_classes = logits.shape[-1]
    keep, smooth = 1.0 - ctx.label_smoothing, ctx.label_smoothing / count.to(cut.dtype)
    z = logits.to(cut.dtype)
    classes = torch.arange(num_classes, device=logits.device)
    kept = ~(z < cut.unsqueeze(-1)) & (
        (z != cut.unsqueeze(-1)) | (classes <= cut_index.unsqueeze(-1))
    )
    p = torch.softmax(z.masked_fill(~kept, -torch.inf), -1)
    g = ddlogits.to(cut.dtype)
    gp = (g * p).sum(-1)
    hit = (target >= 0) & (target < num_classes)
    y = target.clamp(0, num_classes - 1)
    s = torch.zeros_like(gp) if b is None else b
    da = None
    if a is not None:
        w_y = torch.ones_like(gp) if weight is None else weight[y]
        w = kept.to(cut.dtype) if weight is None else weight * kept
        factor = keep * w_y + smooth * w.sum(-1)
        s = s + torch.where(hit, a * factor, 0)
        g_y = g.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        da = torch.where(hit, factor * gp - smooth * (w * g).sum(-1) - keep * w_y * g_y, 0)
    dz = upstream_times(s.unsqueeze(-1), p * (g - gp.unsqueeze(-1)))
    db = None if b is None else gp
    return (da, db, dz.to(logits.dtype), *(None,) * 9)


threshold_ce_fwd.differentiable(_threshold_fwd_backward, _threshold_fwd_context)
threshold_ce_bwd.differentiable(_threshold_bwd_backward, _threshold_bwd_context)


# tail: of a forward whose gradient tail.py knows


@torch.library.register_fake("sparse_ce::tail_fwd")
def _(logits, target, indices, uniform, samples, backend):  # type: ignore[no-untyped-def]
    rows, dtype = logits.shape[:-1], schema.statistics_dtype(logits.dtype)
    statistics = (logits.new_empty(rows, dtype=dtype) for _ in range(3))
    return (*statistics, logits.new_empty((*rows, samples), dtype=torch.int32))


# labels_ce


@torch.library.register_fake("sparse_ce::labels_ce_fwd")
def _(logits, labels, delta, backend):  # type: ignore[no-untyped-def]
    rows, dtype = logits.shape[:-1], schema.statistics_dtype(logits.dtype)
    return tuple(logits.new_empty(rows, dtype=dtype) for _ in range(5))


@torch.library.register_fake("sparse_ce::labels_ce_bwd")
def _(dloss, logits, *rest):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _labels_fwd_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, *output[1:])


def _labels_fwd_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 4
    return (labels_ce_bwd(dloss, *ctx.saved_tensors, ctx.backend), None, None, None)


def _labels_bwd_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dloss, logits, labels, _, _, cut_negative, cut_positive, _ = inputs
    ctx.save_for_backward(dloss, logits, labels, cut_negative, cut_positive)


def _labels_bwd_backward(ctx: Any, ddlogits: Tensor) -> tuple[Tensor | None, ...]:
    """Either side is a softmax of its kept classes and of one logit 0 beside them, of z and of -z.
    All that depends on the logits is attributed to the logits.
    """
    a, logits, labels, cut_negative, cut_positive = ctx.saved_tensors
    z, g = logits.to(a.dtype), ddlogits.to(a.dtype)
    negatives = ~labels & ~(z < cut_negative.unsqueeze(-1))
    positives = labels & ~(z > cut_positive.unsqueeze(-1))
    one = torch.zeros_like(z[..., :1])
    q, r = (
        torch.softmax(torch.cat([one, x.masked_fill(~kept, -torch.inf)], -1), -1)[..., 1:]
        for x, kept in ((z, negatives), (-z, positives))
    )
    gq, gr = (g * q).sum(-1), (g * r).sum(-1)
    dz = q * (g - gq.unsqueeze(-1)) + r * (g - gr.unsqueeze(-1))
    dz = upstream_times(a.unsqueeze(-1), dz)
    return (gq - gr, dz.to(logits.dtype), *(None,) * 6)


labels_ce_fwd.differentiable(_labels_fwd_backward, _labels_fwd_context)
labels_ce_bwd.differentiable(_labels_bwd_backward, _labels_bwd_context)


# plif. With G_i the sum of the upstream gradient g over cell i, M_i that of g times the share of
# the cell left of x, D the width of a cell, h_j the share of cell j right of 0:
#
#     dslopes_j = D (M_j + sum_{i > j} G_i - (1 - h_j) sum_i G_i)
#
# since f(x) is the integral of the slopes from 0 to x: `plif_dslopes`. Source: Ganea et al.,
# Learnable monotonic pointwise non-linearities, arXiv 1902.08077.


def _empty_sums(slopes: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    num_cells = 0 if scale is None else slopes.shape[0]
    cells = slopes.new_empty((num_cells, 2), dtype=torch.int64)
    return cells, slopes.new_empty(2, dtype=torch.float64)


@torch.library.register_fake("sparse_ce::plif_tables")
def _(w, bound, dtype, backend):  # type: ignore[no-untyped-def]
    return w.new_empty(w.shape, dtype=dtype), w.new_empty(w.shape, dtype=dtype)


@torch.library.register_fake("sparse_ce::plif_scale")
def _(dloss, dlse, dprobs, target, weight, lse, num_classes, backend):  # type: ignore[no-untyped-def]
    return lse.new_empty((), dtype=torch.float64)


@torch.library.register_fake("sparse_ce::plif_dslopes")
def _(cells, outside, scale, bound, dtype, backend):  # type: ignore[no-untyped-def]
    return cells.new_empty(cells.shape[0], dtype=dtype)


@torch.library.register_fake("sparse_ce::plif_fwd")
def _(x, slopes, offsets, bound, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.register_fake("sparse_ce::plif_bwd")
def _(dy, x, slopes, bound, scale, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), *_empty_sums(slopes, scale)


@torch.library.register_fake("sparse_ce::plif_ce_fwd")
def _(logits, target, weight, slopes, offsets, bound, label_smoothing, backend):  # type: ignore[no-untyped-def]
    rows = logits.shape[:-1]
    return tuple(logits.new_empty(rows, dtype=slopes.dtype) for _ in range(4))


@torch.library.register_fake("sparse_ce::plif_ce_bwd")
def _(dloss, dlse, logits, target, row_max, log_sum, weight, slopes, *rest):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape), *_empty_sums(slopes, rest[-2])


@torch.library.register_fake("sparse_ce::plif_topk_ce_fwd")
def _(logits, target, weight, slopes, offsets, bound, k, *rest):  # type: ignore[no-untyped-def]
    rows = logits.shape[:-1]
    loss, lse = (slopes.new_empty(rows) for _ in range(2))
    indices = logits.new_empty((*rows, k), dtype=torch.int32)
    return loss, lse, indices, slopes.new_empty((*rows, k)), slopes.new_empty((*rows, k + 1))


@torch.library.register_fake("sparse_ce::plif_topk_ce_bwd")
def _(dloss, dlse, dprobs, target, indices, probs, values, weight, slopes, *rest):  # type: ignore[no-untyped-def]
    _, _, num_classes, dtype, scale, _ = rest
    dlogits = probs.new_empty((*target.shape, num_classes), dtype=dtype)
    return dlogits, *_empty_sums(slopes, scale)


def _plif_tables_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0])


def _plif_tables_backward(ctx: Any, dslopes: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return softplus_gradient(dslopes, ctx.saved_tensors[0]), None, None, None


# Fewer elements than torch gives to a thread.
_OF_ONE_THREAD = 16384


def softplus_gradient(dslopes: Tensor, w: Tensor) -> Tensor:
    # the end of what a thread has is computed by other instructions, and may differ in the last bit
    size = _OF_ONE_THREAD if w.device.type == "cpu" else max(1, w.numel())
    parts = zip(torch.split(dslopes, size), torch.split(w.to(dslopes.dtype), size), strict=True)
    found = [torch.ops.aten.softplus_backward(*part, 1.0, 20.0) for part in parts]
    dw = found[0] if len(found) == 1 else torch.cat(found)
    return dw.to(w.dtype)


def _plif_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, slopes, _, ctx.bound, ctx.backend = inputs
    ctx.save_for_backward(x, slopes)


def _plif_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, slopes = ctx.saved_tensors
    scale = None
    if ctx.needs_input_grad[1]:
        largest = dy.abs().amax() if dy.numel() else dy.new_zeros(())
        scale = schema.fixed_point(largest.double() * dy.numel())
    dx, *sums = plif_bwd(dy.contiguous(), x, slopes, ctx.bound, scale, ctx.backend)
    return dx, _dslopes(ctx, sums, scale, slopes), None, None, None


def _dslopes(
    ctx: Any, sums: Sequence[Tensor], scale: Tensor | None, slopes: Tensor
) -> Tensor | None:
    if scale is None:
        return None
    found: Tensor = plif_dslopes(*sums, scale, ctx.bound, slopes.dtype, ctx.backend)
    return found


def _plif_ce_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, slopes, offsets, ctx.bound, ctx.label_smoothing, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, weight, slopes, offsets, *output[2:])


def _plif_ce_backward(
    ctx: Any, dloss: Tensor | None, dlse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if dloss is None and dlse is None:
        return (None,) * 8
    logits, target, weight, slopes, offsets, row_max, log_sum = ctx.saved_tensors
    scale = None
    if ctx.needs_input_grad[3]:
        lse = row_max + log_sum
        scale = plif_scale(dloss, dlse, None, target, weight, lse, logits.shape[-1], ctx.backend)
    dlogits, *sums = plif_ce_bwd(
        dloss, dlse, logits, target, row_max, log_sum, weight, slopes, offsets, ctx.bound,
        ctx.label_smoothing, scale, ctx.backend,
    )  # fmt: skip
    return (dlogits, None, None, _dslopes(ctx, sums, scale, slopes), *(None,) * 4)


_no_second_derivative = first_derivative_only("MonotonicPLIF")

plif_tables.differentiable(_plif_tables_backward, _plif_tables_context)
plif_fwd.differentiable(_plif_backward, _plif_context)
plif_ce_fwd.differentiable(_plif_ce_backward, _plif_ce_context)
for _op in (plif_bwd, plif_ce_bwd, plif_scale, plif_dslopes):
    _op.differentiable(_no_second_derivative)


# sparse_linear: gradients themselves, of which nobody takes another


@torch.library.register_fake("sparse_ce::sparse_linear_buffer")
def _(like, rows, num_classes, backend):  # type: ignore[no-untyped-def]
    return like.new_empty((rows, num_classes))


@torch.library.register_fake("sparse_ce::sparse_linear_dhidden")
def _(coefficients, classes, weight, dtype, backend):  # type: ignore[no-untyped-def]
    return weight.new_empty((classes.shape[0], weight.shape[1]), dtype=dtype)


@torch.library.register_fake("sparse_ce::sparse_linear_dweight")
def _(coefficients, classes, hidden, num_classes, dtype, backend):  # type: ignore[no-untyped-def]
    return hidden.new_empty((num_classes, hidden.shape[1]), dtype=dtype)


# reduce: linear in the losses, and so is its gradient in dreduced


@torch.library.register_fake("sparse_ce::reduce_fwd")
def _(loss, target, weight, ignore_index, mean, backend):  # type: ignore[no-untyped-def]
    return loss.new_empty(()), loss.new_empty(())


@torch.library.register_fake("sparse_ce::reduce_bwd")
def _(dreduced, target, divisor, ignore_index, backend):  # type: ignore[no-untyped-def]
    return dreduced.new_empty(target.shape)


def _reduce_fwd_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    _, target, _, ctx.ignore_index, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(target, output[1])


def _reduce_fwd_backward(ctx: Any, dreduced: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dreduced is None:
        return (None,) * 6
    dloss = reduce_bwd(dreduced, *ctx.saved_tensors, ctx.ignore_index, ctx.backend)
    return dloss, None, None, None, None, None


def _reduce_bwd_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _, target, divisor, ctx.ignore_index, _ = inputs
    ctx.save_for_backward(target, divisor)


def _reduce_bwd_backward(ctx: Any, ddloss: Tensor) -> tuple[Tensor | None, ...]:
    target, divisor = ctx.saved_tensors
    total = ddloss.masked_fill(target == ctx.ignore_index, 0).sum()
    return total / divisor, None, None, None, None


reduce_fwd.differentiable(_reduce_fwd_backward, _reduce_fwd_context)
reduce_bwd.differentiable(_reduce_bwd_backward, _reduce_bwd_context)


# cosine: with c the output, e the target's vector, alpha = by_target and beta = by_output
#
#     dloss/dc = beta c + alpha e
#     cosine   alpha = -1 / (|c| |e|), beta = cos / |c|^2     l2   alpha = -1, beta = 1
#
# Source: Li et al., arXiv 1902.11269. The second derivative passes through alpha and beta.


@torch.library.register_fake("sparse_ce::cosine_fwd")
def _(output, target, embedding, normalize, backend):  # type: ignore[no-untyped-def]
    dtype = schema.statistics_dtype(output.dtype)
    return tuple(output.new_empty(target.shape, dtype=dtype) for _ in range(3))


@torch.library.register_fake("sparse_ce::cosine_bwd")
def _(dloss, output, *rest):  # type: ignore[no-untyped-def]
    return output.new_empty(output.shape)


def _cosine_fwd_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    vectors, target, embedding, ctx.normalize, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(vectors, target, embedding, *output[1:])


def _cosine_fwd_backward(
    ctx: Any, dloss: Tensor | None, dbeta: Tensor | None, dalpha: Tensor | None
) -> tuple[Tensor | None, ...]:
    doutput = None
    if dloss is not None:
        doutput = cosine_bwd(dloss, *ctx.saved_tensors, ctx.backend)
    if ctx.normalize and not (dbeta is None and dalpha is None):
        by_coefficients = _cosine_coefficients_backward(dbeta, dalpha, *ctx.saved_tensors)
        doutput = by_coefficients if doutput is None else doutput + by_coefficients
    return doutput, None, None, None, None


def _cosine_coefficients_backward(
    dbeta: Tensor | None,
    dalpha: Tensor | None,
    output: Tensor,
    target: Tensor,
    embedding: Tensor,
    beta: Tensor,
    alpha: Tensor,
) -> Tensor:
    """In differentiable tensor operations, so right at any order."""
    directed = (alpha != 0).unsqueeze(-1)
    c = output.to(alpha.dtype)
    e = _cosine_vectors(target, embedding, alpha.dtype)
    square = torch.where(directed, c.square().sum(-1, keepdim=True), 1)
    a, b = (t.unsqueeze(-1) / square for t in (alpha, beta))
    dc = torch.zeros_like(c)
    if dalpha is not None:
        dc = dc - upstream_times(dalpha.unsqueeze(-1), a * c)
    if dbeta is not None:
        dc = dc - upstream_times(dbeta.unsqueeze(-1), 3 * b * c + a * e)
    return torch.where(directed, dc, 0).to(output.dtype)


def _cosine_vectors(target: Tensor, embedding: Tensor, dtype: torch.dtype) -> Tensor:
    return embedding[target.clamp(0, embedding.shape[0] - 1)].to(dtype)


def _cosine_bwd_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _cosine_bwd_backward(ctx: Any, ddoutput: Tensor) -> tuple[Tensor | None, ...]:
    dloss, output, target, embedding, beta, alpha = ctx.saved_tensors
    g, c = ddoutput.to(alpha.dtype), output.to(alpha.dtype)
    gc = (g * c).sum(-1)
    ge = (g * _cosine_vectors(target, embedding, alpha.dtype)).sum(-1)
    # a row without a hit, or without a direction, has no derivative at all
    gc, ge = (torch.where(alpha != 0, dot, 0) for dot in (gc, ge))
    dbeta, dalpha, share = (upstream_times(dloss, factor) for factor in (gc, ge, beta))
    dc = (share.unsqueeze(-1) * g).to(output.dtype)
    return beta * gc + alpha * ge, dc, None, None, dbeta, dalpha, None


cosine_fwd.differentiable(_cosine_fwd_backward, _cosine_fwd_context)
cosine_bwd.differentiable(_cosine_bwd_backward, _cosine_bwd_context)
