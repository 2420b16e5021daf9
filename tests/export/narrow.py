"""The real builder of TensorRT-RTX, seen through the names of another version.

An attribute that the version's list does not have raises AttributeError, on the module and on every object that comes
out of it: code that builds through it uses no name that the version lacks.
"""

import enum
import json

from tests.runtime.standin import LISTS


class Narrow:
    """`real` (a module, a class or an object) with the names that `api` lists for `kind`."""

    def __init__(self, real, api, kind):
        self.__dict__.update(_real=real, _api=api, _kind=kind)

    def _allowed(self, name):
        listed = self._api[self._kind] if self._kind else self._api
        if name not in listed:
            raise AttributeError(f"{self._kind or 'module'} has no {name} in this version")

    def __getattr__(self, name):
        if name == "__version__":
            return self._real.__version__
        self._allowed(name)
        return _narrow(getattr(self._real, name), self._api)

    def __setattr__(self, name, value):
        if name == "__class__":  # the cast of a layer to its own class
            self._real.__class__ = value._real
            self.__dict__["_kind"] = value._kind
            return
        self._allowed(name)
        setattr(self._real, name, _wide(value))

    def __call__(self, *args):
        return _narrow(self._real(*map(_wide, args)), self._api)

    def __eq__(self, other):
        return self._real == _wide(other)

    def __hash__(self):
        return hash(self._real)

    def __int__(self):
        return int(self._real)


def _wide(value):
    return value._real if isinstance(value, Narrow) else value


def _narrow(value, api):
    if isinstance(value, type) and value.__module__.startswith("tensorrt"):
        # what our code subclasses stays a class
        ours = value.__name__ in ("ILogger", "IProgressMonitor", "IProfiler")
        return value if ours else Narrow(value, api, value.__name__)
    kind = type(value)
    if kind.__module__.startswith("tensorrt") and kind.__name__ in api and not isinstance(value, enum.Enum):
        is_enum = api[kind.__name__][:1] == ["ENUM"]
        return value if is_enum or kind.__name__ in ("Dims", "IHostMemory") else Narrow(value, api, kind.__name__)
    if callable(value) and not isinstance(value, Narrow):
        return lambda *args: _narrow(value(*map(_wide, args)), api)
    return value


def narrow(real, version):
    """`real` with the names of `version` (a stem of LISTS)."""
    return Narrow(real, json.loads(LISTS[version].read_text())["api"], "")
