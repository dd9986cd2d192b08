# SPDX-License-Identifier: Apache-2.0
"""``python -m torch_kernels bench``, which runs this folder; in a checkout ``python bench`` is the same."""

import sys

from harness.command import main

sys.exit(main())
