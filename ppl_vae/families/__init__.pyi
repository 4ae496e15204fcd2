from .conditional import Conditional as Conditional
from .elementwise import Bernoulli as Bernoulli
from .elementwise import Elementwise as Elementwise
from .elementwise import Normal as Normal
from .elementwise import StandardNormal as StandardNormal
from .exact_normal import ExactNormal as ExactNormal
from .family import Family as Family
from .flow import Flow as Flow
from .full_normal import FullNormal as FullNormal
from .linear_gaussian import LinearGaussian as LinearGaussian
from .logistic_normal import LogisticNormal as LogisticNormal
from .low_rank_normal import LowRankNormal as LowRankNormal
from .mixture import MixtureFullNormal as MixtureFullNormal
from .mixture import MixtureNormal as MixtureNormal
from .sphere import HypersphericalUniform as HypersphericalUniform
from .sphere import VonMisesFisher as VonMisesFisher
from .supports import same_support as same_support
from .tied_priors import ExemplarPrior as ExemplarPrior
from .tied_priors import VampPrior as VampPrior

__all__: list[str]
