from .conv import Conv as Conv
from .conv import ResidualConv as ResidualConv
from .encoding import Encoding as Encoding
from .linear import Linear as Linear
from .mlp import MLP as MLP
from .mlp import GatedMLP as GatedMLP
from .network import Free as Free
from .network import Network as Network
from .network import join as join
from .table import Table as Table

__all__: list[str]
