"""``nnfast.nn.X`` and ``nnfast.optim.X`` for every submodule X of torch's that is not ours.

``from nnfast.optim.lr_scheduler import CosineAnnealingLR`` must give torch's own object. What nnfast does not
define is found here and *is* torch's module, under a second name in ``sys.modules``.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys

_PACKAGES = {"nnfast.nn.": "torch.nn.", "nnfast.optim.": "torch.optim."}


def _torch_name(name: str) -> str | None:
    for ours, theirs in _PACKAGES.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last on ``sys.meta_path``: a module of ours is found before it is asked."""

    def find_spec(self, name, path=None, target=None):
        theirs = _torch_name(name)
        if theirs is None:
            return None
        try:
            importlib.import_module(theirs)
        except ModuleNotFoundError as e:
            if e.name == theirs:
                return None
            raise
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        return None  # an empty module, which exec_module replaces by torch's: that one keeps its own __spec__

    def exec_module(self, module):
        sys.modules[module.__name__] = sys.modules[_torch_name(module.__name__)]


def install() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
