# SPDX-License-Identifier: Apache-2.0
"""vLLM's tiering with workers that copy on the CPU, where its own ones want a device."""

from time import perf_counter

from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CpuTieringSpec(TieringOffloadingSpec):
    """All of vLLM's own but the copying between its pages and its CPU tier."""

    def get_worker(self, kv_caches):
        if self._worker is None:
            self._worker = CpuWorker(self, kv_caches)
        return self._worker


class CpuWorker(OffloadingWorker):
    """Copies at once."""

    def __init__(self, spec, kv_caches):
        self._region = SharedOffloadRegion(
            engine_id=spec.config.engine_id,
            num_chunks=spec.num_chunks,
            rank=spec.config.parallel.rank,
            kv_bytes_per_chunk=spec.kv_bytes_per_chunk,
            cpu_page_size=spec.cpu_page_size_per_worker,
        )
        self._blocks = spec.blocks_per_chunk
        self._pages = [(x.tensor, x.page_size_bytes) for x in kv_caches.tensors]
        self._refs = kv_caches.group_data_refs
        self._chunks = [
            self._region.create_next_worker_view(size * self._blocks) for _, size in self._pages
        ]
        self._finished = []

    def _spans(self, pages, chunks):
        """A page and its place in a chunk, one after the other."""
        at = taken = 0
        for refs, size, first in zip(
            self._refs, pages.group_sizes, pages.block_indices, strict=True
        ):
            skip = first % self._blocks
            for i in range(size):
                chunk = int(chunks.block_ids[taken + (skip + i) // self._blocks])
                for ref in refs:
                    tensor, stride = self._pages[ref.tensor_idx]
                    n, place = ref.page_size_bytes, (skip + i) % self._blocks * stride
                    yield (
                        tensor[int(pages.block_ids[at + i])][:n],
                        self._chunks[ref.tensor_idx][chunk, place : place + n],
                    )
            at += size
            taken += -(-(skip + size) // self._blocks) if size else 0
        assert (at, taken) == (len(pages.block_ids), len(chunks.block_ids))

    def _copy(self, job_id, spans):
        begun, total = perf_counter(), 0
        for source, to in spans:
            to.copy_(source)
            total += source.numel()
        self._finished.append(TransferResult(job_id, True, total, perf_counter() - begun))
        return True

    def submit_store(self, job_id, src_spec, dst_spec):
        return self._copy(job_id, self._spans(src_spec, dst_spec))

    def submit_load(self, job_id, src_spec, dst_spec):
        spans = self._spans(dst_spec, src_spec)
        return self._copy(job_id, ((chunk, page) for page, chunk in spans))

    def get_finished(self):
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids):
        pass

    def shutdown(self):
        self._chunks = []
        self._region.cleanup()
