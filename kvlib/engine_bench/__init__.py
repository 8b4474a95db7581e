# SPDX-License-Identifier: Apache-2.0
"""`kvlib bench engines`: one store, several engines, each in an environment of its own."""

__all__: list[str] = []
