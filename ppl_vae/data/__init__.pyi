from .batches import as_batch as as_batch
from .batches import check_finite as check_finite
from .batches import mask_missing as mask_missing
from .batches import minibatches as minibatches
from .batches import permutation as permutation
from .columns import Columns as Columns
from .loading import Data as Data
from .loading import load as load
