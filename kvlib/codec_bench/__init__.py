# SPDX-License-Identifier: Apache-2.0
"""`kvlib bench codec`: what codecs cost a model, in bits, in quality and in time, in one run.

`grid` says which codecs, `measure` runs them on real text, `speed` times them, `results` puts the
numbers together, `curves` compares families at equal quality, `report` draws.
"""
