from .encoding import Encoding as Encoding
from .linear import Linear as Linear
from .mlp import MLP as MLP
from .network import Free as Free
from .network import Network as Network
from .network import join as join
from .table import Table as Table

__all__: list[str]
