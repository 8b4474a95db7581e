# SPDX-License-Identifier: Apache-2.0
"""`kvlib bench replay` (policies on traces of requests) and `kvlib bench store` (a disk's speed).

`trace` reads a trace, `replay` runs it through one policy, `grid` through many, `replay_cli` is the
command. `raw` is the device, `blocks` makes records, `disk`, `disk_index` and `disk_mixed` measure
throughput, lookups and restarts, and mixed load, `disk_run` all of it, `disk_cli` is the command.
"""
