# SPDX-License-Identifier: Apache-2.0
"""One sequence over several ranks of torch.distributed, and sharded tensors (DTensor) as arguments of ops.

Every rank of a group calls the same function with its part of the sequence. Importing this module tells DTensor how
the lightning attention ops may be sharded: by batch and by heads.
"""

from torch_kernels.distributed import sharding
from torch_kernels.distributed.lightning import sequence_parallel_lightning
from torch_kernels.distributed.ring import ring_attention
from torch_kernels.distributed.zigzag import zigzag_shard

__all__ = ["ring_attention", "sequence_parallel_lightning", "zigzag_shard"]

sharding.register()
