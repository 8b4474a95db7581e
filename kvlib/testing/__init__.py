# SPDX-License-Identifier: Apache-2.0
"""Contracts, strategies and tiny models, shipped so that plug-in authors can use them."""
