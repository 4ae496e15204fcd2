from . import data as data
from . import evaluation as evaluation
from . import families as families
from . import infer as infer
from . import networks as networks
from . import programs as programs
from . import reports as reports
from . import runs as runs
from .evaluation.comparison import compare_posteriors as compare_posteriors
from .evaluation.evidence import log_evidence as log_evidence
from .evaluation.evidence import log_weights as log_weights
from .evaluation.gap import inference_gap as inference_gap
from .evaluation.guide_check import check_guide as check_guide
from .families.conditional import Conditional as Conditional
from .infer.reference import reference_posterior as reference_posterior
from .infer.svi import fit as fit
from .programs.closed_form import exact_log_evidence as exact_log_evidence
from .programs.closed_form import exact_posterior as exact_posterior
from .programs.linear_models import PPCA as PPCA
from .programs.program import Program as Program
from .programs.program import unique_name as unique_name
from .programs.target import Target as Target
from .programs.vae import VAE as VAE
from .runs.run import load_run as load_run
from .runs.spec import Spec as Spec
from .runs.spec import load_spec as load_spec

__version__: str
