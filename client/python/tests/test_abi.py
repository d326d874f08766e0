"""The declarations of kvpool._abi against the headers and the library."""
from __future__ import annotations

import ctypes
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

from kvpool import Status, _abi, errors

ROOT = pathlib.Path(os.environ.get("KVPOOL_SOURCE_DIR", pathlib.Path(__file__).resolve().parents[3]))
FOLDERS = [ROOT / "client/include", ROOT / "proto", ROOT / "kernels"]
COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
ENUMS = {
    "KVP_BATCH_MAX": _abi.BATCH_MAX, "KVP_PLANES_MAX": _abi.PLANES_MAX, "KVP_PAGES_MAX": _abi.PAGES_MAX,
    "KVP_PAGE_TOKENS_MAX": _abi.PAGE_TOKENS_MAX, "KVP_SEQUENCE_TOKENS_MAX": _abi.SEQUENCE_TOKENS_MAX,
    "KVP_INDEX_BATCH_MAX": _abi.INDEX_BATCH_MAX, "KVP_TIMELINES_MAX": _abi.TIMELINES_MAX,
    "KVP_REGION_EXCLUSIVE": _abi.REGION_EXCLUSIVE, "KVP_REGION_KEEP": _abi.REGION_KEEP,
    "KVP_TORCH_PRESERVE": _abi.TORCH_PRESERVE,
    "KVP_DLPACK_DIMS_MAX": _abi.DLPACK_DIMS_MAX, "KVP_DURABLE": _abi.DURABLE, "KVP_TRUNCATE": _abi.TRUNCATE,
    "KVP_ADDRESS_CSR": _abi.ADDRESS_CSR, "KVP_ADDRESS_SLOTS": _abi.ADDRESS_SLOTS,
    "KVP_ADDRESS_TABLE": _abi.ADDRESS_TABLE, "KVP_INDEX_ROWS": _abi.INDEX_ROWS,
    "KVP_INDEX_CSR": _abi.INDEX_CSR, "KVP_INDEX_TABLE": _abi.INDEX_TABLE,
    "KVP_DTYPE_F32": _abi.DTYPE_CODES["float32"], "KVP_DTYPE_F16": _abi.DTYPE_CODES["float16"],
    "KVP_DTYPE_BF16": _abi.DTYPE_CODES["bfloat16"], "KVP_DTYPE_FP8_E4M3": _abi.DTYPE_CODES["float8_e4m3fn"],
    "KVP_DTYPE_FP8_E5M2": _abi.DTYPE_CODES["float8_e5m2"], "KVP_DTYPE_U8": _abi.DTYPE_CODES["uint8"],
    "KVP_COMPONENT_K": _abi.COMPONENT_CODES["k"], "KVP_COMPONENT_V": _abi.COMPONENT_CODES["v"],
    "KVP_COMPONENT_CKV": _abi.COMPONENT_CODES["ckv"], "KVP_COMPONENT_KPE": _abi.COMPONENT_CODES["kpe"],
    "KVP_ORDER_NHD": 1, "KVP_ORDER_HND": 2, "KVP_PLACEMENT_LAYER": 1, "KVP_PLACEMENT_PAGE": 2,
    "KVP_SEQ_OPEN": 1, "KVP_SEQ_RETIRING": 2, "KVP_SEQ_QUARANTINED": 3, "KVP_SEQ_LINGERING": 4, "KVP_SEQ_BUSY": 5,
    "KVP_BAD_PAGE": 1, "KVP_BAD_POSITION": 2, "KVP_BAD_BATCH": 3, "KVP_BAD_SLOT": 4, "KVP_BAD_VERSION": 5,
    "KVP_BAD_CAPACITY": 6, "KVP_PINS_MAX": _abi.PINS_MAX, "KVP_TENANTS_MAX": _abi.TENANTS_MAX,
    "KVP_BLOCK_KEY_BYTES_MIN": _abi.BLOCK_KEY_BYTES_MIN, "KVP_BLOCK_KEY_BYTES_MAX": _abi.BLOCK_KEY_BYTES_MAX,
    "KVP_BLOCK_EXTRA_BYTES_MAX": _abi.BLOCK_EXTRA_BYTES_MAX, "KVP_ZERO_ON": _abi.ZERO_ON, "KVP_ZERO_OFF": _abi.ZERO_OFF,
    "KVP_POLICY_ADAPTIVE": 0, "KVP_POLICY_LRU": 1, "KVP_BLOCK_HASH_KEYED": 0, "KVP_BLOCK_HASH_XXH3": 1,
}


def c_values() -> dict[str, int]:
    """Every size, offset, constant and status of the headers, printed by a C program."""
    lines = []
    for name, struct in _abi.STRUCTS.items():
        lines.append(f'printf("%s %zu\\n", "sizeof {name}", sizeof(struct {name}));')
        for field in struct._fields_:
            lines.append(f'printf("%s %zu\\n", "{name}.{field[0]}", offsetof(struct {name}, {field[0]}));')
    lines += [f'printf("%s %lld\\n", "{name}", (long long){name});' for name in ENUMS]
    lines += [f'printf("%s %zu\\n", "ring.{name}", offsetof(struct kvp_error_ring, {name}));'
              for name in ("count", "capacity", "records")]
    lines.append('#define X(name, value, grpc, text) printf("status.%s %d\\n", #name, value);')
    source = "#include <stdio.h>\n#include <kvpool.h>\nint main(void)\n{\n" + "\n".join(lines) + (
        "\nKVP_STATUS_TABLE(X)\nreturn 0;\n}\n")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "abi.c"
        path.write_text(source)
        program = str(path.with_suffix(""))
        subprocess.run([COMPILER, "-o", program, str(path), *[f"-I{place}" for place in FOLDERS]], check=True)
        output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {line.rpartition(" ")[0]: int(line.rpartition(" ")[2]) for line in output.splitlines()}


@unittest.skipUnless(COMPILER, "there is no C compiler")
@unittest.skipUnless((FOLDERS[0] / "kvpool.h").exists(), "the headers are not here")
class Headers(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.c = c_values()

    def test_every_struct_has_the_size_and_offsets_of_the_header(self) -> None:
        for name, struct in _abi.STRUCTS.items():
            self.assertEqual(ctypes.sizeof(struct), self.c[f"sizeof {name}"], name)
            for field in struct._fields_:
                self.assertEqual(getattr(struct, field[0]).offset, self.c[f"{name}.{field[0]}"], f"{name}.{field[0]}")

    def test_the_error_ring_has_the_offsets_of_the_header(self) -> None:
        for name in ("count", "capacity", "records"):
            self.assertEqual(getattr(_abi.ErrorRing, name).offset, self.c[f"ring.{name}"])

    def test_every_constant_has_the_value_of_the_header(self) -> None:
        for name, value in ENUMS.items():
            self.assertEqual(value, self.c[name], name)

    def test_every_status_is_in_the_enum_and_has_a_class(self) -> None:
        statuses = {name[len("status.KVP_"):]: value for name, value in self.c.items() if name.startswith("status.")}
        self.assertEqual({status.name: status.value for status in Status}, statuses)
        for name, value in statuses.items():
            if value:
                self.assertEqual(errors._CLASSES[value].status, value, name)

    def test_every_function_takes_as_many_arguments_as_the_header_says(self) -> None:
        text = "".join((FOLDERS[i] / name).read_text() for i, name in ((0, "kvpool.h"), (2, "kvp_kernels.h")))
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        for name, (_, arguments) in (_abi.FUNCTIONS | _abi.CUDA_FUNCTIONS).items():
            found = re.search(rf"\b{name}\(([^;]*)\);", text)
            self.assertIsNotNone(found, f"{name} is not in the headers")
            declared = found[1].strip()
            self.assertEqual(len(arguments), 0 if declared == "void" else declared.count(",") + 1, name)


class Library(unittest.TestCase):
    def test_every_function_is_exported_by_the_library(self) -> None:
        library = _abi.library()
        for name in _abi.FUNCTIONS:
            self.assertTrue(hasattr(library, name), name)

    def test_the_package_has_the_version_of_the_library(self) -> None:
        import kvpool

        self.assertEqual(_abi.library().kvp_version().decode(), kvpool.__version__)


if __name__ == "__main__":
    unittest.main()
