#!/usr/bin/env python3
"""kvpool's kernels beside FlashInfer's page module and torch indexing: one process, one GPU, the same tensors.

    vs_flashinfer.py --library libkvp_kernels_cuda.so [--json FILE]

Each line is a shape: the median time of one call in microseconds, from replays of a CUDA graph of 32 calls that take
turns on several sets of tensors, and how many times longer the others take than kvpool. Before a shape is timed,
all of them write into equal caches, which must then be equal to the last byte; a difference ends the program with 1.

torch: the way of engines without a kernel for it, cache.view(-1, H, D)[slot_mapping] = k, for K and for V. The library
is made by the CMake target kvp_kernels_cuda_shared.
"""
import argparse
import ctypes
import json
import statistics
import sys

import torch

PAGE = 16
CALLS = 32
REPLAYS = 15
CSR, SLOTS = 1, 2
INDEX_ROWS, INDEX_CSR = 1, 2
F16 = 2


class PlaneView(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("page_stride", ctypes.c_int64), ("token_stride", ctypes.c_int64),
                ("head_stride", ctypes.c_int64), ("heads", ctypes.c_uint32), ("dim", ctypes.c_uint32),
                ("dtype", ctypes.c_uint32), ("reserved", ctypes.c_uint32)]


class TokenView(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("token_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64)]


class Rows(ctypes.Structure):
    _fields_ = [("heads", ctypes.c_void_p), ("rows", ctypes.c_void_p), ("row_stride", ctypes.c_uint64),
                ("max_sequences", ctypes.c_uint32), ("row_pages", ctypes.c_uint32)]


class Address(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_uint32), ("index_bits", ctypes.c_uint32), ("nnz", ctypes.c_int64),
                ("nnz_device", ctypes.c_void_p), ("batch_indices", ctypes.c_void_p), ("positions", ctypes.c_void_p),
                ("batch", ctypes.c_int64), ("kv_indptr", ctypes.c_void_p), ("kv_indices", ctypes.c_void_p),
                ("slot_mapping", ctypes.c_void_p), ("page_table", ctypes.c_void_p),
                ("page_table_stride", ctypes.c_int64), ("page_table_pages", ctypes.c_int64), ("table", Rows),
                ("seq_slots", ctypes.c_void_p), ("append_indptr", ctypes.c_void_p), ("start_lengths", ctypes.c_void_p),
                ("row_counts", ctypes.c_void_p), ("row_versions", ctypes.c_void_p)]


class AppendArgs(ctypes.Structure):
    _fields_ = [("planes", ctypes.POINTER(PlaneView)), ("sources", ctypes.POINTER(TokenView)),
                ("n_planes", ctypes.c_uint32), ("pages", ctypes.c_uint32), ("page_tokens", ctypes.c_uint32),
                ("n_copies", ctypes.c_uint32), ("copies", ctypes.c_void_p), ("at", Address),
                ("errors", ctypes.c_void_p)]


class IndexArgs(ctypes.Structure):
    _fields_ = [("source", ctypes.c_uint32), ("index_bits", ctypes.c_uint32), ("slot_bits", ctypes.c_uint32),
                ("pages", ctypes.c_uint32), ("page_tokens", ctypes.c_uint32), ("all_tokens", ctypes.c_uint32),
                ("batch", ctypes.c_int64), ("nnz", ctypes.c_int64), ("kv_capacity", ctypes.c_int64),
                ("batch_device", ctypes.c_void_p), ("append_lengths", ctypes.c_void_p),
                ("append_indptr", ctypes.c_void_p), ("append_each", ctypes.c_int64), ("table", Rows),
                ("seq_slots", ctypes.c_void_p), ("start_lengths", ctypes.c_void_p), ("progress", ctypes.c_void_p),
                ("row_counts", ctypes.c_void_p), ("row_versions", ctypes.c_void_p), ("in_kv_indptr", ctypes.c_void_p),
                ("in_kv_indices", ctypes.c_void_p), ("in_last_page_len", ctypes.c_void_p),
                ("in_page_table", ctypes.c_void_p), ("in_page_table_stride", ctypes.c_int64),
                ("in_page_table_pages", ctypes.c_int64), ("in_page_counts", ctypes.c_void_p),
                ("ret_seq_lens", ctypes.c_void_p), ("ret_kv_indptr", ctypes.c_void_p),
                ("ret_kv_indices", ctypes.c_void_p), ("ret_kv_last_page_len", ctypes.c_void_p),
                ("ret_append_indptr", ctypes.c_void_p), ("ret_batch_indices", ctypes.c_void_p),
                ("ret_positions", ctypes.c_void_p), ("ret_slot_mapping", ctypes.c_void_p),
                ("ret_nnz", ctypes.c_void_p), ("errors", ctypes.c_void_p)]


class Kernels:
    """libkvp_kernels_cuda.so"""

    def __init__(self, path):
        self.library = ctypes.CDLL(path)

    def call(self, name, args):
        function = getattr(self.library, name)
        function.restype = ctypes.c_int
        status = function(ctypes.byref(args), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        if status != 0:
            raise RuntimeError(f"{name} answers {status}")


def view_of(cache):
    """A cache [pages, tokens, heads, dim] or [pages, tokens, dim]."""
    heads, dim = (cache.shape[2], cache.shape[3]) if cache.dim() == 4 else (1, cache.shape[2])
    return PlaneView(cache.data_ptr(), cache.stride(0) * 2, cache.stride(1) * 2,
                     cache.stride(2) * 2 if cache.dim() == 4 else dim * 2, heads, dim, F16, 0)


def flat_of(source):
    return TokenView(source.data_ptr(), source.stride(0) * 2, source.stride(1) * 2 if source.dim() == 3 else
                     source.shape[1] * 2)


def append_args(caches, sources, s):
    args = AppendArgs()
    args.planes = (PlaneView * len(caches))(*[view_of(c) for c in caches])
    args.sources = (TokenView * len(sources))(*[flat_of(x) for x in sources])
    args.n_planes, args.pages, args.page_tokens = len(caches), caches[0].shape[0], PAGE
    args.at.kind, args.at.index_bits, args.at.nnz = CSR, 32, s["nnz"]
    args.at.batch = s["indptr"].numel() - 1
    args.at.batch_indices, args.at.positions = s["batch_indices"].data_ptr(), s["positions"].data_ptr()
    args.at.kv_indptr, args.at.kv_indices = s["indptr"].data_ptr(), s["indices"].data_ptr()
    return args


def make_sets(lengths, sets, widths):
    """Index tensors and sources of `sets` sets over one pool with its own pages for each."""
    counts = [-(-n // PAGE) for n in lengths]
    pages = sum(counts)
    nnz = sum(lengths)
    order = torch.randperm(pages * sets, dtype=torch.int32, device="cuda")
    length = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    indptr = torch.zeros(len(lengths) + 1, dtype=torch.int32, device="cuda")
    indptr[1:] = torch.cumsum(torch.tensor(counts, dtype=torch.int32, device="cuda"), 0)
    append_indptr = torch.zeros_like(indptr)
    append_indptr[1:] = torch.cumsum(length, 0)
    batch = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32, device="cuda"), length.long())
    positions = torch.arange(nnz, dtype=torch.int32, device="cuda") - append_indptr[batch.long()]
    result = []
    for s in range(sets):
        indices = order[s * pages:(s + 1) * pages].contiguous()
        page = indices[(indptr[batch.long()] + positions // PAGE).long()]
        result.append({"nnz": nnz, "indices": indices, "indptr": indptr, "batch_indices": batch,
                       "positions": positions, "last": (length - 1) % PAGE + 1,
                       "slots": page.long() * PAGE + positions.long() % PAGE,
                       "sources": [torch.randn((nnz,) + w, dtype=torch.float16, device="cuda") for w in widths]})
    return result, pages * sets, append_indptr, length


def time_us(call, sets):
    """The median time of call(set) in a graph of CALLS calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for s in sets[:3]:
            call(s)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(CALLS):
            call(sets[i % len(sets)])
    times = []
    for r in range(REPLAYS + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # so that all is enqueued when the GPU comes to it
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if r >= 2:
            times.append(start.elapsed_time(stop) * 1e3 / CALLS)
    return statistics.median(times)


def eager_us(call):
    """The time of one of 100 calls made one after the other, without a graph: launches and host included."""
    for _ in range(10):
        call(None)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(100):
        call(None)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 10


def same(name, expected, found):
    for a, b in zip(expected, found):
        if not torch.equal(a.view(torch.int16) if a.dtype == torch.float16 else a,
                           b.view(torch.int16) if b.dtype == torch.float16 else b):
            sys.exit(f"{name}: the results differ")


def compare_append(kernels, flashinfer, name, lengths, widths, mla):
    moved = 4 * sum(lengths) * sum(w[0] * w[1] if len(w) == 2 else w[0] for w in widths)
    sets, pages, _, _ = make_sets(lengths, max(2, min(32, int(400e6 / moved) + 1)), widths)
    caches = [[torch.zeros((pages, PAGE) + w, dtype=torch.float16, device="cuda") for w in widths] for _ in range(3)]
    for s in sets:
        s["args"] = append_args(caches[0], s["sources"], s)

    def ours(s):
        kernels.call("kvp_cuda_append", s["args"])

    def theirs(s):
        if mla:
            flashinfer.append_paged_mla_kv_cache(*s["sources"], s["batch_indices"], s["positions"], *caches[1],
                                                 s["indices"], s["indptr"], s["last"])
        else:
            flashinfer.append_paged_kv_cache(*s["sources"], s["batch_indices"], s["positions"], tuple(caches[1]),
                                             s["indices"], s["indptr"], s["last"], "NHD")

    def by_torch(s):
        for cache, source in zip(caches[2], s["sources"]):
            cache.view((-1,) + tuple(cache.shape[2:]))[s["slots"]] = source

    for s in sets:
        for call in (ours, theirs, by_torch):
            call(s)
    torch.cuda.synchronize()
    same(name, caches[1], caches[0])
    same(name, caches[1], caches[2])
    row = {"case": name, "tokens": sum(lengths), "kvpool_us": time_us(ours, sets),
           "flashinfer_us": time_us(theirs, sets), "torch_us": time_us(by_torch, sets)}
    row["gb_per_s"] = moved / row["kvpool_us"] * 1e-3
    return row


def compare_index(kernels, flashinfer, batch, context, each):
    """After an append of `each` tokens to `context`: lengths, batch indices and positions, as FlashInfer gives them."""
    length = torch.full((batch,), context + each, dtype=torch.int32, device="cuda")
    count = -(-(context + each) // PAGE)
    indptr = (torch.arange(batch + 1, device="cuda") * count).int()
    append_indptr = (torch.arange(batch + 1, device="cuda") * each).int()
    last = (length - 1) % PAGE + 1
    rows = torch.randperm(batch * count, dtype=torch.int32, device="cuda")
    slots = torch.arange(batch, dtype=torch.int32, device="cuda")
    start = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    nnz = batch * each
    out = {n: torch.full((k,), -7, dtype=t, device="cuda")
           for n, k, t in (("ret_seq_lens", batch, torch.int32), ("ret_kv_indptr", batch + 1, torch.int32),
                           ("ret_kv_indices", batch * count, torch.int32),
                           ("ret_kv_last_page_len", batch, torch.int32), ("ret_batch_indices", nnz, torch.int32),
                           ("ret_positions", nnz, torch.int32), ("ret_slot_mapping", nnz, torch.int64))}
    args = IndexArgs()
    args.source, args.index_bits, args.slot_bits, args.pages, args.page_tokens = INDEX_ROWS, 32, 64, batch * count, PAGE
    args.batch, args.nnz, args.kv_capacity, args.append_each = batch, nnz, batch * count, each
    args.table.rows, args.table.row_stride = rows.data_ptr(), count * 4
    args.table.max_sequences, args.table.row_pages = batch, count
    args.seq_slots, args.start_lengths = slots.data_ptr(), start.data_ptr()
    for field, tensor in out.items():
        setattr(args, field, tensor.data_ptr())

    def ours(_):
        kernels.call("kvp_cuda_index", args)

    def theirs(_):
        lengths = flashinfer.get_seq_lens(indptr, last, PAGE)
        return (lengths,) + tuple(flashinfer.get_batch_indices_positions(append_indptr, lengths, nnz))

    ours(None)
    same("index", theirs(None), (out["ret_seq_lens"], out["ret_batch_indices"], out["ret_positions"]))
    same("index", (indptr, last, rows), (out["ret_kv_indptr"], out["ret_kv_last_page_len"], out["ret_kv_indices"]))
    name = f"index b{batch} context {context}"
    return [{"case": name, "tokens": nnz, "kvpool_us": time_us(ours, [None]), "flashinfer_us": time_us(theirs, [None])},
            {"case": name + " eager", "tokens": nnz, "kvpool_us": eager_us(ours), "flashinfer_us": eager_us(theirs)}]


def show(row):
    ours = row["kvpool_us"]
    torch_us = row.get("torch_us")
    print(f"{row['case']:34} {row['tokens']:7} {ours:9.2f} {row['flashinfer_us']:11.2f} "
          f"{row['flashinfer_us'] / ours:7.2f} " + (f"{torch_us:9.2f} {torch_us / ours:7.2f}" if torch_us else ""),
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True)
    parser.add_argument("--json")
    options = parser.parse_args()
    try:
        import flashinfer
    except ImportError as error:
        sys.exit(f"needs the flashinfer-python wheel: {error}")
    kernels = Kernels(options.library)
    torch.manual_seed(1)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, flashinfer {flashinfer.__version__}; "
          "us a call, and how many times kvpool's")
    print(f"{'case':34} {'tokens':>7} {'kvpool':>9} {'flashinfer':>11} {'x':>7} {'torch':>9} {'x':>7}")
    loads = {"[1]*8": [1] * 8, "[1]*256": [1] * 256, "[4993]+[1]*7": [4993] + [1] * 7, "[5000]": [5000],
             "[625]*8": [625] * 8, "[16384]": [16384], "[1024]*64": [1024] * 64}
    models = {"l1b H8 D64": [(8, 64)] * 2, "l3b, l8b H8 D128": [(8, 128)] * 2, "l70b-tp8 H1 D128": [(1, 128)] * 2,
              "mla 512 + 64": [(512,), (64,)]}
    rows = []
    for model, widths in models.items():
        for load, lengths in loads.items():
            rows.append(compare_append(kernels, flashinfer, f"{model} {load}", lengths, widths, model[:3] == "mla"))
            show(rows[-1])
    for context in (1024, 32768):
        for each in (1, 256):
            for row in compare_index(kernels, flashinfer, 256, context, each):
                rows.append(row)
                show(row)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
