# SPDX-License-Identifier: Apache-2.0
"""`EpisodicCache`: a long conversation in bounded memory, one cache for each episode of it.

    cache = kvlib.EpisodicCache(model, tokenizer, budget=4096)
    cache.build(utterances)
    ask = cache.ask("When did Ann move to Lisbon?")
    output = model.generate(ask.input_ids, past_key_values=ask.cache, max_new_tokens=50)

EpiCache (arXiv 2509.17396). The history is cut into segments of a few utterances, which are
embedded and clustered by topic into **episodes**. For each episode the whole history is prefilled
block by block under the policy `epicache`, with the episode's most typical segment as the patched
prompt: so each cache has seen everything, and keeps what matters to its own topic. A question goes
to the episode whose centroid it is nearest to.

No episode's prefill ever holds more than its budget and one block. That is bounded, but not for
free: the history is prefilled once for each episode, and `episodes` budgets are held in the end.
Positions are the true ones, so a history longer than what the model was trained on stays that.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kvlib.cache import KVCache
from kvlib.cache_layers import EvictableLayer
from kvlib.errors import ConfigError
from kvlib.eviction.epicache import INSTRUCTION, EpiCache, patch_digest
from kvlib.eviction.words import end_of_turn, token_ids
from kvlib.model_hooks import decoder_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    Vectors: TypeAlias = NDArray[np.float32]

__all__ = ["Ask", "Episode", "EpisodicCache", "cluster", "medoids"]

_SINKS = 4
_RESTARTS = 10
_ITERATIONS = 100
_EMBEDDED_TOKENS = 2048  # of a segment, by the model itself


class Ask(NamedTuple):
    """What `generate()` needs for one question.

    Attributes:
        episode: index in `EpisodicCache.episodes`.
        cache: a copy of the episode's, to be continued; the episode's own stays as it is.
        input_ids: int64 [1, n]: all of the history, and the question.
    """

    episode: int
    cache: KVCache
    input_ids: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """One topic of a conversation.

    Attributes:
        segments: indices of its segments.
        typical: indices of those that the patched prompt was made of.
        centroid: float32 [d], the mean of its segments' embeddings.
        cache: of the whole history.
    """

    segments: tuple[int, ...]
    typical: tuple[int, ...]
    centroid: "Vectors"
    cache: KVCache


class EpisodicCache:
    """Caches of one conversation, one for each episode, and the choice between them.

    Args:
        model: any that `KVCache` takes, in eval mode.
        tokenizer: its own.
        budget: entries per head and layer that an episode's cache keeps, on average. A fraction of
            the history bounds no memory.
        block: tokens of the history that are prefilled at a time.
        episodes: at most; fewer if there are fewer different segments.
        segment: consecutive utterances that are clustered as one.
        representatives: segments nearest to the centroid that make up the patched prompt, in the
            order in which they were said.
        alpha: see `kvlib.eviction.epicache.EpiCache`.
        floor: likewise.
        profile: likewise; a file from `kvlib calibrate epicache`.
        system: what comes before the history and always stays.
        embedder: gives float [n, d] for n texts, such as `SentenceTransformer.encode`. Without one,
            the model's own last hidden states are averaged over a text's tokens: nothing else to
            load, but the paper's answers were worse with it than with any embedding model.
        seed: of the clustering.
        model_id: see `KVCache`.

    Attributes:
        episodes: of the history, in the order in which they begin.
        segments: its texts.
        peak_bytes: most bytes that the layers of one cache held at any time while its history was
            prefilled, numbers of the policy included. Scoring a block copies one layer at a time on
            top of that.

    Raises:
        ConfigError: parameters that make no sense.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: Any,
        *,
        budget: float | int,
        block: int = 512,
        episodes: int = 4,
        segment: int = 4,
        representatives: int = 1,
        alpha: float = 1.1,
        floor: float = 0.25,
        profile: str | None = None,
        system: str = "",
        embedder: Callable[[list[str]], Any] | None = None,
        seed: int = 42,
        model_id: str | None = None,
    ) -> None:
        numbers = {
            "block": block,
            "episodes": episodes,
            "segment": segment,
            "representatives": representatives,
        }
        if wrong := [f"{k}={n!r}" for k, n in numbers.items() if not _is_whole(n, least=1)]:
            raise ConfigError(
                f"EpisodicCache: expected whole numbers of 1 or more, got {', '.join(wrong)}"
            )
        if not _is_whole(seed, least=-(2**31)) or seed >= 2**31:
            raise ConfigError(f"EpisodicCache: seed is an int of 32 bits, got {seed!r:.60}")
        if embedder is not None and not callable(embedder):
            raise ConfigError(
                f"EpisodicCache: embedder is a function of texts, such as the encode of a "
                f"SentenceTransformer, got {embedder!r:.60}"
            )
        self.episodes: tuple[Episode, ...] = ()
        self.segments: tuple[str, ...] = ()
        self.peak_bytes = 0
        self._model, self._tokenizer, self._model_id = model, tokenizer, model_id
        self._block, self._num, self._width = block, episodes, segment
        self._representatives, self._seed = representatives, seed
        self._embedder = embedder or self._mean_states
        self._before, self._after = _frame(tokenizer, system)
        self._history = self._before
        self._policy = EpiCache(
            budget, alpha, floor, max(_SINKS, len(self._before)), profile=profile
        )

    @property
    def nbytes(self) -> int:
        """Bytes that all episodes' caches hold."""
        return sum(episode.cache.nbytes for episode in self.episodes)

    @torch.no_grad()
    def build(
        self,
        history: Sequence[str],
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Take a conversation, in the place of the one before.

        Args:
            history: utterances, with their speakers in words (``Ann said, "..."``); blank ones are
                left out.
            progress: told how many blocks are done, of all episodes together, and of how many.

        Raises:
            ConfigError: no utterances, or none with text; faiss is not installed; or an embedder
                that gives something else.
        """
        said = _with_text(history)
        starts = range(0, len(said), self._width)
        segments = tuple("\n".join(said[i : i + self._width]) for i in starts)
        vectors = self._embed(segments)
        groups = cluster(vectors, self._num, seed=self._seed)
        ids = torch.cat([self._before, token_ids(self._tokenizer, "\n".join(said))])
        pieces = ids.to(self._model.device)[None].split(self._block, dim=1)
        episodes, peak = [], 0
        for number, group in enumerate(groups):
            centroid = vectors[list(group)].mean(0)
            typical = medoids(vectors, group, centroid, self._representatives)
            cache = self._empty([segments[i] for i in typical])
            with _peak(cache, self._model) as most:
                for done, piece in enumerate(pieces):
                    progress(number * len(pieces) + done, len(groups) * len(pieces))
                    decoder_of(self._model)(input_ids=piece, past_key_values=cache, use_cache=True)
                cache.end_prefill()
            peak = max(peak, *most)
            episodes.append(Episode(group, typical, centroid, cache))
        progress(len(groups) * len(pieces), len(groups) * len(pieces))
        self.episodes, self.segments, self.peak_bytes = tuple(episodes), segments, peak
        self._history = ids

    def _empty(self, typical: Sequence[str]) -> KVCache:
        """A cache whose patched prompt asks for the essentials and goes on with these segments."""
        text = INSTRUCTION + end_of_turn(self._tokenizer)
        patch = token_ids(self._tokenizer, text + "\n".join(typical))
        policy = replace(self._policy, patch=patch_digest(patch))
        return KVCache(
            self._model,
            policy,
            prefill_chunk_size=1,  # pieces of any size: only `end_prefill` ends the history
            model_id=self._model_id,
            tokenizer=self._tokenizer,
            patch=patch,
        )

    def route(self, question: str) -> int:
        """The episode whose centroid has the largest cosine with the question's embedding.

        Raises:
            ConfigError: nothing was built yet, or the question has no text.
        """
        if not self.episodes:
            raise ConfigError("EpisodicCache has no history yet: call build(utterances) first")
        if not _is_text(question):
            raise ConfigError(f"EpisodicCache: a question is a text, got {question!r:.60}")
        centroids = np.stack([episode.centroid for episode in self.episodes])
        asked = self._embed([question])[0]
        if asked.shape != centroids[0].shape:
            raise ConfigError(
                f"the embedder gave {len(asked)} numbers for the question, and {len(centroids[0])} "
                "for each text of the history; expected the same"
            )
        return int(np.argmax(_unit(centroids) @ asked))

    def ask(self, question: str) -> Ask:
        """The question behind the history, with a cache that is ready for it.

        What is generated goes into a copy: the next question finds the history as it was. To make
        an answer part of the conversation, build again.

        Raises:
            ConfigError: nothing was built yet, or the question has no text.
        """
        episode = self.route(question)
        asked = token_ids(self._tokenizer, f"\n\n{question}{self._after}")
        ids = torch.cat([self._history, asked]).to(self._model.device)
        return Ask(episode, self.episodes[episode].cache.fork(), ids[None])

    # Embeddings

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> "Vectors":
        """Float32 [n, d] of length 1."""
        given = self._embedder(list(texts))
        try:
            found = np.asarray(given, dtype=np.float32)
        except (TypeError, ValueError) as exc:  # text, or lists of several lengths
            raise ConfigError(
                f"the embedder gave a {type(given).__name__} for {len(texts)} texts that is no "
                f"array ({str(exc).splitlines()[0]:.100}); expected finite numbers "
                f"[{len(texts)}, d]"
            ) from exc
        if found.ndim != 2 or len(found) != len(texts) or not np.isfinite(found).all():
            raise ConfigError(
                f"the embedder gave {found.shape} for {len(texts)} texts; expected finite numbers "
                f"[{len(texts)}, d]"
            )
        return _unit(found)

    @torch.no_grad()
    def _mean_states(self, texts: list[str]) -> "Vectors":
        """The model's last hidden states, averaged over the tokens of each text."""
        out = []
        for text in texts:
            ids = token_ids(self._tokenizer, text)[:_EMBEDDED_TOKENS].to(self._model.device)
            states = decoder_of(self._model)(input_ids=ids[None], use_cache=False).last_hidden_state
            out.append(states[0].float().mean(0).cpu().numpy())
        return np.stack(out)


def _is_whole(given: object, *, least: int) -> bool:
    return isinstance(given, int) and given >= least


def _is_text(given: object) -> bool:
    return isinstance(given, str) and bool(given.strip())


def _with_text(history: object) -> list[str]:
    """The utterances that are not blank."""
    form = "EpisodicCache.build takes a list of utterances, each a text"
    if isinstance(history, str) or not isinstance(history, Iterable):
        raise ConfigError(f"{form}, got {history!r:.60}")
    said = list(history)
    if wrong := [text for text in said if not isinstance(text, str)]:
        raise ConfigError(f"{form} with its speaker ('Ann: Hello.'), got {wrong[0]!r:.60} in it")
    said = [text for text in said if _is_text(text)]
    if not said:
        raise ConfigError(f"{form}: this history has no text")
    return said


def cluster(vectors: "Vectors", num: int, *, seed: int) -> list[tuple[int, ...]]:
    """K-means: indices of the members of each cluster, in the order in which clusters begin.

    Several restarts, of which the best counts; the same seed gives the same clusters.

    Args:
        vectors: float32 [n, d].
        num: clusters; fewer where there are fewer different vectors.
        seed: of the restarts.

    Raises:
        ConfigError: faiss is not installed.
    """
    try:
        faiss: Any = import_module("faiss")
    except ImportError as exc:
        raise ConfigError(
            "EpisodicCache clusters with faiss, which is not installed: run pip install "
            "kvlib[faiss]"
        ) from exc
    num = min(num, len(np.unique(vectors, axis=0)))
    if num == 1:
        return [tuple(range(len(vectors)))]
    options = {"niter": _ITERATIONS, "nredo": _RESTARTS, "seed": seed}
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(vectors)}
    plus_plus = getattr(faiss, "ClusteringInitMethod_KMEANS_PLUS_PLUS", None)
    if plus_plus is not None:  # older ones begin at random points
        options["init_method"] = plus_plus
    means = faiss.Kmeans(vectors.shape[1], num, **options, **limits)
    x = np.ascontiguousarray(vectors, dtype=np.float32)
    means.train(x)
    nearest = means.index.search(x, 1)[1][:, 0]
    groups = [tuple(np.flatnonzero(nearest == i).tolist()) for i in range(num)]
    return sorted(group for group in groups if group)


def medoids(
    vectors: "Vectors", group: Sequence[int], centroid: "Vectors", num: int
) -> tuple[int, ...]:
    """Indices of the members of a cluster nearest to its centroid by cosine, ascending.

    Args:
        vectors: [n, d].
        group: indices of the members.
        centroid: [d].
        num: how many; all if the cluster has fewer.
    """
    near = _unit(vectors[list(group)]) @ _unit(centroid[None])[0]
    best = np.argsort(-near, kind="stable")[:num]
    return tuple(sorted(group[i] for i in best.tolist()))


def _unit(vectors: "Vectors") -> "Vectors":
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-30), dtype=np.float32)


def _frame(tokenizer: Any, system: str) -> tuple[Tensor, str]:
    """Token ids before the history, and the text behind the question."""
    if getattr(tokenizer, "chat_template", None) is None:
        first = getattr(tokenizer, "bos_token_id", None)
        start = torch.tensor([] if first is None else [first], dtype=torch.int64)
        return torch.cat([start, token_ids(tokenizer, f"{system}\n\n" if system else "")]), "\n"
    mark = "#" * 13
    said = [{"role": "system", "content": system}] if system else []
    chat = tokenizer.apply_chat_template(
        [*said, {"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
    )
    before, _, after = str(chat).rpartition(mark)
    return token_ids(tokenizer, before), after


@contextmanager
def _peak(cache: KVCache, model: "PreTrainedModel") -> Iterator[list[int]]:
    """Gives the most bytes that the cache's layers held after the attention of any layer."""
    most = [0]

    def look(*_: Any) -> None:
        held = sum(x.nbytes for x in cache.layers if isinstance(x, EvictableLayer))
        most[0] = max(most[0], held)

    attention = [x for x in decoder_of(model).modules() if hasattr(x, "layer_idx")]
    hooks = [module.register_forward_hook(look) for module in attention]
    try:
        yield most
    finally:
        for hook in hooks:
            hook.remove()
