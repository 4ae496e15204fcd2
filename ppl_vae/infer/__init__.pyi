from .annealing import Annealing as Annealing
from .annealing import Sandwich as Sandwich
from .annealing import annealed_importance as annealed_importance
from .annealing import bidirectional as bidirectional
from .reference import Reference as Reference
from .reference import reference_posterior as reference_posterior
from .step import History as History
from .svi import fit as fit
