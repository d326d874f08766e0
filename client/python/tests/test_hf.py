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
                        if ((layout.get("joined") and kind == "DeepseekV2")  # its K and V have not one shape
                                or (layout and "sliding_window" in hf_models.KINDS[kind])):
                            continue
                        self.model = hf_models.make(kind, self.device, dtype)
                        self.assert_same(ids, self.cache(16, **layout))
        self.model = llama

    def test_a_model_of_mla_keeps_what_it_compresses(self) -> None:
        from kvpool import hf

        model = hf_models.make("DeepseekV3", self.device)
        planes = hf.pool_spec(model, "p", 8, 4).all_planes()
        self.assertEqual([plane[1:4] for plane in planes[:2]], [("ckv", 1, 32), ("kpe", 1, 8)])
        with self.assertRaises(kvpool.InvalidArgument):
            hf.pool_spec(model.config, "p", 8, 4)

    def test_of_a_window_what_DynamicCache_keeps_is_read(self) -> None:
        from transformers import DynamicCache

        llama = self.model
        for kind in ("Gemma2", "Mistral"):
            self.model = hf_models.make(kind, self.device)
            with self.subTest(kind=kind), self.cache() as cache:
                for length in (6, 7, 8, 9, 20):
                    self.assert_same(self.prompt(2, length), self.cache(), max_new_tokens=4)
                self.assert_same(self.prompt(2, 23), self.cache(), prefill_chunk_size=5, max_new_tokens=2)
                self.assert_same(self.prompt(1, 5).repeat(1, 4), self.cache(), scores=False, prompt_lookup_num_tokens=3)
                theirs, ids = DynamicCache(config=self.model.config), self.prompt(2, 9)
                for mine in (theirs, cache):
                    self.generate(ids, mine, max_new_tokens=5)
                self.assertEqual((cache.is_sliding, cache.get_max_length()),
                                 (theirs.is_sliding, theirs.get_max_length()))
                for ours, other in zip(cache.layers, theirs.layers):
                    self.assertEqual(ours.get_mask_sizes(2), other.get_mask_sizes(2))
                    self.assertTrue(self.torch.equal(ours.keys, other.keys))
                    self.assertTrue(self.torch.equal(ours.values, other.values))
        self.model = llama

    def test_the_dtype_is_what_the_model_caches_or_torchs_own(self) -> None:
        from kvpool import hf

        with self.torch.autocast(self.device, self.torch.bfloat16):  # rotary positions make the keys float32
            self.assert_same(self.prompt(2, 9), self.cache(), max_new_tokens=4)
        self.assertEqual(self.spec(dtype=self.torch.float16).dtype, "float16")
        self.assertEqual(hf.pool_spec(self.config, "p", 8, 4).dtype, "float16")

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

    def test_a_deep_copy_is_a_fork_and_both_go_on(self) -> None:
        import copy

        from transformers import DynamicCache

        ids, pages = self.prompt(1, 22), set()
        with self.cache() as prompt, self.torch.no_grad():
            self.model(ids[:, :18], past_key_values=prompt)
            for turn in (1, 2):
                more = self.torch.cat([ids, self.prompt(1, turn)], 1)
                with copy.deepcopy(prompt) as cache:
                    pages |= set(cache.sequences[0].pages[:4])
                    expected = self.generate(more, DynamicCache(config=self.config)).sequences
                    self.assertTrue(self.torch.equal(self.generate(more, cache).sequences, expected))
            self.assertEqual((prompt.get_seq_length(), pages), (18, set(prompt.sequences[0].pages[:4])))

    def test_a_gradient_through_what_was_read_is_refused(self) -> None:
        ids = self.prompt(1, 9)
        with self.cache() as cache:
            self.model(ids[:, :5], past_key_values=cache).logits.sum().backward()
            self.model.zero_grad()
            with self.torch.enable_grad():
                logits = self.model(ids[:, 5:], past_key_values=cache).logits
            with self.torch.no_grad():
                self.assertTrue(self.torch.allclose(logits, self.model(ids).logits[:, 5:], atol=1e-4))
            with self.assertRaisesRegex(kvpool.NotServed, "carry no gradient"):
                logits.sum().backward()
            self.model.zero_grad()

    def test_a_layer_is_not_changed_alone(self) -> None:
        with self.cache() as cache:
            self.assertIsNone(cache.layers[0].keys)
            self.generate(self.prompt(2, 9), cache, max_new_tokens=2)
            for name in ("crop", "reset", "offload", "prefetch", "reorder_cache", "batch_repeat_interleave",
                         "batch_select_indices"):
                with self.assertRaisesRegex(kvpool.NotServed, "together"):
                    getattr(cache.layers[0], name)()

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

    def test_rows_that_are_none_are_refused_and_nothing_changes(self) -> None:
        with self.cache() as cache:
            self.generate(self.prompt(2, 9), cache, max_new_tokens=2)
            for wrong in (lambda: cache.reorder_cache(self.torch.tensor([-1, 0])),
                          lambda: cache.reorder_cache(self.torch.tensor([0, 2])),
                          lambda: cache.batch_repeat_interleave(-1)):
                self.assertRaises(kvpool.InvalidArgument, wrong)
            self.assertEqual([len(seq) for seq in cache.sequences], [10, 10])
            cache.batch_select_indices([-1])
            self.assertEqual(len(cache.sequences), 1)

    def test_crop_goes_back_to_before_a_pass_that_ctrl_c_cut_off(self) -> None:
        from transformers import DynamicCache

        ids = self.prompt(2, 12)
        expected = self.generate(ids, DynamicCache(config=self.config), max_new_tokens=4).sequences
        with self.cache() as cache, self.torch.no_grad():
            self.model(ids[:, :9], past_key_values=cache)
            append = cache._rows._append
            with (unittest.mock.patch.object(cache._rows, "_append", side_effect=[append, KeyboardInterrupt]),
                  self.assertRaises(KeyboardInterrupt)):
                self.model(ids[:, 9:], past_key_values=cache)
            with self.assertRaisesRegex(kvpool.Mismatch, r"crop\(0\) goes back"):
                cache.batch_repeat_interleave(2)
            cache.crop(0)
            self.assertEqual((cache.get_seq_length(), [len(seq) for seq in cache.sequences]), (9, [9, 9]))
            with (unittest.mock.patch.object(cache._rows.pool, "advance", side_effect=KeyboardInterrupt),
                  self.assertRaises(KeyboardInterrupt)):
                cache.crop(-1)
            cache.crop(-2)
            self.assertEqual([len(seq) for seq in cache.sequences], [7, 7])
            self.assertTrue(self.torch.equal(self.generate(ids, cache, max_new_tokens=4).sequences, expected))

    def test_a_cache_that_is_let_go_gives_its_pages_to_the_next(self) -> None:
        from kvpool import hf

        pool, ids = self.client.create_pool(self.spec(pages=8, linger_ms=60_000)), self.prompt(1, 21)
        self.made.append(pool.name)
        kept = hf.KVPoolCache(self.config, pool)
        self.generate(ids[:, :3], kept, max_new_tokens=2)
        for _ in range(3):
            self.generate(ids, hf.KVPoolCache(self.config, pool), max_new_tokens=4)
        cache = hf.KVPoolCache(self.config, pool, durable=True)
        self.generate(ids, cache, max_new_tokens=1)
        handle = cache.handle()
        del cache  # what is durable is for whoever has its handle
        with hf.KVPoolCache.attach(self.config, pool, handle) as cache:
            self.assertEqual((len(cache.sequences[0]), len(kept.sequences[0]), pool.free_pages), (21, 4, 1))
        kept.close()
        self.assertEqual(pool.free_pages, 8)

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
            self.generate(self.prompt(2, 20), cache)
        self.assert_same(self.prompt(3, 5), cache, max_new_tokens=2)
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

    def test_a_durable_cache_is_refused_where_nothing_waits_for_a_claim(self) -> None:
        from kvpool import hf

        with self.cache() as cache, self.assertRaisesRegex(kvpool.InvalidArgument, "linger_ms 0"):
            hf.KVPoolCache(self.config, cache._rows.pool, durable=True)

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
                             (transformers.BambaConfig(**sizes), "of linear_attention; only full, sliding"),
                             (transformers.RecurrentGemmaConfig(**sizes), "of recurrent; only full, sliding"),
                             (transformers.MllamaConfig().text_config, "of cross_attention; only full, sliding"),
                             (transformers.MambaConfig(**sizes), "of linear_attention; only full, sliding")):
            for call in (lambda config=config: hf.pool_spec(config, "p", 8, 4),
                         lambda config=config: hf.KVPoolCache(config, cache._rows.pool)):
                with self.assertRaisesRegex(kvpool.InvalidArgument, text):
                    call()
        vit = transformers.ViTModel(transformers.ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
                                                           intermediate_size=64))
        with self.assertRaisesRegex(kvpool.InvalidArgument, "ViTModel takes no tokens"):
            hf.pool_spec(vit, "p", 8, 4)
        rwkv = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes, attention_hidden_size=64))
        with self.assertRaisesRegex(kvpool.InvalidArgument, "RwkvForCausalLM hands no keys and values"):
            hf.pool_spec(rwkv, "p", 8, 4)

    def test_an_attach_too_early_is_not_in_the_way_of_the_one_that_follows(self) -> None:
        from kvpool import hf

        with self.cache() as cache, kvpool.connect(self.client.endpoint) as other:
            self.generate(self.prompt(2, 9), cache, max_new_tokens=2)
            pool, length = other.attach(cache._rows.pool.name), cache.get_seq_length()
            early = cache.handle()._replace(length=length)
            for handle in (early, early._replace(length=None)):
                with self.assertRaisesRegex(kvpool.NotFound, f"no sequence of key {handle.keys[0]} "):
                    hf.KVPoolCache.attach(self.config, pool, handle)
            self.assertEqual(list(pool.sequences()), [])
            handle = cache.export(other.session.session_id)
            with self.assertRaisesRegex(kvpool.Mismatch, f"has {length} tokens, not 3"):
                hf.KVPoolCache.attach(self.config, pool, early._replace(length=3))
            with hf.KVPoolCache.attach(self.config, pool, handle) as taken:
                self.assertEqual([len(seq) for seq in taken.sequences], [length] * 2)

    def test_two_caches_do_not_write_the_same_sequences(self) -> None:
        from kvpool import hf

        with self.cache() as cache:
            pool = cache._rows.pool
            with self.assertRaisesRegex(kvpool.InvalidArgument, "nothing to hand over"):
                cache.export(self.client.session.session_id)
            self.generate(self.prompt(2, 9), cache, max_new_tokens=2)
            handle = cache.handle()
            for wrong in ((), handle.keys * 2):
                with self.assertRaisesRegex(kvpool.InvalidArgument, "a key a sequence"):
                    hf.KVPoolCache.attach(self.config, pool, handle._replace(keys=wrong))
            with self.assertRaisesRegex(kvpool.Busy, "another KVPoolCache"):
                hf.KVPoolCache.attach(self.config, pool, handle)
            handle = cache.export(self.client.session.session_id)
            with hf.KVPoolCache.attach(self.config, pool, handle) as taken:
                self.assertEqual([len(seq) for seq in taken.sequences], [10, 10])

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
