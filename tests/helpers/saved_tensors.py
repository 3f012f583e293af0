"""What autograd saves of a forward pass."""

from __future__ import annotations

from torch import Tensor, nn


class Saved:
    """Counts the bytes of distinct storages that are no parameters; `pack` is a hook of `saved_tensors_hooks`."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        self._storages: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._alive.append(tensor.detach())
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())
