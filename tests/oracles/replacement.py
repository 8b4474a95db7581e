# SPDX-License-Identifier: Apache-2.0
"""Caches as their papers describe them, with plain lists, in records of one size or in bytes.

Each class has `access(key, size) -> hit` and `held`, a set. Every use is an access; nothing is
deleted from outside. Lists have their oldest entry first.
"""

import itertools


class LRU:
    def __init__(self, capacity):
        self.capacity, self.queue, self.sizes = capacity, [], {}

    @property
    def held(self):
        return set(self.queue)

    def access(self, key, size):
        self.sizes[key] = size
        if key in self.queue:
            self.queue.remove(key)
            self.queue.append(key)
            return True
        if size <= self.capacity:
            while sum(self.sizes[k] for k in self.queue) + size > self.capacity:
                self.queue.pop(0)
            self.queue.append(key)
        return False


class ARC:
    """Megiddo and Modha 2003, Fig. 4, cases in its order; lengths are sums of sizes."""

    def __init__(self, capacity):
        self.c, self.p, self.sizes = capacity, 0.0, {}
        self.t1, self.t2, self.b1, self.b2 = [], [], [], []

    @property
    def held(self):
        return {*self.t1, *self.t2}

    def total(self, *lists):
        return sum(self.sizes[k] for one in lists for k in one)

    def replace(self, key):
        t1 = self.total(self.t1)
        if self.t1 and (t1 > self.p or (key in self.b2 and t1 == self.p) or not self.t2):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def access(self, key, size):
        self.sizes[key] = size
        for one in (self.t1, self.t2):  # case I
            if key in one:
                one.remove(key)
                self.t2.append(key)
                return True
        if size > self.c:
            return False
        b1, b2 = self.total(self.b1), self.total(self.b2)
        if key in self.b1:  # case II
            self.p = min(self.p + size * max(b2 / b1, 1), self.c)
        elif key in self.b2:  # case III
            self.p = max(self.p - size * max(b1 / b2, 1), 0)
        while self.total(self.t1, self.t2) + size > self.c:
            self.replace(key)
        for one in (self.b1, self.b2):
            if key in one:
                one.remove(key)
                self.t2.append(key)
                break
        else:
            self.t1.append(key)
        while self.b1 and self.total(self.t1, self.b1) > self.c:  # case IV
            self.b1.pop(0)
        while self.b2 and self.total(self.t1, self.t2, self.b1, self.b2) > 2 * self.c:
            self.b2.pop(0)
        return False


class PaperARC(ARC):
    """Fig. 4 word for word, for records of size 1: room is made in each case by itself."""

    def access(self, key, size):
        assert size == 1
        self.sizes[key] = 1
        for one in (self.t1, self.t2):
            if key in one:
                one.remove(key)
                self.t2.append(key)
                return True
        full = len(self.t1) + len(self.t2) == self.c
        if key in self.b1:
            self.p = min(self.p + max(len(self.b2) / len(self.b1), 1), self.c)
            if full:
                self.replace(key)
            self.b1.remove(key)
            self.t2.append(key)
        elif key in self.b2:
            self.p = max(self.p - max(len(self.b1) / len(self.b2), 1), 0)
            if full:
                self.replace(key)
            self.b2.remove(key)
            self.t2.append(key)
        else:
            l1, l2 = len(self.t1) + len(self.b1), len(self.t2) + len(self.b2)
            if l1 == self.c:
                if len(self.t1) < self.c:
                    self.b1.pop(0)
                    if full:
                        self.replace(key)
                else:
                    self.t1.pop(0)
            elif l1 + l2 >= self.c:
                if l1 + l2 == 2 * self.c:
                    self.b2.pop(0)
                if full:
                    self.replace(key)
            self.t1.append(key)
        return False


class S3FIFO:
    """Yang et al. 2023, Algorithm 1."""

    def __init__(self, capacity, small=0.1, promote=1):
        self.capacity, self.share, self.promote = capacity, small, promote
        self.small, self.main, self.ghosts = [], [], []
        self.freq, self.sizes = {}, {}

    @property
    def held(self):
        return {*self.small, *self.main}

    def total(self, keys):
        return sum(self.sizes[k] for k in keys)

    def access(self, key, size):
        self.sizes[key] = size
        if key in self.held:
            self.freq[key] = min(self.freq[key] + 1, 3)
            return True
        if size > self.capacity:
            return False
        while self.total(self.small) + self.total(self.main) + size > self.capacity:
            if self.small and (
                self.total(self.small) >= self.share * self.capacity or not self.main
            ):
                self.evict_small()
            else:
                self.evict_main()
        if key in self.ghosts:
            self.ghosts.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)
        self.freq[key] = 0
        return False

    def evict_small(self):
        while self.small:
            key = self.small.pop(0)
            if self.freq[key] >= self.promote:
                self.freq[key] = 0
                self.main.append(key)
            else:
                self.ghosts.append(key)
                while self.ghosts and self.total(self.ghosts) > self.capacity * (1 - self.share):
                    self.ghosts.pop(0)
                return

    def evict_main(self):
        while True:
            key = self.main.pop(0)
            if not self.freq[key]:
                return
            self.freq[key] -= 1
            self.main.append(key)


class Aged:
    """LFU-DA (worth 1) and GDSF (worth cost / size): K = F worth + L; ties by last use."""

    def __init__(self, capacity, by_size):
        self.capacity, self.by_size = capacity, by_size
        self.age, self.clock, self.sizes = 0.0, 0, {}
        self.uses, self.rank = {}, {}

    @property
    def held(self):
        return set(self.rank)

    def access(self, key, size, cost=1.0):
        self.sizes[key] = size
        self.clock += 1
        hit = key in self.rank
        if not hit:
            if size > self.capacity:
                return False
            while sum(self.sizes[k] for k in self.rank) + size > self.capacity:
                victim = min(self.rank, key=self.rank.get)
                self.age = max(self.age, self.rank.pop(victim)[0])
            self.uses[key] = 0
        self.uses[key] += 1
        worth = cost / size if self.by_size else 1.0
        self.rank[key] = self.age + self.uses[key] * worth, self.clock
        return hit


def most_hits(trace, capacity):
    """Hits of the best possible cache of `capacity` records of size 1; any may be turned away."""
    states = {frozenset(): 0}
    for key in trace:
        after = {}
        for state, hits in states.items():
            if key in state:
                options, hits = [state], hits + 1
            else:
                full = state | {key}
                options = [
                    state,
                    *(
                        full - set(out)
                        for out in itertools.combinations(full, max(0, len(full) - capacity))
                    ),
                ]
            for option in options:
                if len(option) <= capacity:
                    after[option] = max(after.get(option, 0), hits)
        states = after
    return max(states.values())
