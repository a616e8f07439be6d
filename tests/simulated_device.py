"""A GPU that is not there, to count what a training step asks of one.

Its tensors say that they lie on ``cuda:0``, so the code takes its ways for a GPU; their values lie on the CPU, where every operator is
computed, so a step goes to its end and its numbers are real. Counted are

* launches: operators that write memory of the device, and inside of the project's own operators each kernel of Triton. It is a lower
  bound: a convolution or a sort is one operator and may be several kernels, one over many tensors (``_foreach``) is cut into chunks;
* waits: where the host stops until the device has done all that it was asked. A value is read, a shape depends on values, a copy goes
  to the host, or comes from memory of the host that is not pinned, or is not asked to go by itself.

What it cannot see: waits inside of one operator, of a library or the allocator, and how long anything takes.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

import dnc_kernels
from dnc_dist.processes import distributed
from dnc_kernels import dispatch

DEVICE = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parent.parent
_aten = torch.ops.aten
# They only allocate, or look at the host's own memory.
_NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "record_stream"}

_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _backward_of_batch_norm(grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, *sums_and_count: Tensor) -> Tensor:
    """What torch/nn/modules/_functions.py takes ``aten::batch_norm_backward_elemt`` for, in float64."""
    of_grad, about_mean, count = (value.double() for value in sums_and_count)
    of_grad, about_mean, mean, inverse, weight = (
        value.double()[:, None, None] for value in (of_grad / count.sum(), about_mean / count.sum(), mean, inverse, weight)
    )
    return (weight * inverse * (grad - of_grad - (x - mean) * inverse.square() * about_mean)).to(x.dtype)


_OF_CUDA_ALONE = {_aten.batch_norm_backward_elemt.default: _backward_of_batch_norm}
"""Operators that torch has for CUDA and not for CPUs."""


class DeviceTensor(Tensor):
    """A tensor on the device; ``held`` are its values.

    Only to Python it says where it lies. A torch that was built without CUDA would look for its guard of that device, so below Python
    the device is the one without memory; what is made there for such a tensor is on our device, too.
    """

    held: Tensor
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a tensor of a device that is gone")


class Event:
    """``torch.cuda.Event``: remembers how much the device had been asked for."""

    def __init__(self) -> None:
        self.launches = -1

    def record(self, stream: None = None) -> None:
        self.launches = _current().num_launches

    def synchronize(self) -> None:
        """Not a wait for all, but for what was asked before ``record``: remembered is how much the device has left to do then."""
        assert self.launches >= 0, "an event that was not recorded"
        _current().late_reads.append(_current().num_launches - self.launches)


class Device(TorchDispatchMode):
    """While open, this process has the device."""

    def __init__(self) -> None:
        super().__init__()
        # The slot of torch's own fake tensors: while it is taken, torch does not look for a driver.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.part = "elsewhere"
        self.launches: dict[str, Counter[str]] = {}
        self.waits: list[tuple[str, str, str]] = []
        """Part, operator, and the line of the project that asked for it."""
        self.late_reads: list[int] = []
        """Of each read of a value that was copied before: launches since then, which it does not wait for."""
        self._pinned: dict[int, Any] = {}
        """Pinned memory by its address; it is kept, so that no other memory gets the address."""
        self._restore = ExitStack()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its whole compiler

    def __enter__(self) -> Device:
        run = InterpretedFunction.run

        def launch(kernel: InterpretedFunction, *args: Any, **options: Any) -> Any:
            self._launched(f"triton {kernel.__name__}")
            with _disable_current_modes():
                return run(kernel, *args, **options)

        replaced: list[tuple[Any, str, Any]] = [
            (InterpretedFunction, "run", launch),
            (distributed, "device", lambda: DEVICE),
            (dispatch, "_why_not_triton", lambda device: None),
            (dispatch, "_is_current", lambda device: True),
            (dnc_kernels, "check_implementation", lambda device: None),
            # Objects travel as bytes, of which each process makes a tensor on its device: how torch does that is not what is looked at.
            *((distributed, name, _outside(getattr(distributed, name))) for name in ("broadcast_object", "gather_objects", "barrier")),
            (torch.cuda, "Event", Event),
            (torch.cuda, "current_stream", lambda device=None: None),
            (torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state()),
            (torch.cuda, "set_rng_state", lambda state, device="cuda": None),
            (_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: ["cuda", "meta"]),
            (Tensor, "is_pinned", lambda values: values.untyped_storage().data_ptr() in self._pinned),
            (Tensor, "pin_memory", lambda values: self._pin(values)),
            # Below Python it would make a tensor of the device without memory, unseen.
            (Tensor, "new_tensor", lambda like, data: torch.tensor(data, dtype=like.dtype, device=like.device)),
        ]
        for owner, name, value in replaced:
            self._restore.enter_context(mock.patch.object(owner, name, value))
        # They look for tensors of exactly these types.
        for types in (optimizer._foreach_supported_types, _foreach_utils._foreach_supported_types):
            types.append(DeviceTensor)
            self._restore.callback(types.remove, DeviceTensor)
        self._restore.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._restore.close()

    @property
    def num_launches(self) -> int:
        return sum(sum(counts.values()) for counts in self.launches.values())

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """What happens inside belongs to this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def inside(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose work belongs to this part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.counting(part):
                return function(*args, **kwargs)

        return call

    def forget(self) -> None:
        """Begin to count anew."""
        self.launches, self.waits, self.late_reads = {}, [], []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        wanted = kwargs.get("device")
        to = there[:1] if wanted is None else torch.device(wanted).type != "cpu"
        if not there and not to:
            if func.namespace == "c10d" and tensors:
                raise RuntimeError(f"{func} of tensors on the CPU, of which NCCL knows nothing")
            return func(*args, **kwargs)
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            # Without autograd, as in an evaluation, torch leaves it to us to take it apart.
            TorchDispatchMode.__enter__(self)
            try:
                return func.decompose(*args, **kwargs)
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        self._count(func, args, kwargs, tensors, there, bool(to))
        if wanted is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        held_args, held_kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, DeviceTensor) else leaf, (args, kwargs))
        if func.namespace == "dnc_kernels":
            with _Inside(self):
                results = OPDEFS[func._schema.name]._init_fn(*held_args, **held_kwargs)
        else:
            results = _OF_CUDA_ALONE.get(func, func)(*held_args, **held_kwargs)
        returned = func._schema.returns
        if len(returned) == 1 and returned[0].alias_info is not None and returned[0].alias_info.is_write:
            return kwargs["out"] if "out" in kwargs else args[0]
        return tree_map(lambda leaf: DeviceTensor(leaf) if to and isinstance(leaf, Tensor) else leaf, results)

    def _count(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], there: list[DeviceTensor], to: bool) -> None:
        name = func._schema.name.partition("::")[2]
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], to) if name == "_to_copy" else (args[1], isinstance(args[0], DeviceTensor))
            by_itself = kwargs.get("non_blocking", len(args) > 2 and bool(args[2]))
            if isinstance(source, DeviceTensor) and not target and not by_itself:
                self._waited("copy to the host")
            elif target and not isinstance(source, DeviceTensor) and not (by_itself and source.is_pinned()):
                self._waited("copy from the host" if not by_itself else "copy from memory that is not pinned")
            if not (name == "_to_copy" and target and isinstance(source, DeviceTensor) and _unchanged(source, kwargs)):
                self._launched(name)
            return
        of_host = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.dim()]
        if name.startswith(("index", "_index")):
            masks = [tensor for tensor in tensors[1:] if tensor.dtype in (torch.bool, torch.uint8)]
            if name in ("index", "index_put", "index_put_", "_index_put_impl_") and (masks or of_host):
                self._waited(f"{name} by {'a mask' if masks else 'a list of the host'}")
        elif of_host:
            raise RuntimeError(f"{func} of tensors on the device and on the CPU")
        elif _WAITS & set(func.tags):
            self._waited(name)
        if not (func.is_view or name in _NO_LAUNCH or name == "_local_scalar_dense" or func.namespace == "dnc_kernels"):
            self._launched(name)

    def _launched(self, name: str) -> None:
        self.launches.setdefault(self.part, Counter())[name] += 1

    def _waited(self, what: str) -> None:
        stack = [frame for frame in traceback.extract_stack() if frame.filename.startswith((f"{ROOT}/dnc_dist", f"{ROOT}/kernels"))]
        where = f"{Path(stack[-1].filename).relative_to(ROOT)}: {stack[-1].line}" if stack else "a test"
        self.waits.append((self.part, what, where))

    def _pin(self, values: Tensor) -> Tensor:
        assert not isinstance(values, DeviceTensor)
        if not values.is_pinned():
            values = torch.empty_like(values).copy_(values)
            self._pinned[values.untyped_storage().data_ptr()] = values.untyped_storage()
        return values


class _Inside(TorchDispatchMode):
    """Inside of an operator of the project, which computes on what the tensors hold."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if _WAITS & set(func.tags) and not name.startswith("index"):
            self.device._waited(name)
        elif not func.is_view and name not in _NO_LAUNCH:
            self.device._launched(name)
        return func(*args, **(kwargs or {}))


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which does not see the device."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def _unchanged(source: Tensor, options: dict[str, Any]) -> bool:
    """Whether torch with CUDA would see that there is nothing to copy: it is there already."""
    return options.get("dtype") in (None, source.dtype) and options.get("memory_format") in (None, torch.preserve_format)


def _current() -> Device:
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert isinstance(mode, Device)
    return mode
