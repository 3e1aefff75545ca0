# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""int4 (W4A16) MoE layers on a hybrid path: skinny-GEMM decode, grouped-GEMM prefill."""
