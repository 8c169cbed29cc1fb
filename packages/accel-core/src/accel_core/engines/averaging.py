"""Averages gradients that no wrapper averages, and compares what the processes have made of their parameters.

Every process takes part in each function here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from ..errors import ConfigurationError
from ..processes.collectives import all_gather_object, broadcast_object

LARGEST_DIFFERENCE = 1e-5
"""Relative to the norm of a parameter. Processors of two kinds round differently, and stay far below it."""

_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
"""By the bytes of an element, what its bits are read as; of 16 bytes there are complex numbers only."""
_CHUNK = 2**20
_MULTIPLIER = 0x5851F42D4C957F2D
"""Of a linear congruential generator by D. Knuth; an odd number, so that multiplying loses no bits."""


def average_gradients(parameters: Sequence[torch.Tensor], weight: float = 1.0) -> None:
    """Replace gradients by their mean over the processes, in one all-reduce.

    A parameter that has a gradient on no process has none afterwards, so that its optimizer leaves it alone.

    Args:
        parameters: the same on all processes; those without gradients count as zero.
        weight: of this process in the mean; the weights of all processes together are above 0.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        return
    # Half precision would overflow in the sum.
    is_double = any(parameter.dtype in (torch.float64, torch.complex128) for parameter in parameters)
    dtype, device = torch.float64 if is_double else torch.float32, parameters[0].device
    parts = [_flat_gradient(parameter, dtype) for parameter in parameters]
    is_there = torch.tensor(
        [parameter.grad is not None for parameter in parameters], dtype=dtype, device=device
    )
    own_weight = torch.full((1,), weight, dtype=dtype, device=device)
    # A process without samples may have computed nothing finite, and zero times that is not zero.
    gradients = torch.cat(parts) * weight if weight else torch.zeros_like(torch.cat(parts))
    message = torch.cat([gradients, is_there, own_weight])
    dist.all_reduce(message)
    means = torch.split(message[: -1 - len(parameters)] / message[-1], [len(part) for part in parts])
    for number, (parameter, mean) in enumerate(zip(parameters, means, strict=True)):
        # A process that has a gradient need not ask the others, which would wait for the device.
        if parameter.grad is not None or message[number - 1 - len(parameters)] > 0:
            parameter.grad = _as_gradient_of(parameter, mean)


def _flat_gradient(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradient = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    return real.reshape(-1).to(dtype)


def _as_gradient_of(parameter: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    if parameter.is_complex():
        flat = torch.view_as_complex(flat.reshape(-1, 2))
    # In the memory format of the parameter, as optimizers work on both at once.
    return torch.empty_like(parameter).copy_(flat.view(parameter.shape))


def broadcast_together(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process the main process's values, in one broadcast for each dtype."""
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    with torch.no_grad():
        for group in by_dtype.values():
            message = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.broadcast(message, src=0)
            for tensor, values in zip(
                group, torch.split(message, [tensor.numel() for tensor in group]), strict=True
            ):
                tensor.copy_(values.view(tensor.shape))


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return a whole number below 2^62 of all bits of a tensor, on its device.

    It does not depend on the order in which a device adds. No copy of the whole tensor is made.
    """
    whole = tensor.detach().contiguous().reshape(-1)
    bits = whole.view(_WHOLE_NUMBERS[whole.element_size()])
    weights = torch.arange(1, 2 * min(len(bits), _CHUNK), 2, device=bits.device) * _MULTIPLIER
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in torch.split(bits, _CHUNK):
        # Whole numbers wrap around, so no order of adding loses anything.
        total = total * 31 + (chunk.long() * weights[: len(chunk)]).sum()
    return (total ^ (total >> 31)) & (2**62 - 1)


def check_equal_parameters(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Compare parameters over the processes, by one small reduction if they are equal.

    Returns:
        What to warn of, if they differ by no more than rounding.

    Raises:
        ConfigurationError: they differ by more, on every process.
    """
    parameters = {name: parameter.detach() for name, parameter in named}
    if not parameters:
        return None
    sums = torch.stack([checksum(parameter) for parameter in parameters.values()])
    extremes = torch.cat([sums, -sums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = torch.split(extremes, len(sums))
    differs = (largest != -smallest).tolist()
    if not any(differs):
        return None
    for (name, parameter), is_other in zip(parameters.items(), differs, strict=True):
        difference = _difference_from_main(parameter) if is_other else 0.0
        if difference > LARGEST_DIFFERENCE:
            raise ConfigurationError(
                f"The processes have different values of the parameter {name!r}: by {difference:.1e} of its "
                f"norm, {LARGEST_DIFFERENCE:.0e} being the most that rounding explains. Usual causes: a step "
                "that computes with get_model() or with a global model instead of self.model, which nothing "
                "synchronises; a learning rate or another setting of the optimizer that depends on the "
                "process; parameters that were changed on one process only. Do the same on all processes, "
                "and let the step call self.model."
            )
    name = next(name for name, is_other in zip(parameters, differs, strict=True) if is_other)
    return (
        f"The processes have values of the parameter {name!r} that differ in their last digits, as on "
        "devices of different kinds. Those of the main process are saved. Use one kind of device for runs "
        "that can be repeated bit-identically."
    )


def _difference_from_main(parameter: torch.Tensor) -> float:
    """Return the largest distance of a process from the main one, relative to the norm of the latter."""
    whole = torch.view_as_real(parameter) if parameter.is_complex() else parameter
    of_main = whole.contiguous().clone()
    dist.broadcast(of_main, src=0)
    norm = of_main.double().norm().item()
    distance = (whole.double() - of_main.double()).norm().item()
    own = distance / norm if norm else distance
    return float(broadcast_object(max(all_gather_object(own))))
