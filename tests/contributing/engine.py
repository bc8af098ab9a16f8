"""An engine that times the stages of a step."""

import time
from collections import Counter

import specdec
from specdec.clock import finish
from specdec.engines.base import Engine, Stages


class TimedStages(Stages):
    def __init__(self, device):
        self.device, self.seconds = device, Counter()

    def perform(self, key, stage, reason, *args):
        began = time.perf_counter()
        result = stage(*args)
        finish(self.device)
        self.seconds[stage.__name__.strip("_")] += time.perf_counter() - began
        return result


class Timed(Engine):
    def __init__(self):
        self.runs = []  # an engine serves many

    def stages(self, device):
        self.runs.append(TimedStages(device))
        return self.runs[-1]


pair, engine = specdec.demo.load(), Timed()
specdec.generate(pair.target, [1, 2, 3], max_new_tokens=4, engine=engine)
assert {*engine.runs[0].seconds} == {"propose", "score", "decide", "commit"}
