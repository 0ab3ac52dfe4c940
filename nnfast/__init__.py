"""torch.nn and torch.optim, faster: the same names, the same numbers, sooner.

    import nnfast.nn as nn
    import nnfast.nn.functional as F
    import nnfast.optim as optim

or, for a model that is there already, ``nnfast.accelerate(model)``. ``python -m nnfast`` says which kernel serves
each op on this machine, and why.
"""

__version__ = "0.2.0.dev0"  # here alone; setup and the doctor read it

from nnfast import nn as nn
from nnfast import optim as optim
from nnfast.accelerate import accelerate as accelerate
from nnfast.accelerate import report as report
from nnfast.accelerate import restore as restore
from nnfast.backend import empty_cache as empty_cache
from nnfast.backend import use_backend as use_backend
