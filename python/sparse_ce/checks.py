"""Every error that a caller can cause: "name: expected ..., got ...". Nothing here waits for a
GPU.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from . import backends

LOGIT_DTYPES = backends.ALL_DTYPES
REDUCTIONS = ("mean", "sum", "none")
OF_ROWS = ("logits", "hidden", "output", "target")  # the others have classes, or cells, first


def _no_dtensor(name: str, value: object) -> None:
    if type(value).__name__ == "DTensor":
        remedy = (
            "of rows sharded over ranks pass the local tensor, to_local()"
            if name in OF_ROWS
            else "pass full_tensor(), or call the module that holds it: FSDP then gathers it"
        )
        raise TypeError(
            f"{name}: expected a plain torch.Tensor, got a DTensor; {remedy}; where its classes "
            "are sharded over ranks pass to_local(), and mesh.get_group(), to "
            "vocab_parallel_sparse_ce or vocab_parallel_linear_sparse_ce"
        )


def is_traced() -> bool:
    """Under torch.compile or torch.func."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def has_values(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at, on the CPU: not so in a compiled graph, under
    torch.func or a mode that makes a graph (make_fx, AOTAutograd), or of a fake tensor.
    """
    modes = torch._C._TorchDispatchModeKey
    if is_traced() or any(map(torch._C._get_dispatch_mode, (modes.PROXY, modes.FUNCTIONAL))):
        return False
    # imported already where there is one; that takes a second
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is None or not isinstance(tensor, fake.FakeTensor)


def may_wait(tensor: Tensor) -> bool:
    """Whether to look at its numbers costs nothing, on the CPU, or is asked for."""
    if not has_values(tensor):
        return False
    return tensor.device.type == "cpu" or os.environ.get("SPARSE_CE_DEBUG", "0") == "1"


def _kind(value: object) -> str:
    """An int64 of numpy is no int."""
    name, module = type(value).__name__, type(value).__module__
    return f"numpy.{name}" if module == "numpy" else name


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _dense(name: str, value: Tensor) -> None:
    _no_dtensor(name, value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {_kind(value)}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else str(value.layout)
        raise TypeError(f"{name}: expected a dense torch.Tensor (torch.strided), got {kind}")


def numbers(name: str, value: Tensor) -> None:
    _dense(name, value)
    if value.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}"
        )


def _precision(name: str, value: Tensor, beside: Tensor, beside_name: str) -> None:
    """Of float64 all is, or nothing."""
    if (value.dtype == torch.float64) != (beside.dtype == torch.float64):
        wanted = "float64" if beside.dtype == torch.float64 else "float32, bfloat16 or float16"
        raise TypeError(
            f"{name}: expected {wanted} beside {beside_name} of {beside.dtype}, got {value.dtype}"
        )


def logits(value: Tensor) -> None:
    numbers("logits", value)
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V) with V >= 1, got {tuple(value.shape)}")


def target(value: Tensor, logits: Tensor, beside: str = "logits") -> None:
    _dense("target", value)
    remedy = ""
    if beside == "logits" and value.shape == logits.shape:
        remedy = "; of one-hot rows pass target.argmax(-1)"
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"target: expected int64 or int32 class indices, got {value.dtype} of shape "
            f"{tuple(value.shape)} beside {beside} of shape {tuple(logits.shape)}"
            f"{remedy or '; of whole numbers pass target.long()'}"
        )
    if value.device != logits.device:
        raise ValueError(
            f"target: expected the device of {beside}, {logits.device}, got {value.device}"
        )
    rows = logits.shape[:-1]
    if value.shape != rows:
        message = f"target: expected shape {tuple(rows)}, got {tuple(value.shape)}{remedy}"
        if (
            beside == "logits"
            and logits.dim() >= 3
            and value.shape == (logits.shape[0], *logits.shape[2:])
        ):
            message += (
                "; these shapes fit the (N, C, d1, ...) layout of F.cross_entropy, here the "
                "classes come last: pass logits.movedim(1, -1)"
            )
        elif value.numel() == rows.numel():
            message += f"; it has as many elements: pass target.view({tuple(rows)})"
        elif value.dim() == len(rows) > 1 and value.shape[-1] - rows[-1] in (-1, 1):
            message += (
                "; to predict the next token shift the target alone, and end it with ignore_index"
            )
        raise ValueError(message)


def target_range(
    value: Tensor, num_classes: int, ignore_index: int, reduced: Tensor | None = None
) -> None:
    """A class out of range is an IndexError where looking costs no synchronisation: on the CPU, or
    with SPARSE_CE_DEBUG=1 on a GPU.

    Elsewhere, and in a compiled graph, such a row's loss is NaN and its gradient zero. So one look
    at the loss of all rows, where they are `reduced` already, does for most targets.
    """
    if not may_wait(value):
        return
    if reduced is not None and not math.isnan(reduced.item()):
        return
    if value.numel() == 0:
        return
    lowest, highest = torch.aminmax(value)
    if lowest.item() >= 0 and highest.item() < num_classes:
        return
    wrong = ((value < 0) | (value >= num_classes)) & (value != ignore_index)
    if bool(wrong.any()):
        place = wrong.nonzero()[0]
        where = ", ".join(str(int(i)) for i in place) if value.dim() else ""
        found = int(value[tuple(place)])
        remedy = f"; if it marks padding pass ignore_index={found}" if found < 0 else ""
        raise IndexError(
            f"target: expected classes in [0, {num_classes}) or ignore_index={ignore_index}, "
            f"got {found} at target[{where}]{remedy}"
        )


def k(value: int | None, optional: bool = True) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        kinds = "an int or None (the dense softmax)" if optional else "an int"
        remedy = "" if isinstance(value, (bool, str)) else "; pass int(k) of a whole number"
        raise TypeError(f"k: expected {kinds}, got {_kind(value)}{remedy}")
    if value < 1:
        raise ValueError(f"k: expected 1 <= k, got {value}")


def weight(value: Tensor | None, logits: Tensor) -> None:
    _class_weight("weight", value, logits.shape[-1], logits, "logits")


def class_weight(value: Tensor | None, weight: Tensor) -> None:
    _class_weight("class_weight", value, weight.shape[0], weight, "weight")


def _class_weight(
    name: str,
    value: Tensor | None,
    num_classes: int | None,
    beside: Tensor | None = None,
    beside_name: str = "",
) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {_kind(value)}")
    _dense(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    if value.dim() != 1 or num_classes not in (None, value.shape[0]):
        raise ValueError(
            f"{name}: expected shape ({'V' if num_classes is None else num_classes},), one weight "
            f"per class, got {tuple(value.shape)}"
        )
    if beside is not None and value.device != beside.device:
        raise ValueError(
            f"{name}: expected the device of {beside_name}, {beside.device}, got {value.device}"
        )
    if value.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without requires_grad, got one that needs a gradient"
        )


def plif(num_cells: int, bound: float, init_std: float) -> None:
    """The arguments of MonotonicPLIF."""
    if isinstance(num_cells, bool) or not isinstance(num_cells, int):
        raise TypeError(f"num_cells: expected an int, got {_kind(num_cells)}")
    # beyond it float32 does not number the cells
    if not 1 <= num_cells <= 2**24:
        raise ValueError(f"num_cells: expected 1 <= num_cells <= 2^24, got {num_cells}")
    for name, value in (("bound", bound), ("init_std", init_std)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a float, got {_kind(value)}")
    if not 0 < bound < math.inf:
        raise ValueError(f"bound: expected 0 < bound, finite, got {bound}")
    if not 0 <= init_std < math.inf:
        raise ValueError(f"init_std: expected 0 <= init_std, finite, got {init_std}")


def saved_bound(value: float, bound: float) -> None:
    # it may have passed through another dtype
    if value not in {torch.tensor(bound, dtype=dtype).item() for dtype in LOGIT_DTYPES}:
        raise ValueError(
            f"bound: expected {bound}, that of the MonotonicPLIF which loads, got {value}"
        )


def plif_input(value: Tensor, w: Tensor) -> None:
    numbers("x", value)
    if value.device != w.device:
        raise ValueError(f"x: expected the device of w, {w.device}, got {value.device}")


def link(value: object, kind: type[nn.Module], logits: Tensor | None = None) -> None:
    """`logits` where they are known."""
    if not isinstance(value, kind):
        raise TypeError(f"link: expected a {kind.__name__} or None, got {_kind(value)}")
    device = next(value.parameters()).device
    if logits is not None and device != logits.device:
        raise ValueError(f"link: expected the device of logits, {logits.device}, got {device}")


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The three tensors of an output layer."""
    given = {"hidden": hidden, "weight": weight, **({} if bias is None else {"bias": bias})}
    for name, value in given.items():
        numbers(name, value)
        if value.device != hidden.device:
            raise ValueError(
                f"{name}: expected the device of hidden, {hidden.device}, got {value.device}"
            )
        _precision(name, value, hidden, "hidden")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden: expected shape (..., D) with D >= 1, got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape (V, {hidden.shape[-1]}) with V >= 1, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: expected shape ({weight.shape[0]},) or None, got {tuple(bias.shape)}"
        )


def process_group(value: Any) -> None:
    """The ranks over which classes are sharded; None: all."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "group: expected torch.distributed to be initialised, got a process without it; call "
            "torch.distributed.init_process_group, or the function without vocab_parallel_ in its "
            "name where there is one rank"
        )
    elsewhere = value == distributed.GroupMember.NON_GROUP_MEMBER
    if value is not None and not (elsewhere or isinstance(value, distributed.ProcessGroup)):
        hint = "; pass mesh.get_group()" if hasattr(value, "get_group") else ""
        raise TypeError(f"group: expected a ProcessGroup or None, got {_kind(value)}{hint}")
    if elsewhere or distributed.get_rank(value) < 0:
        raise ValueError("group: expected one that this rank is in, got one of other ranks")


def no_transform() -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "vocab_parallel_sparse_ce: expected a call outside of torch.func (grad, vjp, jacrev, "
            "vmap), got one inside: the ranks wait for each other"
        )


def shard_sizes(value: Sequence[int], rank: int, ranks: int, classes: int) -> None:
    """The classes of each rank, of which this one has `classes`."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"shard_sizes: expected a sequence of ints or None, got {_kind(value)}")
    for size in value:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"shard_sizes: expected ints, got {_kind(size)}")
        if size < 1:
            raise ValueError(f"shard_sizes: expected at least 1 class of each rank, got {size}")
    if sum(value) >= 2**31:
        raise ValueError(f"shard_sizes: expected fewer than 2^31 classes in all, got {sum(value)}")
    if len(value) != ranks:
        raise ValueError(f"shard_sizes: expected one for each of {ranks} ranks, got {len(value)}")
    if value[rank] != classes:
        raise ValueError(
            f"shard_sizes: expected {classes}, what this rank has, at shard_sizes[{rank}], got "
            f"{value[rank]}"
        )


def k_of_shards(value: int, sizes: Sequence[int]) -> None:
    """With the softmax of all classes every shard keeps k, and draws from the others."""
    if value >= min(sizes):
        raise ValueError(
            f"k: expected k < {min(sizes)}, the classes of the smallest shard, with "
            f"normalizer='full', got {value}"
        )


def ranks(found: Sequence[tuple[int, dict[str, Any]]], sizes: Sequence[int]) -> None:
    """What every rank says that it has: its classes, and what has to be the same on all of them."""
    classes = [size for size, _ in found]
    if classes != list(sizes):
        raise ValueError(
            f"shard_sizes: expected {classes}, the classes that the ranks have, got {list(sizes)}"
        )
    for name in found[0][1]:
        values = [given[name] for _, given in found]
        if any(value != values[0] for value in values):
            shown = "other classes" if name == "target" else values
            raise ValueError(f"{name}: expected the same on every rank, got {shown}")


def weight_grad(value: str) -> None:
    _choice("weight_grad", value, ("dense", "row_sparse"))


def backward(value: str) -> None:
    _choice("backward", value, ("auto", "sparse", "dense"))


def softcap(value: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"softcap: expected a float or None, got {_kind(value)}")
    # beyond it the arithmetic of all but float64 would see 0 or infinity
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if not least <= value <= most:
        raise ValueError(
            f"softcap: expected a positive number ({least:.2g} to {most:.2g}), or None for no cap, "
            f"got {value}"
        )


def chunk_bytes(value: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"chunk_bytes: expected an int or None, got {_kind(value)}")
    if value < 1:
        raise ValueError(f"chunk_bytes: expected 1 <= chunk_bytes, got {value}")


def ignore_index(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ignore_index: expected an int, got {_kind(value)}")


def label_smoothing(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"label_smoothing: expected a float, got {_kind(value)}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 <= label_smoothing <= 1, got {value}")


def normalizer(value: str) -> None:
    _choice("normalizer", value, ("topk", "full"))


def tail_samples(value: int, normalizer: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"tail_samples: expected an int, got {_kind(value)}")
    if value < 0:
        raise ValueError(f"tail_samples: expected 0 <= tail_samples, got {value}")
    if value > 0 and normalizer != "full":
        raise ValueError(
            "tail_samples: expected 0 with normalizer='topk', whose softmax has no tail, got "
            f"{value}; pass normalizer='full'"
        )


def no_link(normalizer: str) -> None:
    if normalizer != "topk":
        raise ValueError(f"link: expected None with normalizer={normalizer!r}, got a MonotonicPLIF")


def delta(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"delta: expected a float, got {_kind(value)}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"delta: expected 0 <= delta <= 1, got {value}")


def labels(
    value: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    return_support: bool,
) -> None:
    """Several labels per row: a target of the shape of the logits, and the options that it has."""
    _dense("target", value)
    if value.device != logits.device:
        raise ValueError(
            f"target: expected the device of logits, {logits.device}, got {value.device}"
        )
    if value.requires_grad:
        raise ValueError("target: expected a tensor without requires_grad, got one with it")
    on_cpu = value.device.type == "cpu" and has_values(value)
    if on_cpu and value.dtype != torch.bool:
        other = (value != 0) & (value != 1)
        if bool(other.any()):
            raise ValueError(
                "target: expected 0 and 1 alone where it has the shape of logits, several labels "
                f"per row, got {value[other][0].item()}"
            )
    for name, given, default in (
        ("weight", weight, None),
        ("ignore_index", ignore_index, -100),
        ("label_smoothing", label_smoothing, 0.0),
        ("return_support", return_support, False),
    ):
        if given is not default and given != default:
            raise ValueError(
                f"{name}: expected {default!r} where target has the shape of logits, several "
                f"labels per row, got {_kind(given) if isinstance(given, Tensor) else repr(given)}"
            )


def accumulation(scale: float, max_steps: int) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a float, got {_kind(scale)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected 0 < scale, finite, got {scale}")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int):
        raise TypeError(f"max_steps: expected an int, got {_kind(max_steps)}")
    if max_steps < 1:
        raise ValueError(f"max_steps: expected max_steps >= 1, got {max_steps}")


def learnt(value: Tensor, counted: Tensor | None) -> None:
    _mask("learnt", value)
    if counted is None:
        return
    _mask("counted", counted)
    if counted.shape != value.shape:
        raise ValueError(
            f"counted: expected the shape of learnt, {tuple(value.shape)}, got "
            f"{tuple(counted.shape)}"
        )


def _mask(name: str, value: Tensor) -> None:
    _dense(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor, got {value.dtype}")


def reduction(value: str) -> None:
    _choice("reduction", value, REDUCTIONS)


def backend(value: str) -> None:
    _choice("backend", value, ("auto", *backends.NAMES))


def dim(value: int, logits: Tensor) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"dim: expected an int, got {_kind(value)}")
    if not -logits.dim() <= value < logits.dim():
        raise IndexError(f"dim: expected -{logits.dim()} <= dim < {logits.dim()}, got {value}")
    if logits.shape[value] == 0:
        shape = tuple(logits.shape)
        raise ValueError(
            f"logits: expected at least one entry along dim={value}, got shape {shape}"
        )


def schedule(
    num_classes: int, k: int, warmup_steps: int, anneal_steps: int, dense_from: int | None
) -> None:
    for name, value, least in (
        ("num_classes", num_classes, 1),
        ("k", k, 1),
        ("warmup_steps", warmup_steps, 0),
        ("anneal_steps", anneal_steps, 0),
        ("dense_from", 0 if dense_from is None else dense_from, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {_kind(value)}")
        if value < least:
            raise ValueError(f"{name}: expected {name} >= {least}, got {value}")
    if dense_from is not None and 0 < warmup_steps >= dense_from:
        raise ValueError(
            f"dense_from: expected a step after warmup_steps={warmup_steps}, got {dense_from}"
        )


def options(value: dict[str, Any]) -> None:
    """What a module holds, checked where it is made too."""
    known: dict[str, Callable[[Any], None]] = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "normalizer": normalizer,
        "tail_samples": lambda samples: tail_samples(samples, value["normalizer"]),
        "reduction": reduction,
        "return_support": return_support,
        "softcap": softcap,
        "weight_grad": weight_grad,
        "backward": backward,
        "chunk_bytes": chunk_bytes,
        "backend": backend,
    }
    for name, option in value.items():
        known[name](option)


def return_support(value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"return_support: expected a bool, got {_kind(value)}")


def weight_of_module(name: str, value: Tensor | None, num_classes: int | None = None) -> None:
    """The weight of the classes, where the number of classes and the device may be unknown yet."""
    _class_weight(name, value, num_classes)


def bias_of_module(value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"bias: expected a bool, got {_kind(value)}")


def plain_linear(value: nn.Linear, forwards: Sequence[object], options: dict[str, object]) -> None:
    """A layer of which nothing is lost where another takes its parameters."""
    if not isinstance(value, nn.Linear):
        raise TypeError(
            f"linear: expected a torch.nn.Linear, got {type(value).__module__}.{_kind(value)}"
        )
    kind, found = type(value).__name__, None
    if type(value).forward not in forwards or "forward" in vars(value):
        found = "a forward of its own"
    elif not isinstance(value._parameters.get("weight"), nn.Parameter):
        found = "a parametrised weight"
    elif nn.parameter.is_lazy(value.weight):
        found = "parameters that have no shape yet"
    elif any(hooks for name, hooks in vars(value).items() if name.endswith("_hooks") and hooks):
        found = "hooks"
    if found is not None:
        raise ValueError(f"linear: expected a plain torch.nn.Linear, got {kind} with {found}")
    for name in ("bias", "device", "dtype"):
        if name in options:
            raise TypeError(f"{name}: expected that of linear, got {options[name]!r}")
    if "weight" in options:
        raise TypeError("weight: expected that of linear; weights of classes are class_weight")


def hidden(value: Tensor, projection: nn.Linear) -> None:
    numbers("hidden", value)
    width = projection.in_features
    if value.dim() == 0 or value.shape[-1] != width:
        raise ValueError(f"hidden: expected shape (..., {width}), got {tuple(value.shape)}")


def output(value: Tensor) -> None:
    numbers("output", value)
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"output: expected shape (..., D) with D >= 1, got {tuple(value.shape)}")


def table(name: str, value: Tensor, output: Tensor | None = None, least: int = 1) -> None:
    """Vectors that targets name, beside the output that is compared with them."""
    numbers(name, value)
    width = "D" if output is None else output.shape[-1]
    fits = value.dim() == 2 and value.shape[0] >= least and value.shape[1] > 0
    if not fits or width not in ("D", value.shape[1]):
        raise ValueError(
            f"{name}: expected shape (V, {width}) with V >= {least}, got {tuple(value.shape)}"
        )
    if value.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without requires_grad, got one that needs a gradient: "
            f"the vectors are frozen, pass {name}.detach()"
        )
    if output is None:
        return
    if value.device not in (output.device, torch.device("cpu")):
        raise ValueError(
            f"{name}: expected the device of output, {output.device}, or cpu, got {value.device}"
        )
    _precision(name, value, output, "output")


def distance(value: str) -> None:
    _choice("distance", value, ("cosine", "l2"))


def unk(value: int | None, embedding: Tensor, ignore_index: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"unk: expected an int or None, got {_kind(value)}")
    if not 0 <= value < embedding.shape[0] or value == ignore_index:
        raise ValueError(
            f"unk: expected a row in [0, {embedding.shape[0]}) other than "
            f"ignore_index={ignore_index}, got {value}"
        )
    if not bool(embedding[value].any()):
        raise ValueError(f"unk: expected a row that is not zero itself, got {value}")


def row_vectors(value: Tensor | None, output: Tensor) -> Tensor:
    """The vectors (..., D) that a head is given instead of a target, as a table (N, D)."""
    if value is None:
        raise TypeError("target: expected a target, or target_vectors in its place, got neither")
    if not isinstance(value, Tensor):
        raise TypeError(
            f"target_vectors: expected a torch.Tensor where there is no target, got {_kind(value)}"
        )
    if value.shape != output.shape:
        raise ValueError(
            f"target_vectors: expected shape {tuple(output.shape)}, a vector for each row, where "
            f"target is None, got {tuple(value.shape)}"
        )
    vectors = value.reshape(-1, value.shape[-1])
    table("target_vectors", vectors, output, least=0)
    return vectors
