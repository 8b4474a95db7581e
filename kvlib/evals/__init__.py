# SPDX-License-Identifier: Apache-2.0
"""Measure what a method keeps, what it costs and what it changes: `kvlib eval`."""
