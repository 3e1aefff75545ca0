# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The gate and the switch of the hybrid int4 (W4A16) MoE path."""
