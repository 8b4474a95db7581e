# SPDX-License-Identifier: Apache-2.0
"""What connectors count, whatever the engine."""

__all__ = ["COUNTERS"]

COUNTERS = {
    "lookups": "Prompts that were looked up in the store.",
    "lookups_late": "Look-ups that were given up because the store did not answer in time.",
    "hit_blocks": "Blocks of 64 tokens found in the store.",
    "missed_blocks": "Blocks of 64 tokens that were asked for and not found.",
    "staged_blocks": "Blocks brought into host memory.",
    "staged_bytes": "Bytes of KV brought into host memory.",
    "stored_bytes_read": "Bytes read for them, encoded.",
    "stage_us": "Microseconds spent on that, over all threads.",
    "stage_errors": "Prefixes that could not be staged for an unexpected reason.",
    "staging_full": "Prefixes that found no room in host memory.",
    "loaded_tokens": "Tokens copied into the engine's pages.",
    "load_us": "Microseconds spent on that.",
    "load_errors": "Loads that failed; the engine computed the pages again, or ended the request.",
    "load_refusals": "Loads that were not begun, as what was staged was gone.",
    "saved_tokens": "Tokens copied out of the engine's pages.",
    "save_us": "Microseconds spent on that.",
    "save_drops": "Blocks that were not stored for want of room or time.",
    "save_errors": "Saves that failed.",
    "skipped_requests": "Requests with images, embeddings or adapters, which are not stored.",
    "unknown_requests": "Pages asked for or offered whose token ids the engine did not tell.",
    "resets": "Resets of the cache.",
    "corrupt_records": "Records that were damaged: found, counted as a miss, and dropped.",
    "errors": "Errors inside the connector; each was treated as a miss.",
}
"""What is counted, and what it means."""
