# %% [markdown]
# # A tour of the engine
#
# This file runs on a CPU with the bundled model in less than a minute: `python examples/tour.py`. The notebook
# `tour.ipynb` has the same cells. You see what a step does, how prompts share pages, what happens when pages run out,
# and how the host's work hides behind the device's. At the end you write a scheduling policy and measure it without a
# GPU. It needs a clone of the repository, and matplotlib (`pip install 'minisgl[plot]'`).

# %%
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from minisgl.build import build_engine
from minisgl.config import Config
from minisgl.core.engine import Engine, Observer
from minisgl.core.model_config import read_spec
from minisgl.core.radix_cache import Node
from minisgl.core.types import Request, SamplingParams, StepRecord
from minisgl.text.tokenizer import Tokenizer
from minisgl_bench import metrics, traffic
from minisgl_bench.cost_model import read_gpu
from minisgl_bench.simulation import Clients, Replica
from minisgl_bench.traffic import Segment, Session

small = Config(num_pages=40, max_running_requests=4, max_prefill_length=48)
built = build_engine(small)
engine, tokenizer = built.engine, Tokenizer.load(built.folder)


def ask(name: str, text: str, tokens: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    engine.add(Request.make(name, tokenizer.encode(text), params))


# %% [markdown]
# ## What a step does
#
# The scheduler plans a step: some requests decode one token each, and beside them chunks of prompts are computed, 48
# tokens in all at most. An observer sees every step once its result is taken in.


# %%
class Steps(Observer):
    """Keeps the records of the steps, and prints them if asked to."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.printing = True

    def observe(self, record: StepRecord) -> None:
        self.records.append(record)
        if self.printing:
            chunks = [f"{chunk.id} {chunk.start}..{chunk.start + chunk.length}" for chunk in record.chunks]
            words = [f"decode {' '.join(record.decodes)}" if record.decodes else "", *(f"prompt {c}" for c in chunks)]
            words += [f"{name} has {cached} tokens from the cache" for name, cached in record.admitted if cached]
            words += [f"retract {name}" for name in record.retracted]
            words += [f"{name} ends" for name, _ in record.ended]
            print(f"step {record.step:3}: " + "; ".join(filter(None, words)))


steps = Steps()
engine.observers.append(steps)
story = "Once upon a time there was a small engine that served large models to many people. "
ask("A", story * 4 + "One day", 6)
ask("B", "The capital of France is", 6)
while engine.has_work:
    engine.step()

# %% [markdown]
# ## The radix tree
#
# Pages of finished prompts stay in a tree over their tokens. A new prompt borrows the pages of its longest prefix. Two
# more stories begin like the first; each line below is a run of pages.

# %%
ask("C", story * 4 + "Every night", 6)
ask("D", story * 2 + "The end", 6)
while engine.has_work:
    engine.step()


def draw(node: Node, depth: int = 0) -> None:
    for child in node.children.values():
        text = tokenizer.decode(child.tokens.tolist())
        shown = text if len(text) < 50 else f"{text[:24]} ... {text[-20:]}"
        print(f"{'  ' * depth}{len(child.pages)} pages, used {child.uses} times: {shown!r}")
        draw(child, depth + 1)


draw(engine.cache.tree.root)

# %% [markdown]
# ## Who owns which page
#
# Six requests want more pages than there are. A letter is a page of that request, `+` a cached page that nobody uses,
# `*` one that is shared, `.` a free one. When no page is left, the request that came last is retracted: it gives its
# pages back and goes on later, with the same text.


# %%
def map_pages(engine: Engine) -> str:
    cache = engine.cache
    marks = ["."] * cache.num_pages
    nodes = list(cache.tree.root.children.values())
    for node in nodes:
        nodes += node.children.values()
        for page in node.pages.tolist():
            marks[page] = "*" if node.locks else "+"
    for slot, request in enumerate(engine.table.requests):
        if request is not None:
            for page in cache.page_table[slot, : cache.row_pages[slot]].tolist():
                marks[page] = request.request.id if marks[page] == "." else marks[page]
    return "".join(marks)


steps.printing = False
for number, name in enumerate("EFGHIJ"):
    ask(name, f"{number} is my favourite number, and this is what I like about it: " * 3, 120)
while engine.has_work:
    engine.step()
    if engine.scheduler.step % 20 == 0:
        print(map_pages(engine), f"{len(engine.scheduler.waiting)} wait, {engine.stats().retracted} were retracted")
print(map_pages(engine), "at the end")

# %% [markdown]
# ## Overlap
#
# The host plans and launches a step while the device computes the one before it. One character is a millisecond:
# `p` plan, `l` launch, `w` wait, `c` commit on the host, `#` on the device.

# %%
WIDTH = 110


def timeline(records: Iterable[StepRecord], scale: float = 1e-3) -> None:
    records = list(records)
    start = records[0].planned
    host, device = [" "] * WIDTH, [" "] * WIDTH

    def paint(line: list[str], begin: float, end: float, mark: str) -> None:
        first = int((begin - start) / scale)
        for place in range(first, min(WIDTH, max(first + 1, int((end - start) / scale)))):
            line[place] = mark

    for number, record in enumerate(records):
        paint(host, record.awaited, record.arrived, "w")
        paint(host, record.planned, record.launched, "p")
        paint(host, record.launched, record.sent, "l")
        paint(host, record.arrived, record.committed, "c")
        if record.device is not None:
            paint(device, *record.device, "#="[number % 2])
    print("host   " + "".join(host))
    print("device " + "".join(device))


timeline(steps.records[-12:-4], scale=(steps.records[-5].committed - steps.records[-12].planned) / WIDTH)
engine.close()

# %% [markdown]
# ## A policy of your own
#
# A policy is a class in a file of yours. This one takes the shortest prompts first, but what has waited longer than
# `patience` seconds goes before them, the oldest first. Change it, and run the next two cells again.

# %%
folder = Path(tempfile.mkdtemp())
mine = folder / "mine.py"
mine.write_text("""
from itertools import islice

from minisgl.core.policy import Policy


class Impatient(Policy):
    def __init__(self, patience=5.0):
        self.patience = patience  # s

    def order(self, requests, view):
        def place(request):
            late = view.now - request.arrived_at > self.patience
            return (0, request.arrived_at) if late else (1, view.remaining(request))

        return sorted(islice(requests, 200), key=place)
""")

# %% [markdown]
# The simulator runs the same scheduler and the same cache in virtual time, over a model of what a step of Qwen3-14B
# costs on an H200: no GPU, no weights. 400 requests of three applications, each with a long system prompt, come in
# bursts faster than they can be served. Each policy gets the same ones.

# %%
root = next(path for path in (Path.cwd(), *Path.cwd().parents) if (path / "benchmark" / "models").is_dir())
model, gpu = read_spec(root / "benchmark" / "models" / "Qwen3-14B"), read_gpu("h200")
rng = random.Random(0)
sessions = []
for index in range(400):
    own = min(6000, int(rng.lognormvariate(6.5, 1.0)))
    segments = [Segment(("system", rng.randrange(3)), 2048), Segment(("own", index), own)]
    sessions.append(Session((traffic.single(segments, rng.randint(20, 120)),)))
sessions = traffic.with_arrivals(sessions, rate=25.0, burstiness=0.3, seed=0)


def simulate(policy: str) -> list[metrics.RequestRecord]:
    config = Config(schedule_policy=policy, max_running_requests=48, num_pages=4000)
    clients = Clients([Replica(model, config, gpu)], sessions)
    clients.run(lambda done: None)
    return clients.records


# %% [markdown]
# Who waits how long for the first token? The plot is in `policies.png`: the further a line is to the left, the better.
# `fcfs` lets everybody wait behind the long prompts, `lpm` uses the cache best and lets a few wait longest.

# %%
figure = Figure(figsize=(7, 4))
axes = figure.subplots()
print(f"{'policy':12} {'mean':>8} {'median':>8} {'90 %':>8} {'worst':>8}   TTFT in s")
for name, policy in {"fcfs": "fcfs", "lpm": "lpm", "mine": f"{mine}:Impatient:patience=5"}.items():
    ttft = np.sort(metrics.latencies(simulate(policy))["ttft"])
    print(f"{name:12} {ttft.mean():8.2f} {np.median(ttft):8.2f} {np.quantile(ttft, 0.9):8.2f} {ttft[-1]:8.2f}")
    axes.plot(ttft, np.linspace(0, 100, len(ttft)), label=name)
axes.set(xlabel="time to first token, s", ylabel="% of requests", title="Qwen3-14B on an H200, simulated")
axes.legend()
figure.savefig("policies.png", dpi=120)
