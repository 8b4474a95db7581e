# SPDX-License-Identifier: Apache-2.0
"""Engines: the only code that knows one, imported by nothing but the command line.

Engine-free parts first (`config`, `identity`, `layouts`, `mover`, `ledger`), then an adapter for
each engine, which is named in the engine's own configuration. Importing this package imports no
engine.
"""

__all__: list[str] = []
