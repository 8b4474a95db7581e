# SPDX-License-Identifier: Apache-2.0
"""vLLM's own scheduler with a stand-in for the model: no weights, pages that are checked.

The stand-in computes the KV of a token from all tokens before it, writes it into the pages that the
scheduler names, and before that looks at every page that the scheduler takes for computed. A page
that was loaded wrongly, given away too early, or stored under a wrong key is found there.
"""

import json
import time
from collections import deque
from copy import deepcopy

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvlib.connectors import vllm_scheduler, vllm_worker
from kvlib.connectors.layouts import LAYOUTS
from kvlib.connectors.vllm import KvlibConnector

LAYERS, HEADS, DIM = 2, 2, 32

init_none_hash(sha256)


class Steps:
    """An engine without a model.

    `late`: as with overlapping steps, one is scheduled before the output of the last is known;
    then what a step does in the worker happens as late as it may. `apart`: the halves of the
    connector meet through vLLM's metadata only, as if they lived in two processes. `drafts`: saves
    begin at the very end of a step, behind its report, as with a draft model.
    """

    def __init__(
        self, folder, path, monkeypatch, *, page=16, pages=200, late=False, apart=False,
        drafts=False, batch=512, role="kv_both", prefix_caching=True, **extra,
    ):  # fmt: skip
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(
            json.dumps(
                {
                    "architectures": ["LlamaForCausalLM"],
                    "model_type": "llama",
                    "hidden_size": HEADS * DIM,
                    "intermediate_size": 64,
                    "num_attention_heads": HEADS,
                    "num_key_value_heads": HEADS,
                    "num_hidden_layers": LAYERS,
                    "vocab_size": 512,
                    "max_position_embeddings": 4096,
                }
            )
        )
        self.page, self.late, self.drafts = page, late, drafts
        scheduling = SchedulerConfig(
            max_num_seqs=16,
            max_num_batched_tokens=batch,
            max_model_len=4096,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            async_scheduling=late,
        )
        model = ModelConfig(str(folder), skip_tokenizer_init=True, dtype="float32")
        cache = CacheConfig(block_size=page, enable_prefix_caching=prefix_caching)
        cache.num_gpu_blocks = pages
        transfer = KVTransferConfig(
            kv_connector="KvlibConnector",
            kv_connector_module_path="kvlib.connectors.vllm",
            kv_role=role,
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={
                "path": str(path), "memory": "64MiB", "disk": "256MiB", "staging": "64MiB",
                "model_id": "stand-in", **extra,
            },
        )  # fmt: skip
        config = VllmConfig(
            scheduler_config=scheduling,
            model_config=model,
            cache_config=cache,
            kv_transfer_config=transfer,
            device_config=DeviceConfig("cpu"),
        )
        spec = FullAttentionSpec(
            block_size=page, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32
        )
        names = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
        caches = KVCacheConfig(
            num_blocks=pages, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)]
        )
        monkeypatch.setattr(vllm_worker.WorkerHalf, "_layout", lambda *_: LAYOUTS["rows"])
        if apart:
            monkeypatch.setattr(vllm_scheduler, "mover_of", lambda _: None)
        self.scheduler = (AsyncScheduler if late else Scheduler)(
            config, caches, StructuredOutputManager(config), block_size=page, log_stats=True
        )
        self.connector = self.scheduler.connector
        self.views = [torch.zeros((pages, HEADS, page, 2 * DIM)) for _ in names]
        self.worker = KvlibConnector(config, KVConnectorRole.WORKER, caches)
        self.worker.register_kv_caches(dict(zip(names, self.views, strict=True)))
        self.mover = self.worker.worker.mover
        self.hasher = get_request_block_hasher(page, sha256)
        self.queue = deque()
        self.texts = {}  # of every request: its tokens, and what its KV is made of
        self.prompts, self.outputs = {}, {}
        self.tables = {}  # the pages of requests, as workers know them
        self.received, self.sent, self.invalid, self.cached = [], [], set(), {}

    # -- what a model would say

    def _extend(self, text, length):
        tokens, sums = text
        while len(sums) < length:
            if len(tokens) <= len(sums):
                tokens.append((sums[-1] * 7 + 3) % 500)
            last = sums[-1] if sums else 1
            sums.append((last * 31 + tokens[len(sums)] + 1) % 9973)
        while len(tokens) <= length:
            tokens.append((sums[len(tokens) - 1] * 7 + 3) % 500)

    def expected(self, text, first, last, layer):
        """What lies in pages for tokens [first, last): [last - first, 2 * DIM] of every head."""
        self._extend(text, last)
        sums = torch.tensor(text[1][first:last], dtype=torch.float32)
        return (sums + layer * 0.25)[:, None].expand(-1, 2 * DIM)

    # -- what an engine does

    def add(self, name, tokens, max_tokens=4, **given):
        """A request."""
        request = Request(
            request_id=name,
            prompt_token_ids=list(tokens),
            sampling_params=SamplingParams(
                max_tokens=max_tokens, ignore_eos=True, **given.pop("sampling", {})
            ),
            pooling_params=None,
            block_hasher=self.hasher,
            **given,
        )
        self.texts[name] = (list(tokens), [])
        self.prompts[name] = len(tokens)
        self.outputs[name] = []
        self.scheduler.add_request(request)
        return request

    def abort(self, name):
        """A client has gone."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self):
        """One step, or half of two that overlap."""
        if self.scheduler.has_requests():
            todo = self.scheduler.schedule()
            work = [todo, None] if self.late else [todo, self._execute(todo)]
            self.queue.append(work)
        if len(self.queue) > self.late or (self.queue and not self.scheduler.has_requests()):
            todo, done = self.queue.popleft()
            done = done or self._execute(todo)
            for outputs in self.scheduler.update_from_output(todo, done).values():
                for out in outputs.outputs:
                    self.outputs[out.request_id] += out.new_token_ids
                    if out.prefill_stats is not None:
                        self.cached[out.request_id] = out.prefill_stats.num_cached_tokens

    def run(self, seconds=20.0):
        """Until nothing is left to do; all outputs are what the model says."""
        until = time.monotonic() + seconds
        while self.scheduler.has_requests() or self.queue:
            assert time.monotonic() < until, "the engine does not come to an end"
            self.step()
            if not any(work[0].total_num_scheduled_tokens for work in self.queue):
                time.sleep(0.001)
        for name, out in self.outputs.items():
            text, prompt = self.texts[name], self.prompts[name]
            self._extend(text, prompt + len(out))
            assert text[0][prompt : prompt + len(out)] == out

    def until(self, condition, seconds=10.0):
        """Steps until something holds."""
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit
            self.step()
            time.sleep(0.001)

    def reset(self, *, connector=False):
        """Forget what is in the pages."""
        assert self.scheduler.reset_prefix_cache(reset_connector=connector)
        for view in self.views:
            view.fill_(-1)

    def _execute(self, todo):
        meta = deepcopy(todo.kv_connector_metadata)
        self.worker.handle_preemptions(meta)
        self.worker.bind_connector_metadata(meta)
        output = KVConnectorOutput()
        starts = {new.req_id: new.num_computed_tokens for new in todo.scheduled_new_reqs}
        cached = todo.scheduled_cached_reqs
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in todo.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
        for name, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self.tables[name] = []
            self.tables[name] = self.tables[name] + list(ids[0] if ids else ())
        sampled = []
        for name, count in todo.num_scheduled_tokens.items():
            sampled.append(self._forward(name, starts[name], count))
        self.worker.start_load_kv(None)
        if not self.drafts:
            self.worker.wait_for_save()
        results = self.worker.get_transfer_results(todo.finished_req_ids)
        output.finished_sending = results.finished_sending
        output.finished_recving = results.finished_recving
        output.invalid_block_ids = self.worker.get_block_ids_with_load_errors()
        output.kv_connector_stats = self.worker.get_kv_connector_stats()
        output.kv_connector_worker_meta = self.worker.build_connector_worker_meta()
        if self.drafts:
            self.worker.wait_for_save()
        self.worker.clear_connector_metadata()
        self.received += sorted(output.finished_recving or ())
        self.sent += sorted(output.finished_sending or ())
        self.invalid |= output.invalid_block_ids
        names = list(todo.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=output,
        )

    def _forward(self, name, start, count):
        request = self.scheduler.requests.get(name)
        text, ids, end = self.texts[name], self.tables[name], start + count
        for layer, view in enumerate(self.views):
            flat = view[ids].transpose(1, 2).reshape(-1, HEADS, 2 * DIM)
            want = self.expected(text, 0, end, layer)[:, None].expand(-1, HEADS, -1)
            assert torch.equal(flat[:start], want[:start]), f"{name}: wrong KV in layer {layer}"
            at = torch.arange(start, end)
            view[torch.tensor(ids)[at // self.page], :, at % self.page] = want[start:]
        return [text[0][end]] if request is not None and end >= request.num_tokens else []

    # -- the end

    def saved(self):
        """Wait until all that was begun is stored."""
        for task in list(self.mover._storing.values()):
            put = task.result(10) if not task.cancelled() else None
            if put is not None:
                put.result(10)

    def assert_empty(self):
        """Nothing is left of any request, in either half; every page is free."""
        scheduler, half = self.scheduler, self.connector.scheduler
        assert not scheduler.requests
        assert not scheduler.running
        assert not scheduler.waiting
        assert not scheduler.kv_holding_waiting
        assert not scheduler.finished_recving_kv_req_ids
        assert not scheduler.failed_recving_kv_req_ids
        assert scheduler.kv_cache_manager.usage == 0
        for kept in (half.ledger.requests, half._requests, half._answers, half._partial):
            assert not kept
        assert not self.mover._tickets
        assert not self.mover._over
        assert not self.worker.worker._finishing
        assert not self.worker.worker._staging
        limit = time.monotonic() + 5
        while self.mover._reserved and time.monotonic() < limit:
            time.sleep(0.001)
        assert self.mover._reserved == 0
        assert self.connector.counts["errors"] == self.worker.counts["errors"] == 0
        assert self.mover.counts["stage_errors"] == self.mover.counts["save_errors"] == 0

    def close(self):
        """Shut it down."""
        self.scheduler.shutdown()
        self.worker.shutdown()
