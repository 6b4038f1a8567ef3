"""Discovery: the mechanistic model itself, a biochemical reaction network, from time courses."""

from .conservation import conserved as conserved
from .draw import draw as draw
from .environment import environment as environment
from .equivalence import canonical as canonical
from .equivalence import class_key as class_key
from .equivalence import recovers as recovers
from .equivalence import same_ode as same_ode
from .equivalence import sparsest as sparsest
from .library import Library as Library
from .library import up_to_second_order as up_to_second_order
from .network import ReactionNetwork as ReactionNetwork
from .reaction import Reaction as Reaction
