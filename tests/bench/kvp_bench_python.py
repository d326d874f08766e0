#!/usr/bin/env python3
"""What the Python package costs, beside a peer or a floor in the same run.

    kvp_bench_python.py [--json] [--check] [--shape tiny|1b|8b] [NAME…]

    import      processor time of `import kvpool`, the least of several processes                       bar 50 ms
    advance     Pool.advance of 256 sequences beside kvp_advance by ctypes, in turn                     bar 2.00
    cache       a decode step of generate, batch 8, 2000 tokens: KVPoolCache and DynamicCache in turn   bar 1.10
                with its growth: the last quarter of the steps beside the first, over DynamicCache's    bar 1.10
    graph       a decode step in a CUDA graph, append by kvpool.page and attention by SDPA (and by
                FlashInfer where it is installed), on a pool beside a private cache                     bar 1.02
    resume      first token behind a worker's SIGKILL, with 8192 tokens of context: prefilling again
                beside claim, attach and a decode step                                                  bar 5.00

By default all of them; what needs torch, transformers or a GPU is skipped by name where it is missing. Without a GPU
the shape is tiny, which shows that the program runs, not what it measures. --check: exit 1 over a bar. Environment:
$KVPOOL_LIBRARY and $KVPOOL_BIN_DIR as for the package; in a bundle it finds its own.
"""
from __future__ import annotations

import argparse
import array
import concurrent.futures
import ctypes
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).absolute().parent
for place in (HERE.parent / "python", HERE.parents[1] / "client/python"):  # of a bundle, of the sources
    if (place / "kvpool").is_dir():
        sys.path.insert(0, str(place))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(place), os.environ.get("PYTHONPATH"))))
        break
for variable, name in (("KVPOOL_LIBRARY", "lib/libkvpool.so.0"), ("KVPOOL_BIN_DIR", "bin")):
    if (HERE.parent / name).exists():
        os.environ.setdefault(variable, str(HERE.parent / name))

import kvpool  # noqa: E402
from kvpool import _abi  # noqa: E402

SEQUENCES = 256
ADVANCE_ROUNDS = 600
RESUMES = 5
SHAPES = {
    "tiny": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
}


class Skipped(Exception):
    pass


def median_us(times: list[float]) -> float:
    return statistics.median(times) * 1e6


# ---- without torch -------------------------------------------------------------------------------------------------


def bench_import(_: argparse.Namespace) -> dict:
    source = "import time; t = time.process_time(); import kvpool; print(time.process_time() - t)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times = [float(subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True,
                                  env=environment).stdout) for _ in range(8)]
    return {"import_ms": min(times) * 1e3, "import_ms_bar": 50.0}


def bench_advance(_: argparse.Namespace) -> dict:
    library = _abi.library()
    library.kvp_advance.restype = ctypes.c_int
    library.kvp_advance.argtypes = [ctypes.c_void_p, ctypes.c_uint32, *[ctypes.c_void_p] * 3, ctypes.c_uint,
                                    *[ctypes.c_void_p] * 3]
    spec = kvpool.PoolSpec(f"advance-{os.getpid()}", SEQUENCES * 160, 16, kv_heads=1, head_dim=16, dtype="uint8",
                           max_sequence_tokens=2560)
    with kvpool.connect(backend="host") as client, client.create_pool(spec) as pool:
        seqs = pool.open_many(range(SEQUENCES))
        pool.advance(seqs, [1024] * SEQUENCES)
        wires = array.array("Q", [seq.wire for seq in seqs])
        theirs, ours = [], []
        for tokens in range(1025, 1025 + 2 * ADVANCE_ROUNDS, 2):
            room = array.array("I", [tokens] * SEQUENCES)
            begin = time.perf_counter()
            status = library.kvp_advance(pool.pointer, SEQUENCES, wires.buffer_info()[0], room.buffer_info()[0], None,
                                         0, None, None, None)
            theirs.append(time.perf_counter() - begin)
            assert status == 0
            wanted = [tokens + 1] * SEQUENCES
            begin = time.perf_counter()
            pool.advance(seqs, wanted)
            ours.append(time.perf_counter() - begin)
    return {"advance_python_us": median_us(ours), "advance_c_us": median_us(theirs),
            "advance_ratio": median_us(ours) / median_us(theirs), "advance_ratio_bar": 2.0}


# ---- with a model --------------------------------------------------------------------------------------------------


def need_models(gpu: bool = False) -> None:
    """torch and transformers, or Skipped. Not with cuDNN's attention: it makes a plan for each length that it has not
    met, tens of ms of whichever cache comes to that length first, and does not give the same twice."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise Skipped(f"{error.name} is not installed") from None
    torch.backends.cuda.enable_cudnn_sdp(False)
    if gpu and not torch.cuda.is_available():
        raise Skipped("there is no GPU")


def device_of() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def make_model(shape: str):
    """Random weights, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=16384, bos_token_id=1, eos_token_id=None,
                         pad_token_id=0, dtype="bfloat16")
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device_of()):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def generate(model, ids, cache, tokens: int, **more):
    import torch

    return model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                          do_sample=False, **more)


class Turns:
    """Two generations in two threads, of which one runs: after each step it is the other's turn, so that what else the
    machine does falls on both alike."""

    def __init__(self, names: tuple[str, str]) -> None:
        self._turn = threading.Condition()
        self._whose = names[0]
        self._after = {names[0]: names[1], names[1]: names[0]}
        self.times: dict[str, list[float]] = {name: [] for name in names}
        self._began = 0.0

    def wait(self, name: str) -> None:
        with self._turn:
            if not self._turn.wait_for(lambda: self._whose == name, timeout=600):
                raise TimeoutError(f"{name} waited 600 s for its turn")
        self._began = time.perf_counter()

    def give(self, name: str, last: bool = False) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times[name].append(time.perf_counter() - self._began)
        with self._turn:
            self._whose = other = self._after[name]
            if last:
                self._after[other] = other
            self._turn.notify_all()

    def criterion(self, name: str):
        """Stops nothing; generate asks it behind each step."""
        import torch

        def ask(ids, scores, **_):
            self.give(name)
            self.wait(name)
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        return ask


def side_by_side(model, ids, caches: dict, tokens: int) -> tuple[dict, dict[str, list[float]]]:
    """What generate says with each of two caches, and how long each of its steps took."""
    turns = Turns(tuple(caches))

    def run(name: str):
        turns.wait(name)
        try:
            return generate(model, ids, caches[name], tokens, stopping_criteria=[turns.criterion(name)])
        finally:
            turns.give(name, last=True)

    with concurrent.futures.ThreadPoolExecutor(len(caches)) as threads:
        running = {name: threads.submit(run, name) for name in caches}
        said = {name: thread.result() for name, thread in running.items()}
    # Neither the pass over the prompt nor what generate does behind the last step is a step.
    return said, {name: times[1:-1] for name, times in turns.times.items()}


def quarter(steps: list[float], which: int) -> list[float]:
    return steps[which * len(steps) // 4 : (which + 1) * len(steps) // 4]


def bench_cache(options: argparse.Namespace) -> dict:
    need_models()
    import torch
    from kvpool import hf
    from transformers import DynamicCache

    model = make_model(options.shape)
    tokens = 2000 if options.shape != "tiny" else 40
    ids = torch.randint(3, 500, (8, 16), device=model.device)
    spec = hf.pool_spec(model, f"cache-{os.getpid()}", 8 * (tokens + 32) // 16 + 16, 16)
    times: dict[str, list[list[float]]] = {"kvpool": [[], [], [], []], "dynamic": [[], [], [], []]}
    backend = "cuda" if model.device.type == "cuda" else "host"
    with kvpool.connect(backend=backend) as client, client.create_pool(spec) as pool:
        for trial in range(3):  # the first warms up
            with hf.KVPoolCache(model.config, pool) as cache:
                said, steps = side_by_side(model, ids, {"dynamic": DynamicCache(config=model.config), "kvpool": cache},
                                           64 if trial == 0 and tokens > 64 else tokens)
            assert torch.equal(said["dynamic"], said["kvpool"]), "the tokens differ"
            for name in times if trial else ():
                for which in range(4):
                    times[name][which] += quarter(steps[name], which)
    step = {name: [median_us(part) for part in parts] for name, parts in times.items()}
    whole = {name: median_us([took for part in parts for took in part]) for name, parts in times.items()}
    growth = {name: parts[3] / parts[0] for name, parts in step.items()}
    return {"cache_kvpool_us": whole["kvpool"], "cache_dynamic_us": whole["dynamic"],
            "cache_kvpool_quarters_us": step["kvpool"], "cache_dynamic_quarters_us": step["dynamic"],
            "cache_ratio": whole["kvpool"] / whole["dynamic"], "cache_ratio_bar": 1.10,
            "cache_growth_ratio": growth["kvpool"] / growth["dynamic"], "cache_growth_ratio_bar": 1.10}


class Decode:
    """A decode step over a cache [pages, page_size, heads, dim] a layer: append, then attention over all tokens."""

    LAYERS, BATCH, HEADS, KV_HEADS, DIM, PAGE, TOKENS = 16, 8, 32, 8, 64, 16, 2000

    def __init__(self, pairs, pages_of) -> None:
        import torch

        self.pairs = pairs
        batch, tokens = self.BATCH, self.TOKENS
        per_row = -(-tokens // self.PAGE)
        i32 = {"dtype": torch.int32, "device": "cuda"}
        self.table = torch.tensor([pages_of(row)[:per_row] for row in range(batch)], **i32)
        self.indptr = torch.arange(batch + 1, **i32) * per_row
        self.indices = self.table.flatten()
        self.last = torch.full((batch,), (tokens - 1) % self.PAGE + 1, **i32)
        self.rows = torch.arange(batch, **i32)
        self.positions = torch.full((batch,), tokens - 1, **i32)
        generator = torch.Generator("cuda").manual_seed(3)
        make = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
        self.k = torch.randn(self.LAYERS, batch, self.KV_HEADS, self.DIM, **make)
        self.v = torch.randn(self.LAYERS, batch, self.KV_HEADS, self.DIM, **make)
        self.q = torch.randn(batch, self.HEADS, 1, self.DIM, **make)
        for k, v in pairs:
            for plane in (k, v):
                plane.copy_(torch.randn(plane.shape, **make))

    def append(self, layer: int) -> None:
        kvpool.append_paged_kv_cache(self.k[layer], self.v[layer], self.rows, self.positions, self.pairs[layer],
                                     self.indices, self.indptr, self.last)

    def by_sdpa(self):
        import torch

        q = self.q
        for layer in range(self.LAYERS):
            self.append(layer)
            k, v = (plane[self.table].flatten(1, 2)[:, : self.TOKENS].transpose(1, 2) for plane in self.pairs[layer])
            q = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return q

    def wrap(self):
        """FlashInfer's wrapper, planned for this step."""
        import flashinfer
        import torch

        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(128 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_cuda_graph=True,
            paged_kv_indptr_buffer=self.indptr.clone(), paged_kv_indices_buffer=self.indices.clone(),
            paged_kv_last_page_len_buffer=self.last.clone())
        wrapper.plan(self.indptr, self.indices, self.last, self.HEADS, self.KV_HEADS, self.DIM, self.PAGE,
                     q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)

        def step():
            q = self.q[:, :, 0]
            for layer in range(self.LAYERS):
                self.append(layer)
                q = wrapper.run(q, self.pairs[layer])
            return q

        return step


def captured(step):
    """A graph of the step, and its output."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = step()
    return graph, out


def in_turn(graphs: dict) -> dict[str, float]:
    """The median time of a replay of each, µs."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in graphs}
    for trial in range(60):
        for name, (graph, _) in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                graph.replay()
            stop.record()
            stop.synchronize()
            if trial >= 10:
                times[name].append(start.elapsed_time(stop) * 1e3 / 5)
    return {name: statistics.median(values) for name, values in times.items()}


def bench_graph(_: argparse.Namespace) -> dict:
    need_models(gpu=True)
    import torch
    from kvpool import flashinfer

    pages = Decode.BATCH * -(-Decode.TOKENS // Decode.PAGE) + 8
    spec = kvpool.PoolSpec(f"graph-{os.getpid()}", pages, Decode.PAGE, layers=Decode.LAYERS, kv_heads=Decode.KV_HEADS,
                           head_dim=Decode.DIM, dtype="bfloat16")
    found: dict = {}
    with kvpool.connect(backend="cuda") as client, client.create_pool(spec) as pool:
        seqs = pool.open_many(range(Decode.BATCH))
        pool.advance(seqs, [Decode.TOKENS] * Decode.BATCH)
        ours = Decode([flashinfer.paged_kv_cache(pool, layer) for layer in range(Decode.LAYERS)],
                      lambda row: seqs[row].pages)
        private = [tuple(plane.clone(memory_format=torch.contiguous_format) for plane in pair)
                   for pair in ours.pairs]
        theirs = Decode(private, lambda row: seqs[row].pages)
        ways = {"sdpa": lambda decode: decode.by_sdpa}
        if importlib.util.find_spec("flashinfer"):
            ways["flashinfer"] = lambda decode: decode.wrap()
        for way, step_of in ways.items():
            graphs = {"pool": captured(step_of(ours)), "private": captured(step_of(theirs))}
            us = in_turn(graphs)
            assert torch.equal(graphs["pool"][1], graphs["private"][1]), f"{way}: the results differ"
            found |= {f"graph_{way}_pool_us": us["pool"], f"graph_{way}_private_us": us["private"],
                      f"graph_{way}_ratio": us["pool"] / us["private"], f"graph_{way}_ratio_bar": 1.02}
            del graphs
        del ours, theirs, private
        torch.cuda.synchronize()
    return found


def resume_worker(shape: str, endpoint: str, name: str, tokens: int) -> None:
    """The process that is killed."""
    from kvpool import hf

    need_models()
    model = make_model(shape)
    client = kvpool.connect(endpoint)
    cache = hf.KVPoolCache(model.config, client.attach(name), durable=True)
    said = generate(model, prompt_of(model, tokens), cache, 2)
    print(json.dumps([client.session.resume_secret.hex(), cache.handle(), said.tolist()]), flush=True)
    sys.stdin.read()


def prompt_of(model, tokens: int):
    import torch

    return torch.randint(3, 500, (1, tokens), generator=torch.Generator().manual_seed(5)).to(model.device)


def timed(call) -> tuple[float, object]:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def bench_resume(options: argparse.Namespace) -> dict:
    need_models()
    import torch
    from kvpool import hf
    from transformers import DynamicCache

    shape = options.shape if options.shape == "tiny" else "8b"
    tokens = 8192 if shape != "tiny" else 300
    model = make_model(shape)
    prompt = prompt_of(model, tokens)
    spec = hf.pool_spec(model, f"resume-{os.getpid()}", tokens // 16 + 16, 16, linger_ms=60_000)
    backend = "cuda" if model.device.type == "cuda" else "host"
    prefill, resumed, claims = [], [], []
    with kvpool.connect(backend=backend) as client, client.create_pool(spec) as pool:
        expected = generate(model, prompt, DynamicCache(config=model.config), 3)
        for _ in range(RESUMES):
            with subprocess.Popen([sys.executable, __file__, "--worker", shape, client.endpoint, pool.name,
                                   str(tokens)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
                secret, handle, said = json.loads(worker.stdout.readline())
                worker.kill()
            said = torch.tensor(said, device=model.device)
            prefill.append(timed(lambda: generate(model, prompt, DynamicCache(config=model.config), 1))[0])

            def resume(secret=secret, handle=handle, said=said):
                claims.append(timed(lambda: client.claim(bytes.fromhex(secret)))[0])
                cache = hf.KVPoolCache.attach(model.config, pool, hf.Handle(handle[0], tuple(handle[1]), handle[2]))
                return generate(model, said, cache, 1), cache

            took, (got, cache) = timed(resume)
            resumed.append(took)
            cache.close()
            assert torch.equal(got, expected), "the tokens differ"
    ms = {name: statistics.median(times) * 1e3
          for name, times in (("prefill", prefill), ("resume", resumed), ("claim", claims))}
    return {"resume_prefill_ms": ms["prefill"], "resume_ms": ms["resume"], "resume_claim_ms": ms["claim"],
            "resume_times_sooner": ms["prefill"] / ms["resume"], "resume_times_sooner_bar": 5.0}


# ---- all of it -----------------------------------------------------------------------------------------------------

BENCHES = {"import": bench_import, "advance": bench_advance, "cache": bench_cache, "graph": bench_graph,
           "resume": bench_resume}


def over_a_bar(found: dict) -> bool:
    for name, bar in found.items():
        if name.endswith("_bar"):
            value = found[name[:-4]]
            if value < bar if name.startswith("resume") else value > bar:
                return True
    return False


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        resume_worker(*sys.argv[2:5], int(sys.argv[5]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in BENCHES]:
        parser.error(f"no bench {unknown[0]}; there are {', '.join(BENCHES)}")
    if options.shape is None:
        try:
            options.shape = "1b" if device_of() == "cuda" else "tiny"
        except ImportError:
            options.shape = "tiny"
    found: dict = {}
    for name in options.names or BENCHES:
        try:
            part = BENCHES[name](options)
        except Skipped as reason:
            print(f"skipped {name}: {reason}", file=sys.stderr)
            continue
        found |= part
        if not options.json:
            for key, value in part.items():
                shown = value if isinstance(value, list) else [value]
                print(f"{key:28} " + " ".join(f"{number:10.2f}" for number in shown), flush=True)
    if options.json:
        print(json.dumps(found, indent=2))
    return 1 if options.check and over_a_bar(found) else 0


if __name__ == "__main__":
    sys.exit(main())
