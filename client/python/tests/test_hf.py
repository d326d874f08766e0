"""KVPoolCache beside transformers' DynamicCache: the same tokens and the same bits, on the host. test_hf_gpu.py has the
same on a GPU."""
from __future__ import annotations

import itertools
import json
import os
import pathlib
import subprocess
import sys
import unittest
import unittest.mock

import hf_models
from support import HAS_HF, Kept, PoolTest

import kvpool

HERE = pathlib.Path(__file__).resolve().parent
NUMBERS = itertools.count()  # of pools: the embedded daemon is the process's, whatever test it serves


@unittest.skipUnless(HAS_HF, "torch and transformers are not installed")
class Host(PoolTest):
    backend, device = "host", "cpu"
    dtypes = ("float32",)

    @classmethod
    def setUpClass(cls) -> None:
        import torch

        cls.torch = torch
        cls.model = hf_models.make(device=cls.device)
        cls.config = cls.model.config

    def spec(self, page_size: int = 4, pages: int = 256, **more) -> kvpool.PoolSpec:
        from kvpool import hf

        return hf.pool_spec(self.model, f"hf-{os.getpid()}-{next(NUMBERS)}", pages, page_size, **more)

    def cache(self, page_size: int = 4, pages: int = 256, **more):
        from kvpool import hf

        spec = self.spec(page_size, pages, **more)
        self.made.append(spec.name)
        return hf.KVPoolCache(self.model.config, self.client.create_pool(spec))

    def prompt(self, batch: int, length: int):
        generator = self.torch.Generator().manual_seed(length * 100 + batch)
        return self.torch.randint(3, 256, (batch, length), generator=generator).to(self.device)

    def generate(self, ids, cache, **more):
        settings = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "output_scores": True,
                    "attention_mask": self.torch.ones_like(ids), **more}
        return self.model.generate(ids, past_key_values=cache, **settings)

    def assert_same(self, ids, cache, scores: bool = True, **more) -> None:
        from transformers import DynamicCache

        expected = self.generate(ids, DynamicCache(config=self.model.config), **more)
        with cache:
            got = self.generate(ids, cache, **more)
            self.assertTrue(self.torch.equal(got.sequences, expected.sequences))
            if scores:
                for ours, theirs in zip(got.scores, expected.scores):
                    self.assertTrue(self.torch.equal(ours, theirs))
        self.assertEqual(cache._rows.pool.free_pages, cache._rows.pool.pages)

    def test_greedy_tokens_and_scores_are_bit_equal_around_page_borders(self) -> None:
        for dtype in self.dtypes:
            self.model.to(getattr(self.torch, dtype))
            for page_size, order, placement in ((1, "NHD", "layer"), (16, "HND", "page"), (64, "NHD", "page")):
                for length in {max(page_size - 1, 1), page_size, page_size + 1}:
                    with self.subTest(dtype=dtype, page_size=page_size, length=length):
                        cache = self.cache(page_size, order=order, placement=placement)
                        self.assert_same(self.prompt(2, length), cache)
        self.model.float()

    def test_models_of_other_kinds_give_the_same_tokens_and_scores(self) -> None:
        llama, ids = self.model, self.prompt(2, 17)
        for kind in hf_models.KINDS:
            for dtype in self.dtypes:
                for layout in ({}, {"order": "HND", "placement": "page"}, {"joined": True}):
                    with self.subTest(kind=kind, dtype=dtype, layout=layout):
                        self.model = hf_models.make(kind, self.device, dtype)
                        if layout.get("joined") and kind == "DeepseekV2":
                            continue  # its K and V have not one shape
                        self.assert_same(ids, self.cache(16, **layout))
        self.model = llama

    def test_a_model_of_mla_keeps_what_it_compresses(self) -> None:
        from kvpool import hf

        model = hf_models.make("DeepseekV3", self.device)
        planes = hf.pool_spec(model, "p", 8, 4).all_planes()
        self.assertEqual([plane[1:4] for plane in planes[:2]], [("ckv", 1, 32), ("kpe", 1, 8)])
        with self.assertRaises(kvpool.InvalidArgument):
            hf.pool_spec(model.config, "p", 8, 4)

    def test_a_page_of_many_heads_is_read_too(self) -> None:
        import transformers

        llama = self.model
        config = transformers.LlamaConfig(**{**hf_models.COMMON, "hidden_size": 80 * 8, "num_attention_heads": 80},
                                          num_key_value_heads=80, head_dim=8)
        self.model = transformers.LlamaForCausalLM(config).eval().to(self.device)
        self.assert_same(self.prompt(2, 65), self.cache(64), max_new_tokens=3)
        self.model = llama

    def test_stored_keys_and_values_are_bit_equal(self) -> None:
        from transformers import DynamicCache

        ids, theirs = self.prompt(3, 9), DynamicCache(config=self.config)
        self.generate(ids, theirs)
        with self.cache() as ours:
            self.generate(ids, ours)
            for layer in range(2):
                keys, values = (plane.torch() for plane in ours._rows.pool.layer(layer))
                for row, seq in enumerate(ours.sequences):
                    self.assertEqual(len(seq), theirs.get_seq_length())
                    for plane, other in ((keys, theirs.layers[layer].keys), (values, theirs.layers[layer].values)):
                        held = plane[seq.pages].flatten(0, 1)[: len(seq)]
                        self.assertTrue(self.torch.equal(held, other[row].transpose(0, 1)))
                del keys, values, plane

    def test_left_padding_sampling_and_returned_sequences_are_the_same(self) -> None:
        ids = self.prompt(3, 11)
        mask = self.torch.ones_like(ids)
        mask[0, :6], mask[1, :1] = 0, 0
        self.assert_same(ids, self.cache(), attention_mask=mask)
        from transformers import DynamicCache

        self.torch.manual_seed(3)
        expected = self.generate(ids, DynamicCache(config=self.config), do_sample=True, num_return_sequences=2)
        with self.cache() as cache:
            self.torch.manual_seed(3)
            got = self.generate(ids, cache, do_sample=True, num_return_sequences=2)
        self.assertTrue(self.torch.equal(got.sequences, expected.sequences))

    def test_four_beams_are_forks_and_give_the_same_tokens(self) -> None:
        for page_size in (1, 4, 16):
            self.assert_same(self.prompt(2, 7), self.cache(page_size=page_size), num_beams=4)

    def test_an_assistant_model_crops_and_gives_the_same_tokens(self) -> None:
        import copy

        from transformers import DynamicCache

        ids = self.prompt(1, 9)
        assistant = copy.deepcopy(self.model)
        with self.torch.no_grad():  # close to the model, so that some guesses hold and some do not
            assistant.lm_head.weight += 0.02 * self.torch.randn_like(assistant.lm_head.weight)
        expected = self.generate(ids, DynamicCache(config=self.config)).sequences
        with self.cache() as cache:
            got = self.generate(ids, cache, assistant_model=assistant)
            self.assertTrue(self.torch.equal(got.sequences, expected))

    def test_a_prompt_in_chunks_gives_the_same_tokens(self) -> None:
        self.assert_same(self.prompt(2, 23), self.cache(16), prefill_chunk_size=5)

    def test_a_second_turn_goes_on_with_what_is_there(self) -> None:
        from transformers import DynamicCache

        ids = self.prompt(2, 9)
        with self.cache() as cache:
            turns = []
            for mine in (cache, DynamicCache(config=self.config)):
                said = self.generate(ids, mine, max_new_tokens=5).sequences
                more = self.torch.cat([said, self.prompt(2, 6)], 1)
                turns.append(self.generate(more, mine, max_new_tokens=8).sequences)
            self.assertTrue(self.torch.equal(*turns))

    def test_prompt_lookup_crops_and_gives_the_same_tokens(self) -> None:
        ids = self.prompt(1, 5).repeat(1, 4)
        self.assert_same(ids, self.cache(), scores=False, prompt_lookup_num_tokens=3)

    def test_crop_and_select_keep_what_they_say(self) -> None:
        with self.cache() as cache:
            self.generate(self.prompt(3, 9), cache, max_new_tokens=2)
            length = cache.get_seq_length()
            before = cache._rows.held(1)[0].clone()
            cache.crop(-3)
            self.assertEqual(([len(seq) for seq in cache.sequences], cache.get_seq_length()),
                             ([length - 3] * 3, length - 3))
            cache.crop(4)
            self.assertEqual(cache.get_seq_length(), 4)
            cache.batch_select_indices(self.torch.tensor([2, 0]))
            cache.batch_repeat_interleave(2)
            plane = cache._rows.pool.plane(2).torch()
            for row, seq in zip((2, 2, 0, 0), cache.sequences):
                self.assertTrue(self.torch.equal(plane[seq.pages].flatten(0, 1)[:4], before[row].transpose(0, 1)[:4]))
            cache.reset()
            self.assertEqual((cache.get_seq_length(), cache.sequences), (0, []))
            del plane

    def test_a_crop_that_ctrl_c_cut_off_is_not_gone_on_from(self) -> None:
        cache = self.cache()
        self.generate(self.prompt(2, 9), cache, max_new_tokens=2)
        with (unittest.mock.patch.object(cache._rows.pool, "advance", side_effect=KeyboardInterrupt),
              self.assertRaises(KeyboardInterrupt)):
            cache.crop(4)
        with self.assertRaisesRegex(kvpool.Mismatch, "reset"):
            self.generate(self.prompt(2, 12), cache, max_new_tokens=1)
        cache.reset()
        self.assert_same(self.prompt(2, 5), cache, max_new_tokens=4)

    def test_out_of_pages_is_said_and_the_next_request_works(self) -> None:
        cache = self.cache(pages=8)
        with self.assertRaises(kvpool.OutOfPages):
            self.generate(self.prompt(2, 9), cache, max_new_tokens=40)
        self.assertEqual(cache._rows.pool.free_pages + sum(len(seq.pages) for seq in cache.sequences), 8)
        cache.reset()
        self.assert_same(self.prompt(2, 5), cache, max_new_tokens=8)

    def test_a_pool_of_another_model_is_refused(self) -> None:
        from kvpool import hf

        with self.assertRaises(kvpool.InvalidArgument):
            hf.KVPoolCache(self.config, self.pool(layers=2))

    def test_what_is_no_config_pool_or_handle_is_named(self) -> None:
        from kvpool import hf

        cache = self.cache()
        pool = cache._rows.pool
        for call, name in ((lambda: hf.KVPoolCache(None, pool), "NoneType"),
                           (lambda: hf.KVPoolCache(self.config, "pool"), "str"),
                           (lambda: hf.pool_spec("llama", "p", 8, 4), "str"),
                           (lambda: hf.KVPoolCache.attach(self.config, pool, b"handle"), "bytes")):
            with self.assertRaisesRegex(kvpool.InvalidArgument, f"^{name} is no "):
                call()

    def test_models_of_multi_query_attention_are_asked_what_they_cache(self) -> None:
        import transformers

        from kvpool import hf

        llama = self.model
        for more in ({}, {"new_decoder_architecture": True, "num_kv_heads": 2}):
            with self.subTest(**more):
                config = transformers.FalconConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, **more,
                                                   num_attention_heads=4, eos_token_id=None, pad_token_id=0)
                self.model = transformers.FalconForCausalLM(config).eval().to(self.device)
                self.assert_same(self.prompt(2, 9), self.cache(), max_new_tokens=6)
                with self.assertRaisesRegex(kvpool.InvalidArgument, "must be given the model"):
                    hf.pool_spec(config, "p", 8, 4)
        self.model = llama

    def test_models_that_are_not_served_are_refused_at_once(self) -> None:
        import transformers

        from kvpool import hf

        cache = self.cache()
        sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                 "num_attention_heads": 4}
        for config, text in ((transformers.T5Config(d_model=64, num_layers=2, num_heads=4), "has an encoder"),
                             (transformers.Gemma2Config(**sizes), "sliding_attention; only full attention"),
                             (transformers.MambaConfig(**sizes), "linear_attention; only full attention")):
            for call in (lambda config=config: hf.pool_spec(config, "p", 8, 4),
                         lambda config=config: hf.KVPoolCache(config, cache._rows.pool)):
                with self.assertRaisesRegex(kvpool.InvalidArgument, text):
                    call()
        rwkv = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes, attention_hidden_size=64))
        with self.assertRaisesRegex(kvpool.InvalidArgument, "RwkvForCausalLM hands no keys and values"):
            hf.pool_spec(rwkv, "p", 8, 4)

    def test_an_attach_too_early_is_not_in_the_way_of_the_one_that_follows(self) -> None:
        from kvpool import hf

        with self.cache() as cache, kvpool.connect(self.client.endpoint) as other:
            self.generate(self.prompt(2, 9), cache, max_new_tokens=2)
            pool, length = other.attach(cache._rows.pool.name), cache.get_seq_length()
            early = cache.handle()._replace(length=length)
            with self.assertRaisesRegex(kvpool.Mismatch, f"has 0 tokens, not {length}"):
                hf.KVPoolCache.attach(self.config, pool, early)
            with hf.KVPoolCache.attach(self.config, pool, cache.export(other.session.session_id)) as taken:
                with self.assertRaisesRegex(kvpool.Mismatch, f"has {length} tokens, not 3"):
                    hf.KVPoolCache.attach(self.config, pool, early._replace(length=3))
                self.assertEqual([len(seq) for seq in taken.sequences], [length] * 2)

    def test_a_cache_of_no_rows_is_empty(self) -> None:
        with self.cache() as cache:
            for none in (lambda: cache.batch_select_indices(self.torch.tensor([], dtype=self.torch.int64)),
                         lambda: cache.batch_repeat_interleave(0)):
                self.generate(self.prompt(2, 9), cache, max_new_tokens=2)
                none()
                self.assertEqual((cache.get_seq_length(), cache.sequences), (0, []))

    def test_a_cache_may_be_closed_behind_its_pool(self) -> None:
        cache = self.cache()
        ids = self.prompt(1, 5)
        self.generate(ids, cache, max_new_tokens=2)
        cache._rows.pool.detach()
        with self.assertRaises(kvpool.StaleHandle):
            self.generate(self.prompt(1, 9), cache, max_new_tokens=2)
        cache.close()

    def test_a_closed_cache_is_refused(self) -> None:
        cache = self.cache()
        self.generate(self.prompt(1, 5), cache, max_new_tokens=2)
        cache.close()
        cache.close()
        with self.assertRaisesRegex(kvpool.StaleHandle, "closed"):
            self.generate(self.prompt(1, 5), cache, max_new_tokens=2)

    def worker(self, how: str, endpoint: str, pool: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{HERE}"}
        return subprocess.Popen([sys.executable, str(HERE / "hf_worker.py"), how, self.device, endpoint, pool],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def claim(self, client: kvpool.Client, pool: kvpool.Pool, secret: bytes) -> None:
        """Where nothing proves here that a killed process's GPU work is over, an operator's word does."""
        try:
            client.claim(secret, wait_ms=20_000)
        except kvpool.Busy as error:
            self.assertEqual(self.backend, "cuda")
            print(f"{error}: its quarantine is released by hand", file=sys.stderr)
            subprocess.run([os.path.join(os.environ["KVPOOL_BIN_DIR"], "kvpool"), "-e", client.endpoint, "quarantine",
                            "release", pool.name], check=True, stdout=subprocess.DEVNULL)
            client.claim(secret, wait_ms=20_000)

    def test_another_process_goes_on_with_a_generation(self) -> None:
        from transformers import DynamicCache

        ids = self.prompt(2, 10)
        expected = self.generate(ids, DynamicCache(config=self.config), max_new_tokens=20).sequences
        with self.cache() as cache, self.worker("take", self.client.endpoint, cache._rows.pool.name) as receiver:
            half = self.generate(ids, cache, max_new_tokens=8).sequences
            handle = cache.export(int(receiver.stdout.readline()))
            self.assertEqual(cache.sequences, [])
            output, _ = receiver.communicate(json.dumps([handle, half.tolist(), 12]) + "\n", timeout=120)
        self.assertEqual(json.loads(output), expected.tolist())

    def test_a_killed_process_is_gone_on_for_even_over_a_killed_daemon(self) -> None:
        from transformers import DynamicCache

        from kvpool import hf

        ids, total = self.prompt(1, 21), 30
        expected = self.generate(ids, DynamicCache(config=self.config), max_new_tokens=total).sequences
        with Kept(self.backend) as kept, kvpool.connect(kept.endpoint, connect_ms=20_000) as client:
            for daemon_too in (False, True):
                pool = client.create_pool(self.spec(linger_ms=60_000))
                with self.worker("die", kept.endpoint, pool.name) as worker:
                    worker.stdin.write(json.dumps([ids.tolist(), total]) + "\n")
                    worker.stdin.flush()
                    secret, tokens = bytes.fromhex(json.loads(worker.stdout.readline())), []
                    while len(tokens) < 21 + 11:
                        fields, new = json.loads(worker.stdout.readline())
                        tokens += new
                    worker.kill()
                if daemon_too:
                    kept.kill_daemon()
                self.claim(client, pool, secret)
                handle = hf.Handle(fields[0], tuple(fields[1]), fields[2])
                with hf.KVPoolCache.attach(self.config, pool, handle) as cache:
                    self.assertGreaterEqual(cache.get_seq_length(), len(tokens) - 1)
                    cache.crop(len(tokens) - 1)
                    rest = self.torch.tensor([tokens], device=self.device)
                    got = self.generate(rest, cache, max_new_tokens=21 + total - len(tokens)).sequences
                    self.assertTrue(self.torch.equal(got, expected))
                self.assertEqual((pool.free_pages, client.audit()), (pool.pages, []))
                pool.detach()


if __name__ == "__main__":
    unittest.main()
