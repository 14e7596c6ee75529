"""What would run on a device, by name, without running the kernels."""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Names of everything that runs on the device: operations that are no views, and kernels (recorded, not run).

    kernels: module and name of each kernel; is_view: whether an operation of this name launches nothing.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        kernels: Iterable[tuple[ModuleType, str]],
        is_view: Callable[[str], bool],
    ) -> None:
        super().__init__()
        self.names: list[str] = []
        self.is_view = is_view
        for module, name in kernels:
            monkeypatch.setattr(module, name, self._recorder(name))

    def _recorder(self, name: str) -> Any:
        names = self.names

        class Recorder:
            def __getitem__(self, grid):
                return lambda *arguments, **options: names.append(name)

        return Recorder()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not self.is_view(name):
            self.names.append(name)
            self.check(name, args)
        return func(*args, **(kwargs or {}))

    def check(self, name: str, args: tuple) -> None:
        """What a test asks of an operation that runs."""
