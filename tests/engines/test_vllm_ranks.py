# SPDX-License-Identifier: Apache-2.0
"""`KvlibConnector` on tensor-parallel ranks.

The first part imitates an engine: all ranks in one process, with vLLM's own life cycle of a step in
a worker (`KVConnectorModelRunnerMixin`) and its own aggregation of their answers
(`KVOutputAggregator`); metadata is copied, as between processes. The last part is the real engine.
"""

import copy
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker import kv_connector_model_runner_mixin as mixin
from vllm_engine import Engine

from kvlib.connectors import vllm, vllm_config
from kvlib.connectors.vllm import KvlibConnector
from kvlib.connectors.vllm_meta import Answer, KvlibWorkerMetadata
from kvlib.connectors.vllm_worker import WorkerHalf
from kvlib.errors import ConfigError, ConnectorError
from kvlib.spec import KVSpec, LayerKind, LayerSpec
from kvlib.testing.recall_model import recall_model, recall_prompt

PAGE, DIM, PAGES = 32, 8, 64


def spec_with(heads):
    """A model of two layers; 0 heads for MLA."""
    layer = LayerSpec(num_kv_heads=heads or 1, k_head_dim=DIM, v_head_dim=DIM)
    if not heads:
        layer = LayerSpec(kind=LayerKind.MLA, num_kv_heads=1, k_head_dim=DIM, v_head_dim=0)
    return KVSpec(model_id="ranks", layers=(layer,) * 2, dtype="float32")


def write_rows(layer, keys, values, memory, slots):
    """What vLLM's own writer would do for the layout of CUDA back ends."""
    memory[slots // PAGE, :, slots % PAGE] = torch.cat([keys, values], dim=-1)


class Request:
    """What the connector reads of a vLLM request."""

    def __init__(self, name, tokens):
        self.request_id = name
        self.all_token_ids = list(tokens)
        self.num_tokens = self.num_prompt_tokens = len(self.all_token_ids)
        self.num_computed_tokens = self.num_in_flight_tokens = 0
        self.mm_features = self.prompt_embeds = self.lora_request = self.pooling_params = None
        self.resumable = self.skip_reading_prefix_cache = False
        self.kv_transfer_params = self.cache_salt = None


class Ranks:
    """An engine without a model: one scheduler's half, and a worker's half for each rank."""

    def __init__(self, monkeypatch, path, ranks, heads=4, **extra):
        self.patch = monkeypatch
        self.spec = spec_with(heads)
        for module in (vllm, vllm_config):
            monkeypatch.setattr(module, "spec_of", lambda *_: self.spec)
        monkeypatch.setattr(mixin, "get_forward_context", lambda: None)
        self.caches, self.workers = [], []
        for rank in range(ranks):
            mine = max(heads // ranks, 1)
            width = 2 * DIM if heads else DIM
            self.caches.append({f"l.{j}": torch.zeros(PAGES, mine, PAGE, width) for j in (0, 1)})
            worker = self._connector(KVConnectorRole.WORKER, path, ranks, rank, extra)
            worker.register_kv_caches(self.caches[rank])
            self.workers.append(worker)
        self.scheduler = self._connector(KVConnectorRole.SCHEDULER, path, ranks, 0, extra)
        self.aggregator = KVOutputAggregator.from_connector(self.workers[0], ranks)
        self.sent, self.received, self.invalid = Counter(), Counter(), set()

    def _connector(self, role, path, ranks, rank, extra):
        layer = SimpleNamespace(
            get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "ROWS"),
            impl=SimpleNamespace(do_kv_cache_update=write_rows),
        )
        parallel = {
            "tensor_parallel_size": ranks,
            "world_size": ranks,
            "rank": rank,
            "pipeline_parallel_size": 1,
        }
        transfer = {
            "kv_connector_extra_config": {"path": str(path), "memory": 0, "disk": "1GiB", **extra},
            "kv_load_failure_policy": "recompute",
            "engine_id": "ranks",
            "is_kv_consumer": True,
            "is_kv_producer": True,
        }
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(**parallel),
            kv_transfer_config=SimpleNamespace(**transfer),
            cache_config=SimpleNamespace(cache_dtype="auto"),
            device_config=SimpleNamespace(device_type="cuda"),  # nobody waits for a copy
            model_config=SimpleNamespace(dtype="float32"),
            compilation_config=SimpleNamespace(static_forward_context={"l.0": layer, "l.1": layer}),
        )
        group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=PAGE))
        return KvlibConnector(config, role, SimpleNamespace(kv_cache_groups=[group]))

    def close(self):
        for worker in self.workers:
            worker.shutdown()

    # -- the model

    def numbers(self, tokens):
        """What a model of these ranks would compute: [layer][rank] -> [T, H, content].

        Every number depends on its token, layer, head of the whole model and channel.
        """
        ranks = len(self.workers)
        whole = max(x.num_kv_heads for x in self.spec.layers)
        width = self.caches[0]["l.0"].shape[-1]
        t = torch.tensor(tokens, dtype=torch.float32)[:, None, None]
        c = torch.arange(width, dtype=torch.float32)[None, None]
        out = []
        for rank, cache in enumerate(self.caches):
            mine = cache["l.0"].shape[1]
            h = (rank * whole // ranks + torch.arange(mine))[None, :, None]
            out.append([torch.sin(t * 0.37 + h * 11 + c * 0.7 + j * 101) for j in (0, 1)])
        return out

    def compute(self, tokens, pages, first=0):
        """Fill the pages of tokens from `first` on, on all ranks."""
        for cache, layers in zip(self.caches, self.numbers(tokens), strict=True):
            for j, x in enumerate(layers):
                for i in range(first, len(tokens)):
                    cache[f"l.{j}"][pages[i // PAGE], :, i % PAGE] = x[i]

    def holds(self, tokens, pages, count, ranks=None):
        """Whether the first `count` tokens of a prompt lie in these pages."""
        for rank, layers in enumerate(self.numbers(tokens)):
            for j, x in enumerate(layers if ranks is None or rank in ranks else ()):
                rows = self.caches[rank][f"l.{j}"][list(pages)].transpose(1, 2).flatten(0, 1)
                if not torch.equal(rows[:count], x[:count]):
                    return False
        return True

    # -- the engine

    def step(self, scheduled=(), finished=(), preempted=()):
        """One step: (request, pages, tokens computed before, tokens of this step) each."""
        blocks = {request.request_id: (list(pages),) for request, pages, _, _ in scheduled}
        output = SimpleNamespace(
            preempted_req_ids=set(preempted),
            finished_req_ids=set(finished),
            has_sync_kv_loads=False,
            scheduled_new_reqs=[
                SimpleNamespace(req_id=r.request_id, num_computed_tokens=n)
                for r, _, n, _ in scheduled
            ],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens={r.request_id: n for r, _, _, n in scheduled},
            kv_connector_block_state=SimpleNamespace(get_block_ids=blocks.__getitem__),
        )
        meta = self.scheduler.build_connector_meta(output)
        del output.kv_connector_block_state
        results = []
        for worker in self.workers:
            output.kv_connector_metadata = copy.deepcopy(meta)
            self.patch.setattr(mixin, "get_kv_transfer_group", lambda worker=worker: worker)
            worker.handle_preemptions(output.kv_connector_metadata)
            with mixin.KVConnectorModelRunnerMixin._get_kv_connector_output(output) as found:
                for request, pages, before, count in scheduled:
                    self.compute(request.all_token_ids[: before + count], pages, before)
            found = copy.deepcopy(found)
            results.append(ModelRunnerOutput.with_kv_conn_output_only(found))
        assert EMPTY_MODEL_RUNNER_OUTPUT.kv_connector_output is None
        if results[0] is EMPTY_MODEL_RUNNER_OUTPUT:
            results[0] = copy.copy(results[0])
        found = self.aggregator.aggregate(results).kv_connector_output
        self.invalid |= found.invalid_block_ids
        self.sent.update(found.finished_sending or ())
        self.received.update(found.finished_recving or ())
        self.scheduler.update_connector_output(found)
        return found

    def until(self, over, seconds=20):
        """Steps without work until something is so."""
        end = time.monotonic() + seconds
        while not over():
            assert time.monotonic() < end
            self.step()
            time.sleep(0.002)

    def store(self, name, tokens, pages):
        """A prompt that is computed, stored and over."""
        request = Request(name, tokens)
        assert self.scheduler.get_num_new_matched_tokens(request, 0)[0] in (None, 0)
        self.step([(request, pages, 0, len(tokens))])
        request.num_computed_tokens = len(tokens)
        if self.scheduler.request_finished(request, list(pages))[0]:
            self.step(finished=[name])
            self.until(lambda: self.sent[name] == 1)
        stores = [worker.worker.mover.store for worker in self.workers]
        keys = stores[0].block_keys(self.spec, tokens)
        # Ranks that share a head see what another one has put when that is committed.
        self.until(lambda: all(x.match(self.spec, keys) == len(keys) for x in stores))

    def look_up(self, request, local=0, seconds=20):
        """The hit, after waiting for it."""
        answer = []

        def over():
            answer[:] = self.scheduler.get_num_new_matched_tokens(request, local)
            return answer[0] is not None

        self.until(over, seconds)
        return answer[0]

    def begin_load(self, request, pages, count):
        blocks = SimpleNamespace(get_block_ids=lambda: (list(pages),))
        self.scheduler.update_state_after_alloc(request, blocks, count)

    def idle(self):
        """Whether nothing of any request is left anywhere."""
        half = self.scheduler.scheduler
        left = [half._answers, half._partial, half._questions, half._pages, half.ledger.requests]
        for worker in self.workers:
            mover = worker.worker.mover
            left += [worker.worker._staging, worker.worker._finishing, mover._tickets]
            left += [mover._reserved]
        return not any(left)

    def errors(self):
        names = ("errors", "load_errors", "stage_errors", "save_errors")
        counts = [x.counts for x in (*self.workers, self.scheduler)]
        counts += [worker.worker.mover.counts for worker in self.workers]
        return sum(count[name] for count in counts for name in names)


PROMPT = list(range(1000, 1000 + 64 * 7 + 3))
HOME, AWAY = range(14, 29), range(30, 45)


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """Makes engines that are closed in the end."""
    made = []

    def make(ranks, heads=4, **extra):
        made.append(Ranks(monkeypatch, extra.pop("path", tmp_path), ranks, heads, **extra))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


def hold(monkeypatch, mover, name):
    """Let a rank's mover wait, at its first call of a method, until the event is set."""
    method, event = getattr(mover, name), threading.Event()

    def slow(*args, **settings):
        assert event.wait(20)
        return method(*args, **settings)

    monkeypatch.setattr(mover, name, slow)
    return event


@pytest.mark.parametrize(("ranks", "heads"), [(2, 4), (4, 4), (4, 2), (2, 1), (3, 6), (2, 0)])
def test_what_all_ranks_store_all_ranks_load(engine, ranks, heads):
    """Also where ranks share a head, and with MLA, where one writes for all."""
    them = engine(ranks, heads)
    them.store("a", PROMPT, HOME)
    writers = [worker.worker.mover.counts["saved_tokens"] > 0 for worker in them.workers]
    assert sum(writers) == min(ranks, heads or 1)
    again = Request("b", PROMPT)
    assert them.look_up(again) == 448
    assert not them.holds(PROMPT, AWAY, 448)
    them.begin_load(again, AWAY, 448)
    them.until(lambda: them.received["b"])
    assert them.received["b"] == 1
    assert them.holds(PROMPT, AWAY, 448)
    assert not them.invalid
    kept, _ = them.scheduler.request_finished(again, list(AWAY))
    them.step(finished=["b"])
    them.until(lambda: them.sent["b"] == kept)
    assert them.idle()
    assert them.errors() == 0


def test_engines_of_other_sizes_share_nothing(engine):
    """Records of two ranks are no records of four, nor of an engine that is not split."""
    engine(2).store("a", PROMPT, HOME)
    four = engine(4)
    assert four.look_up(Request("b", PROMPT)) == 0
    four.store("c", PROMPT, HOME)
    again = Request("d", PROMPT)
    assert four.look_up(again) == 448
    four.begin_load(again, AWAY, 448)
    four.until(lambda: four.received["d"])
    assert four.holds(PROMPT, AWAY, 448)


@pytest.mark.parametrize("poor", [0, 1, 2])
@pytest.mark.parametrize("left", [0, 4])
def test_a_hit_is_what_all_ranks_have(engine, poor, left):
    them = engine(4)
    them.store("a", PROMPT, HOME)
    store = them.workers[poor].worker.mover.store
    keys = store.block_keys(them.spec, PROMPT)
    for found in store._directory.run(store._identities(them.spec, None), keys):
        if found.first >= left:
            store._drop(found.key)
    again = Request("b", PROMPT)
    assert them.look_up(again) == left * 64
    if left:
        them.begin_load(again, AWAY, left * 64)
        them.until(lambda: them.received["b"])
        assert them.holds(PROMPT, AWAY, left * 64)
        assert not them.invalid
    else:
        them.begin_load(again, AWAY, 0)
    them.scheduler.request_finished(again, list(AWAY))
    them.step(finished=["b"])
    them.until(them.idle)
    assert them.errors() == 0


def test_nothing_is_promised_before_the_last_rank_has_answered(engine, monkeypatch):
    them = engine(3, 6)
    them.store("a", PROMPT, HOME)
    slow = hold(monkeypatch, them.workers[1].worker.mover, "_stage")
    again = Request("b", PROMPT)
    for _ in range(30):
        assert them.scheduler.get_num_new_matched_tokens(again, 0) == (None, False)
        them.step()
        time.sleep(0.002)
    slow.set()
    assert them.look_up(again) == 448


@pytest.mark.parametrize("late", [None, 0, 1])
def test_a_rank_that_cannot_load(engine, monkeypatch, late):
    """Its pages are invalid, loading is over when all ranks are through, and is never retried.

    The rank that fails may be the first to end, or the last.
    """
    them = engine(2)
    them.store("a", PROMPT, HOME)
    again = Request("b", PROMPT)
    assert them.look_up(again) == 448
    bad = them.workers[1].worker.mover

    def broken(*args):
        raise RuntimeError("a fault")

    monkeypatch.setattr(bad.pages, "write_layer", broken)
    slow = None
    if late is not None:
        slow = hold(monkeypatch, them.workers[late].worker.mover, "_load")
    them.begin_load(again, AWAY, 448)
    for _ in range(10):
        them.step()
        time.sleep(0.005)
    if slow is not None:
        assert not them.received
        assert bool(them.invalid) == (late == 0)
        slow.set()
    them.until(lambda: them.received["b"])
    assert them.invalid == set(AWAY[:14])
    assert them.holds(PROMPT, AWAY, 448, ranks=[0])
    begun = time.monotonic()
    assert them.scheduler.get_num_new_matched_tokens(again, 0) == (0, False)
    assert time.monotonic() - begun < 5  # at once: no second attempt, no deadline
    them.begin_load(again, AWAY, 0)
    them.step([(again, AWAY, 0, len(PROMPT))])
    assert them.holds(PROMPT, AWAY, 448)
    other = Request("c", PROMPT)  # another request is served
    monkeypatch.undo()
    assert them.scheduler.scheduler.state(other).read


def test_a_request_that_is_aborted_while_it_is_staged(engine, monkeypatch):
    """Its answers are nobody's, also when a request of the same name asks again."""
    them = engine(2)
    them.store("a", PROMPT, HOME)
    slow = hold(monkeypatch, them.workers[1].worker.mover, "_stage")
    gone = Request("b", PROMPT)
    assert them.scheduler.get_num_new_matched_tokens(gone, 0) == (None, False)
    for _ in range(10):  # one rank answers
        them.step()
        time.sleep(0.005)
    assert them.scheduler.scheduler._partial
    assert them.scheduler.request_finished(gone, []) == (False, None)
    them.step(finished=["b"])
    other = Request("b", list(range(5000, 5000 + 448)))
    assert them.scheduler.get_num_new_matched_tokens(other, 0) == (None, False)
    slow.set()
    assert them.look_up(other) == 0
    them.scheduler.request_finished(other, [])
    them.step(finished=["b"])
    them.until(them.idle)
    assert them.errors() == 0


def test_a_request_that_asks_again_in_one_step(engine, monkeypatch):
    """What was staged is dropped, all answer the new question, and old answers do not count."""
    them = engine(2)
    them.store("a", PROMPT, HOME)
    request = Request("b", PROMPT)
    assert them.look_up(request, 256) == 192
    assert them.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    assert them.look_up(request) == 448
    slow = hold(monkeypatch, them.workers[1].worker.mover, "_stage")
    late = Request("c", PROMPT)
    assert them.scheduler.get_num_new_matched_tokens(late, 0) == (None, False)
    for _ in range(3):  # one rank answers each time, the other never
        for _ in range(10):
            them.step()
            time.sleep(0.003)
        them.step(preempted=["c"])
        assert them.scheduler.get_num_new_matched_tokens(late, 0) == (None, False)
    (number,) = them.scheduler.scheduler._questions.values()
    old = {("c", n): Answer(7, "exact", 2) for n in range(number)}  # as when steps overlap
    them.scheduler.update_connector_output(
        KVConnectorOutput(kv_connector_worker_meta=KvlibWorkerMetadata(old))
    )
    assert them.scheduler.get_num_new_matched_tokens(late, 0) == (None, False)
    slow.set()
    assert them.look_up(late) == 448


def test_a_late_rank_is_a_miss(engine, monkeypatch):
    them = engine(2, deadline=0.1)
    them.store("a", PROMPT, HOME)
    slow = hold(monkeypatch, them.workers[0].worker.mover, "_stage")
    again = Request("b", PROMPT)
    assert them.look_up(again, seconds=5) == 0
    them.begin_load(again, AWAY, 0)
    slow.set()
    them.scheduler.request_finished(again, list(AWAY))
    them.step(finished=["b"])
    them.until(them.idle)


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_pages_are_kept_until_all_ranks_have_saved(engine, monkeypatch, slow_rank):
    them = engine(2)
    slow = hold(monkeypatch, them.workers[slow_rank].worker.mover, "_copy_out")
    request = Request("a", PROMPT)
    them.look_up(request)
    them.step([(request, HOME, 0, len(PROMPT))])
    request.num_computed_tokens = len(PROMPT)
    assert them.scheduler.request_finished(request, list(HOME))[0]
    them.step(finished=["a"])
    for _ in range(20):
        them.step()
        time.sleep(0.003)
    assert not them.sent
    slow.set()
    them.until(lambda: them.sent["a"])
    for _ in range(5):
        them.step()
    assert them.sent["a"] == 1
    assert them.idle()
    again = Request("b", PROMPT)
    assert them.look_up(again) == 448
    assert them.errors() == 0


def test_what_cannot_be_split_is_refused_at_the_start(engine, monkeypatch):
    """Codecs that mix heads, other heads than vLLM's pages have, and heads that do not go round."""
    mixing = "cachegen:variant=lmcache"
    with pytest.raises(ConfigError, match="codes the KV heads of a layer together"):
        engine(2, codec=mixing)
    for heads in (0, 1):  # whole on every rank
        them = engine(2, heads, codec=mixing)
        assert [x.worker.mover.store.head_range for x in them.workers] == [None, None]
    with pytest.raises(ConfigError, match="cannot be dealt out"):
        engine(3)
    them = engine(2)
    first = them.workers[0]
    with pytest.raises(ConnectorError, match="deals heads out in another way"):
        WorkerHalf(first._vllm_config, first.config, spec_with(6), them.caches[0])


def test_answers_join_in_any_order():
    answers = [Answer(7, "exact"), Answer(3, "exact"), Answer(5, "int8@1")]
    whole = [
        answers[i].join(answers[j]).join(answers[3 - i - j])
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    assert set(whole) == {Answer(3, "int8@1", 3)}


# -- the real engine

RECALL = recall_prompt(120)  # 241 tokens, then the question


def real_engine(model, store, ranks):
    """Two ranks leave their threads where they are: machines with one memory node can do that."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return Engine(
        model,
        store,
        env=env,
        tensor_parallel_size=ranks,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=1024,
    )


def ask(engine, index):
    """A question: how many tokens came from the store, whether the answer is right, the output."""
    found = engine.generate([*RECALL.input_ids, *RECALL.question(index)], max_tokens=2)
    return found["cached"][0], found["tokens"][0][0] == RECALL.values[index], found["tokens"]


def test_two_real_ranks(tmp_path):
    """Stored, found, found by a new process; an engine of one rank has records of its own."""
    model, store = tmp_path / "model", tmp_path / "kv"
    recall_model().save_pretrained(model)
    with real_engine(model, store, 2) as two:
        cold = ask(two, 7)
        assert cold[:2] == (0, True)
        assert ask(two, 7) == (192, *cold[1:])
        assert ask(two, 90)[:2] == (192, True)
        counts = two.counts()
        assert counts["loaded_tokens"] == 2 * 2 * 192  # each rank counts its own
        assert counts["errors"] == counts["load_errors"] == counts["stage_errors"] == 0
    with real_engine(model, store, 1) as one:
        assert ask(one, 7) == cold
        assert ask(one, 7) == (192, *cold[1:])
    with real_engine(model, store, 2) as two:
        assert ask(two, 7) == (192, *cold[1:])
        assert ask(two, 33)[:2] == (192, True)
        assert two.counts()["saved_tokens"] == 0
