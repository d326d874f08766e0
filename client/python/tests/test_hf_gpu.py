"""What test_hf.py shows on the host, on a GPU: in bfloat16, too. And the examples with a model."""
from __future__ import annotations

import unittest

import test_hf
import test_package
from support import HAS_HF, has_gpu


@unittest.skipUnless(HAS_HF and has_gpu(), "torch, transformers and a GPU are not here")
class Cuda(test_hf.Host):
    backend = device = "cuda"
    dtypes = ("float32", "bfloat16")

    def test_the_examples_with_a_model_run(self) -> None:
        test_package.Examples.test_the_examples_with_a_model_run(self)

    test_a_pool_of_another_model_is_refused = None


if __name__ == "__main__":
    unittest.main()
