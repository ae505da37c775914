"""Order of an epoch: a pure function of the seed, whose batches never hold two captions of one image."""

from grr.data.order.blocks import BlockEpochs as BlockEpochs
from grr.data.order.blocks import block_epochs as block_epochs
from grr.data.order.epochs import Epochs as Epochs
from grr.data.order.epochs import epoch_order as epoch_order
from grr.data.order.groups import Groups as Groups
from grr.data.order.groups import num_batches as num_batches
from grr.data.order.sizes import check_batches as check_batches
from grr.data.order.sizes import check_negatives as check_negatives
from grr.data.order.sizes import largest_divisor as largest_divisor

ORDER = (
    2  # version of the batches that a seed selects, which belongs to the identity of a run; raise it with each change
)
