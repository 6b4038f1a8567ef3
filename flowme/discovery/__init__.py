"""Discovery: the mechanistic model itself, a biochemical reaction network, from time courses."""

from .library import Library as Library
from .library import up_to_second_order as up_to_second_order
from .reaction import Reaction as Reaction
