"""Discovery: the mechanistic model itself, a biochemical reaction network, from time courses."""

from .arms import ClassPrior as ClassPrior
from .arms import Genetic as Genetic
from .arms import GeneticLocal as GeneticLocal
from .arms import Random as Random
from .arms import Stepwise as Stepwise
from .arms import Union as Union
from .conservation import conserved as conserved
from .discover import discover as discover
from .draw import draw as draw
from .environment import environment as environment
from .equivalence import canonical as canonical
from .equivalence import class_key as class_key
from .equivalence import recovers as recovers
from .equivalence import same_ode as same_ode
from .equivalence import sparsest as sparsest
from .evolution import DifferentialEvolution as DifferentialEvolution
from .fit import LevenbergMarquardt as LevenbergMarquardt
from .learner import Learner as Learner
from .library import Library as Library
from .library import up_to_second_order as up_to_second_order
from .network import ReactionNetwork as ReactionNetwork
from .policy_arm import PolicyArm as PolicyArm
from .reaction import Reaction as Reaction
from .result import Discovery as Discovery
from .reward import Weights as Weights
