# SPDX-License-Identifier: Apache-2.0
"""Independent computations that tests compare kvlib with: NumPy, float64, nothing of kvlib."""
