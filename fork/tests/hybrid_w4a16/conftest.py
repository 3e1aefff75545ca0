# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What the tests of the hybrid int4 MoE path share is imported from support/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))
