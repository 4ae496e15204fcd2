from .conditional import Conditional as Conditional
from .elementwise import Bernoulli as Bernoulli
from .elementwise import Elementwise as Elementwise
from .elementwise import Normal as Normal
from .elementwise import StandardNormal as StandardNormal
from .exact_normal import ExactNormal as ExactNormal
from .family import Family as Family
from .full_normal import FullNormal as FullNormal
from .linear_gaussian import LinearGaussian as LinearGaussian
from .mixed import Mixed as Mixed
from .mixture import MixtureNormal as MixtureNormal
from .supports import same_support as same_support

__all__: list[str]
