"""Every command of kvpool, with right and with wrong input, against a daemon of its own."""
import contextlib
import ctypes
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import unittest

import cli_house

SMALL = ["--pages", "32", "--layers", "2", "--kv-heads", "2", "--head-dim", "16"]
TOKEN_BYTES = 2 * 2 * 2 * 16 * 2  # layers, K and V, heads, dim, fp16


class ConnectOptions(ctypes.Structure):
    """struct kvp_connect_options"""
    _fields_ = [("connect_ms", ctypes.c_uint32), ("reconnect_ms", ctypes.c_uint32), ("call_ms", ctypes.c_uint32),
                ("session", ctypes.c_char_p)]


@contextlib.contextmanager
def attached(case, pool, token=None):
    """The library and its kvp_pool, with the slab mapped."""
    path = pathlib.Path(os.environ["KVPOOL_BIN_DIR"]).parent / "lib" / "libkvpool.so.0"
    if any(name in path.read_bytes() for name in (b"__asan_init", b"__tsan_init")):
        case.skipTest("a library with a sanitizer does not load into Python")
    library = ctypes.CDLL(str(path))
    client, mapped = ctypes.c_void_p(), ctypes.c_void_p()
    options = ConnectOptions(session=token.encode() if token else None)
    endpoint = str(case.daemon.session_socket).encode()
    case.assertEqual(library.kvp_connect(endpoint, ctypes.byref(options), ctypes.byref(client)), 0)
    case.assertEqual(library.kvp_attach(client, pool.encode(), None, ctypes.byref(mapped)), 0)
    try:
        yield library, mapped
    finally:
        library.kvp_disconnect(client)


class Program(cli_house.Case):
    def test_help_lists_every_command_but_hidden_ones(self):
        text = self.run_cli("--help").stdout
        for command in ("status", "audit", "pool create", "pool list", "pool show", "pool delete", "region delete",
                        "session open", "session close", "seq open", "seq advance", "seq append", "seq fork",
                        "seq close", "seq list", "seq show", "seqlens", "page-table", "cache show", "cache match",
                        "cache pin", "cache unpin", "cache evict", "cache list", "quarantine release", "demo"):
            self.assertIn(f"  {command} ", text)
        self.assertNotIn("demo-worker", text)

    def test_every_command_says_its_options_and_its_json_keys(self):
        text = self.run_cli("pool", "create", "--help").stdout
        for word in ("--pages=N", "--page-tokens=N", "--mla=CKV,KPE", "With --json:", "--endpoint=PATH"):
            self.assertIn(word, text)

    def test_version_is_told(self):
        self.assertRegex(self.run_cli("--version").stdout, r"^kvpool \d+\.\d+\.\d+\n$")

    def test_wrong_usage_exits_2_and_says_what_is_wrong(self):
        self.misused(text="a command is wanted")
        self.misused("fly", text="`fly' is no command")
        self.misused("pool", "paint", text="`pool paint' is no command")
        self.misused("--color", "status", text="--color")
        self.misused("status", "extra", text="extra")
        self.misused("status", "--pages", "3", text="--pages")
        self.misused("pool", "show", text="NAME")

    def test_a_group_without_a_command_lists_its_commands(self):
        done = self.misused("pool", text="`pool' is no command")
        for command in ("create NAME", "list", "show NAME", "delete NAME"):
            self.assertIn(f"  pool {command} ", done.stderr)
        self.assertNotIn("  seq ", done.stderr)
        self.misused("session", "shut", text="  session close ")
        self.assertIn("  seq fork ", self.run_cli("seq", "--help").stdout)
        self.assertNotIn("Commands:", self.misused("fly", "--help", text="no command").stderr)
        self.assertNotIn("Commands:", self.misused("poo", text="no command").stderr)

    def test_without_a_daemon_it_says_how_to_start_one(self):
        nowhere = self.daemon.folder / "nowhere.sock"
        done = self.fails("KVP_EDISCONNECTED", "status", endpoint=nowhere, text="connecting: no connection")
        self.assertIn("systemctl start kvpoold", done.stderr)
        self.fails("KVP_EDISCONNECTED", "demo", endpoint=nowhere)
        self.fails("KVP_EINVAL", "-e", "/" + 200 * "x", "status")

    @unittest.skipUnless(os.getuid() == 0, "needs a second user")
    def test_who_may_not_connect_learns_which_group_may(self):
        run = self.daemon.runtime_dir
        for folder in (run.parent, run):
            folder.chmod(0o711)
        other = {"user": "nobody", "group": "nogroup", "extra_groups": [], "capture_output": True, "text": True}
        try:
            done = subprocess.run([self.program(), "status"], env=self.environment(), **other)
        except PermissionError:
            self.skipTest("the second user does not reach the programs")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("Permission denied (KVP_EPERM)\n", done.stderr)
        self.assertIn("usermod -aG kvpool", done.stderr)
        daemon = self.program() + "d"
        done = subprocess.run([daemon, "--runtime-dir", run], **other)
        nobody = pwd.getpwnam("nobody").pw_uid
        self.assertIn(f"kvpool.lock: Permission denied: the folder must be of user {nobody}", done.stderr)

    def test_wait_gives_up_after_its_time(self):
        nowhere = self.daemon.folder / "nowhere.sock"
        self.fails("KVP_EDISCONNECTED", "--wait", "1", "status", endpoint=nowhere)
        self.misused("--wait", "soon", "status", text="--wait is `soon'")

    def test_options_of_the_program_stand_before_or_behind_the_command(self):
        socket = str(self.daemon.session_socket)
        nowhere = self.daemon.folder / "nowhere.sock"
        self.run_cli("-e", socket, "status", endpoint=nowhere)
        self.run_cli("status", "-e", socket, endpoint=nowhere)
        self.assertIn("pools", self.json_of("pool", "list"))


class Status(cli_house.Case):
    def test_what_can_not_be_printed_fails(self):
        daemon = os.path.join(os.environ["KVPOOL_BIN_DIR"], "kvpoold")
        for command in ([self.program(), "status"], [self.program(), "--json", "status"], [self.program(), "--help"],
                        [self.program(), "pool", "create", "--help"], [daemon, "--print-config"],
                        [daemon, "--check-config"]):
            with open("/dev/full", "w") as full:
                done = subprocess.run(command, env=self.environment(), stdout=full, stderr=subprocess.PIPE, text=True)
            self.assertEqual(done.returncode, 1, command)
            self.assertIn("No space left on device", done.stderr)

    def test_output_goes_nowhere_else_when_there_is_no_standard_output(self):
        for words in (["status"], ["--json", "status"]):  # where the session's socket would be
            done = subprocess.run(["sh", "-c", 'exec "$0" "$@" <&- >&-', self.program(), *words],
                                  env=self.environment(), stderr=subprocess.PIPE, text=True)
            self.assertEqual(done.returncode, 1)
            self.assertIn("can not be written", done.stderr)

    def test_log_lines_have_a_level_for_the_journal_and_a_time_for_all_others(self):
        ours, theirs = os.pipe()
        here = os.fstat(theirs)
        lines = []
        for stream in (f"{here.st_dev}:{here.st_ino}", f"{here.st_dev}:{here.st_ino + 1}"):
            for program, wrong in (("kvpoold", ["--set", "nothing"]), ("kvpool-keeper", ["/nowhere/at/all"])):
                subprocess.run([os.path.join(os.environ["KVPOOL_BIN_DIR"], program), *wrong], stderr=theirs,
                               env=dict(os.environ, JOURNAL_STREAM=stream))
        os.close(theirs)
        with open(ours) as log:
            lines = log.read().splitlines()
        self.assertEqual(lines[0], "<3>nothing: must be section.key=value")
        self.assertEqual(lines[1], "<3>kvpool-keeper: /nowhere/at/all: No such file or directory")
        self.assertRegex(lines[2], r"^<4>kvpool-keeper: the daemon \(pid \d+\) exited with 127 and never served$")
        for line, text in zip(lines[3:], lines[:3], strict=True):
            self.assertRegex(line, r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d\d\dZ (error|warning): " )
            self.assertEqual(line.split(": ", 1)[1].split("(pid")[0], text[3:].split("(pid")[0])

    def test_the_keeper_outlives_who_reads_its_log(self):
        folder = self.daemon.folder / "unread"
        folder.mkdir()
        ours, theirs = os.pipe()
        keeper = subprocess.Popen([self.program() + "-keeper", self.program() + "d", "--runtime-dir", folder, "--backend",
                                   "host"], stderr=theirs)
        os.close(theirs)
        endpoint = folder / "kvpool.sock"
        self.run_cli("--wait", "60", "pool", "create", "p", *SMALL, endpoint=endpoint)
        os.close(ours)
        daemon = pathlib.Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()[0]
        os.kill(int(daemon), signal.SIGKILL)  # which the keeper would say
        self.assertEqual(self.json_of("--wait", "60", "status", endpoint=endpoint)["epoch"], 2)
        keeper.terminate()
        self.assertEqual(keeper.wait(), 0)
        shutil.rmtree(folder)

    def test_a_daemon_without_standard_files_serves_and_ends_as_any_other(self):
        programs = pathlib.Path(os.environ["KVPOOL_BIN_DIR"])
        folder = self.daemon.folder / "bare"
        folder.mkdir()
        for command, keeper in (([programs / "kvpoold"], 0), ([programs / "kvpool-keeper", programs / "kvpoold"], 1)):
            process = subprocess.Popen(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *command, "--runtime-dir", folder,
                                        "--backend", "host"])
            self.run_cli("--wait", "60", "pool", "create", "p", *SMALL, endpoint=folder / "kvpool.sock")
            standard = {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in range(3)}
            process.terminate()
            self.assertEqual((process.wait(), standard), (0, {"/dev/null"}))
            for left in folder.glob("*.sock"):
                self.assertTrue(keeper, left)
                left.unlink()
        folder.rmdir()

    def test_a_name_from_another_can_not_forge_lines_or_move_the_cursor(self):
        token = self.run_cli("session", "open", "--name", "a\nsessions: 99\x1b[2J\x7f\u009b2J").stdout.strip()
        self.run_cli("pool", "create", "named", *SMALL, "--model", "m\x1b[2J\nlost")
        shown = self.run_cli("status").stdout + self.run_cli("pool", "show", "named").stdout
        self.assertIn(", name a?sessions: 99?[2J???2J\n", shown)
        self.assertIn("m?[2J?lost\n", shown)
        self.assertEqual(self.json_of("pool", "show", "named")["model"], "m\x1b[2J\nlost")
        self.run_cli("pool", "delete", "named")
        self.run_cli("session", "close", token)

    def test_status_has_its_documented_keys(self):
        status = self.json_of("status")
        self.assertEqual(set(status), {"version", "keeper", "backend", "instance", "epoch", "uptime_ms", "calls", "calls_failed",
                                       "audits", "last_audit_unix_ms", "last_audit_ms", "last_audit_violations",
                                       "adoptions", "last_pause_us", "last_pause_unix_ms", "pools",
                                       "sessions", "executors"})
        self.assertEqual((status["backend"], status["epoch"], len(status["instance"])), ("host", 1, 32))
        self.assertIn("host backend", self.run_cli("status").stdout)

    def test_audit_with_digests_compares_the_pages_of_pools_that_keep_them(self):
        self.assertTrue(self.json_of("pool", "create", "kept", *SMALL, "--page-digests")["page_digests"])
        self.assertFalse(self.json_of("pool", "create", "plain", *SMALL)["page_digests"])
        token = self.run_cli("session", "open").stdout.strip()
        for pool in ("kept", "plain"):
            seq = self.run_cli("--session", token, "seq", "open", pool, "1").stdout.strip()
            self.run_cli("--session", token, "seq", "append", pool, seq, "--tokens", "40")
        audit = self.json_of("audit", "--digests")
        while audit["pages_without_digest"] != 0:  # they are taken behind the calls
            audit = self.json_of("audit", "--digests")
        self.assertEqual(audit, {"clean": True, "count": 0, "violations": [], "pages_checked": 2,
                                 "pages_without_digest": 0, "pages_damaged": 0, "damaged": []})
        self.assertEqual(self.run_cli("audit", "--digests").stdout,
                         "the ledger is clean\n2 sealed pages compared, 0 damaged, 0 without a digest yet\n")
        self.run_cli("session", "close", token)

    def test_audit_of_a_clean_ledger_exits_0(self):
        self.assertEqual(self.run_cli("audit").stdout, "the ledger is clean\n")
        self.assert_clean()


class Pools(cli_house.Case):
    def test_a_pool_is_made_shown_listed_and_deleted(self):
        made = self.json_of("pool", "create", "a", *SMALL, "--page-tokens", "4", "--order", "hnd", "--reserved-pages", "2",
                            "--max-sequences", "8", "--max-tokens", "64", "--model", "tiny")
        expected = {"name": "a", "model": "tiny", "backend": "host", "state": "live", "pages": 32, "page_tokens": 4,
                    "free_pages": 30, "reserved_pages": 2, "order": "hnd", "placement": "layer", "joined": False,
                    "page_bytes": 4 * TOKEN_BYTES, "max_sequences": 8, "max_sequence_tokens": 64, "sequences": 0}
        self.assertEqual({key: made[key] for key in expected}, expected)
        self.assertEqual(made["planes"][1]["component"], "v")
        self.assertEqual(self.json_of("pool", "show", "a"), made)
        self.assertEqual(self.json_of("pool", "create", "a", *SMALL, "--page-tokens", "4", "--order", "hnd",
                                      "--reserved-pages", "2", "--max-sequences", "8", "--max-tokens", "64", "--model",
                                      "tiny"), made)
        self.assertIn("a", self.json_of("pool", "list")["pools"])
        self.assertIn("pool        a (host, live)", self.run_cli("pool", "show", "a").stdout)
        self.assertEqual(self.json_of("pool", "delete", "a"), {"deleted": "a"})
        self.assertNotIn("a", self.json_of("pool", "list")["pools"])

    def test_regions_are_shown_and_given_up(self):
        pool = ("--region-bytes", "65536")
        self.assertEqual(self.json_of("pool", "create", "r", *SMALL, *pool)["regions"], [])
        self.addCleanup(self.run_cli, "pool", "delete", "r")
        with attached(self, "r") as (library, attached_pool):
            room = (ctypes.c_uint64 * 4)()  # struct kvp_region
            self.assertEqual(library.kvp_region_map(attached_pool, 0, b"kv/0", ctypes.c_uint64(5000), 0, room), 0)
            shown = self.json_of("pool", "show", "r")
            region = {"name": "kv/0", "rank": 0, "offset": shown["slab_bytes"] - 65536, "bytes": 5000,
                      "tenant": os.getuid(), "mapped": 1}
            self.assertEqual((shown["region_bytes"], shown["regions"]), (65536, [region]))
            self.fails("KVP_EBUSY", "region", "delete", "r", "kv/0", text="is mapped by session")
            self.assertEqual(library.kvp_detach(attached_pool), 0)
        self.assertRegex(self.run_cli("pool", "show", "r").stdout,
                         r"(?m)^region      kv/0: 4.9 KiB at \d+ of slab 0, of user \d+, mapped by 0$")
        self.fails("KVP_EBUSY", "pool", "delete", "r", text="1 regions")
        self.fails("KVP_ENOENT", "region", "delete", "r", "kv/1", text="pool r has no kv/1 in slab 0")
        self.fails("KVP_ENOENT", "region", "delete", "nowhere", "kv/0")
        self.fails("KVP_ENOENT", "region", "delete", "r", "kv/0", "--rank", "1", text="in slab 1")
        self.misused("region", "delete", "r", text="POOL NAME")
        self.misused("region", "delete", "r", "kv/0", "--rank", "16", text="--rank")
        self.assertEqual(self.json_of("region", "delete", "r", "kv/0"), {"deleted": "kv/0"})
        self.assertEqual(self.json_of("pool", "show", "r")["regions"], [])
        self.assert_clean()

    def test_mla_and_joined_pools_have_their_planes(self):
        mla = self.json_of("pool", "create", "mla", "--pages", "4", "--layers", "3", "--mla", "512,64", "--dtype", "bf16",
                           "--joined")
        self.assertEqual([(p["component"], p["heads"], p["dim"], p["dtype"]) for p in mla["planes"][:2]],
                         [("ckv", 1, 512, "bf16"), ("kpe", 1, 64, "bf16")])
        self.assertEqual(mla["planes"][0]["token_stride"], 576 * 2)
        page = self.json_of("pool", "create", "page", *SMALL, "--placement", "page")
        self.assertEqual(page["placement"], "page")
        for name in ("mla", "page"):
            self.run_cli("pool", "delete", name)

    def test_what_is_wrong_with_a_spec_is_named(self):
        self.misused("pool", "create", "x", text="--pages is wanted")
        self.misused("pool", "create", "x", "--pages", "many", text="--pages is `many'")
        self.misused("pool", "create", "x", "--pages", "0", text="--pages")
        self.misused("pool", "create", "x", *SMALL, "--dtype", "int4", text="none of fp32, fp16")
        self.misused("pool", "create", "x", *SMALL, "--order", "dhn", text="none of nhd, hnd")
        self.misused("pool", "create", "x", "--pages", "4", "--mla", "512", text="two widths")
        self.misused("pool", "create", "x", "--pages", "4", "--mla", "512,64", "--kv-heads", "1", text="--kv-heads")
        self.misused("pool", "create", "x", "--pages", "4", "--mla", "512,64", "--head-dim", "64", text="--head-dim")
        self.fails("KVP_EINVAL", "pool", "create", "", *SMALL)
        self.fails("KVP_EINVAL", "pool", "create", "x" * 64, *SMALL)
        self.fails("KVP_EINVAL", "pool", "create", "x", *SMALL, "--reserved-pages", "32")
        self.assertEqual(self.json_of("pool", "list"), {"pools": []})

    def test_another_shape_under_a_taken_name_is_refused(self):
        self.run_cli("pool", "create", "taken", *SMALL)
        self.fails("KVP_EEXIST", "pool", "create", "taken", *SMALL, "--page-tokens", "8")
        self.run_cli("pool", "delete", "taken")

    def test_what_is_not_there_can_not_be_shown_or_deleted(self):
        self.fails("KVP_ENOENT", "pool", "show", "nothing")
        self.fails("KVP_ENOENT", "pool", "delete", "nothing")


class Sessions(cli_house.Case):
    def test_a_session_lives_from_command_to_command_and_ends_by_close(self):
        opened = self.json_of("session", "open", "--name", "tests", "--lease-ms", "60000")
        self.assertEqual(set(opened), {"session", "session_id", "lease_ms", "resume_secret"})
        self.assertEqual(opened["lease_ms"], 60000)
        known = {s["session_id"]: s for s in self.json_of("status")["sessions"]}
        self.assertEqual(known[opened["session_id"]]["name"], "tests")
        self.assertTrue(known[opened["session_id"]]["lease"])
        self.assertIn("by lease, name tests\n", self.run_cli("status").stdout)
        self.run_cli("pool", "create", "kept", *SMALL)
        self.run_cli("--session", opened["session"], "seq", "open", "kept", "1")
        self.run_cli("session", "close", opened["session"])
        self.fails("KVP_ESESSION", "--session", opened["session"], "seq", "open", "kept", "1",
                   text="export KVPOOL_SESSION=$(kvpool session open)")
        self.fails("KVP_ESESSION", "session", "close", opened["session"])
        self.run_cli("pool", "delete", "kept")

    def test_a_token_that_ended_stops_only_what_works_in_its_session(self):
        over = self.run_cli("session", "open").stdout.strip()
        self.run_cli("session", "close", session=over)
        for words in (("status",), ("audit",), ("pool", "create", "a", *SMALL), ("pool", "list"), ("pool", "show", "a"),
                      ("quarantine", "release", "a")):
            self.run_cli(*words, session=over)
            self.run_cli("--session", over, *words)
        for words in (("seq", "open", "a", "1"), ("seq", "list", "a"), ("seqlens", "a", "0.1"), ("session", "close")):
            self.fails("KVP_ESESSION", *words, session=over)
        again = self.run_cli("session", "open", session=over).stdout.strip()
        self.run_cli("session", "close", again, session=over)
        self.run_cli("pool", "delete", "a", session=over)

    def test_an_empty_token_is_none(self):
        self.run_cli("pool", "create", "a", *SMALL)
        for words in (("open", "a", "4"), ("advance", "a", "0.1", "4"), ("append", "a", "0.1"),
                      ("fork", "a", "0.1", "2"), ("close", "a", "0.1")):
            for more in ({"session": ""}, {}):
                self.misused("seq", *words, text="export KVPOOL_SESSION=$(kvpool session open)", **more)
        self.misused("--session", "", "seq", "open", "a", "4", text="a session is wanted")
        self.misused("session", "close", session="", text="a token is wanted")
        self.misused("session", "close", "", text="a token is wanted")
        self.assertEqual(self.json_of("seq", "list", "a", session=""), {"sequences": []})
        self.run_cli("pool", "delete", "a")

    def test_wrong_tokens_and_secrets_are_refused(self):
        self.misused("session", "close", text="a token is wanted")
        self.fails("KVP_ESESSION", "seq", "list", "p", session="00000000000000000000000000000000")
        self.misused("session", "open", "--resume", "xyz", text="--resume")
        self.misused("session", "open", "--resume", "", text="--resume is no secret")  # of a variable that is not set
        self.fails("KVP_ENOENT", "session", "open", "--resume", 32 * "0")
        self.misused("session", "open", "--lease-ms", "-1", text="--lease-ms")
        for wrong in ("1", "99", "86400001", "-1", ""):
            self.misused("session", "open", "--lease-ms", wrong,
                         text=f"--lease-ms is `{wrong}': 0 (the daemon's default) or 100..86400000 is wanted")
        opened = self.json_of("session", "open", "--lease-ms", "0")
        self.assertEqual(opened["lease_ms"], cli_house.LEASE_MS)
        self.run_cli("session", "close", opened["session"])


class Sequences(cli_house.Case):
    def setUp(self):
        self.run_cli("pool", "create", "p", *SMALL, "--page-tokens", "4")
        self.session = self.run_cli("session", "open").stdout.strip()

    def tearDown(self):
        listed = [s["seq"] for s in self.json_of("seq", "list", "p", session=self.session)["sequences"]]
        if listed:
            self.run_cli("seq", "close", "p", *listed, session=self.session)
        self.assertEqual(self.json_of("pool", "show", "p")["free_pages"], 32)
        self.run_cli("session", "close", session=self.session)
        self.assert_clean()

    def open(self, *keys):
        return self.json_of("seq", "open", "p", *keys, session=self.session)["seqs"]

    def test_a_sequence_is_opened_advanced_filled_read_and_closed(self):
        one, two = self.open("11", "12")
        self.assertEqual(self.open("12"), [two])
        self.assertEqual(self.json_of("seq", "advance", "p", one, "10", session=self.session),
                         {"seq": one, "reserved": 10, "copies": []})
        self.assertEqual(self.json_of("seq", "append", "p", one, "--tokens", "6", session=self.session),
                         {"seq": one, "written": 6})
        self.assertEqual(self.json_of("seq", "append", "p", one, "--at", "6", session=self.session)["written"], 7)
        shown = self.json_of("seq", "show", "p", one)
        self.assertEqual((shown["key"], shown["written"], shown["reserved"], shown["state"], len(shown["pages"])),
                         ("11", 7, 10, "open", 3))
        self.assertEqual(self.json_of("seqlens", "p", one, two), {"lengths": [7, 0]})
        self.assertEqual(self.json_of("page-table", "p", one, two),
                         {"kv_indptr": [0, 2, 2], "kv_indices": shown["pages"][:2], "kv_last_page_len": [3, 0]})
        self.assertEqual(self.run_cli("seqlens", "p", one).stdout, "7\n")
        self.assertEqual(self.json_of("seq", "close", "p", one, session=self.session), {"closed": 1})
        self.fails("KVP_ESTALE", "seqlens", "p", one)
        self.run_cli("seq", "close", "p", one, session=self.session)

    def test_bytes_of_an_append_come_from_a_file(self):
        one, = self.open("1")
        data = bytes(range(256)) * (2 * TOKEN_BYTES // 256)
        self.run_cli("seq", "append", "p", one, "--tokens", "2", "--file", "-", session=self.session, stdin=data)
        self.assertEqual(self.json_of("seqlens", "p", one)["lengths"], [2])
        done = self.run_cli("seq", "append", "p", one, "--file", "-", code=1, session=self.session, stdin=data)
        self.assertIn("has more than", done.stderr)
        done = self.run_cli("seq", "append", "p", one, "--tokens", "5", "--file", "-", code=1, session=self.session,
                            stdin=data)
        self.assertIn("has less than", done.stderr)
        self.run_cli("seq", "append", "p", one, "--file", "/nowhere/at/all", code=1, session=self.session)
        done = self.run_cli("seq", "append", "p", one, "--file", str(self.daemon.folder), code=1, session=self.session)
        self.assertIn(f"reading {self.daemon.folder}: it is a folder", done.stderr)
        self.assertEqual(self.json_of("seqlens", "p", one)["lengths"], [2])

    def test_a_fork_shares_full_pages_and_owes_a_copy_of_the_rest(self):
        one, = self.open("1")
        self.run_cli("seq", "append", "p", one, "--tokens", "6", session=self.session)
        forked = self.json_of("seq", "fork", "p", one, "2", session=self.session)
        parent = self.json_of("seq", "show", "p", one)["pages"]
        child = self.json_of("seq", "show", "p", forked["seq"])["pages"]
        self.assertEqual(child[0], parent[0])
        self.assertEqual(forked["copies"], [{"source": parent[1], "destination": child[1], "tokens": 2}])
        whole = self.json_of("seq", "fork", "p", one, "3", "--tokens", "4", session=self.session)
        self.assertEqual(whole["copies"], [])
        self.fails("KVP_EEXIST", "seq", "fork", "p", one, "3", session=self.session)
        self.fails("KVP_EINVAL", "seq", "fork", "p", one, "4", "--tokens", "7", session=self.session)

    def test_a_fork_prints_its_handle_alone(self):
        one, = self.open("1")
        self.run_cli("seq", "append", "p", one, "--tokens", "6", session=self.session)
        done = self.run_cli("seq", "fork", "p", one, "2", session=self.session)
        self.assertEqual(self.run_cli("seqlens", "p", done.stdout.strip()).stdout, "6\n")
        self.assertRegex(done.stdout, r"^\d+\.\d+\n$")
        self.assertRegex(done.stderr, r"^owed: the first 2 tokens of page \d+ to page \d+\n$")

    def test_an_empty_sequence_has_no_pages_in_its_page_table(self):
        one, two = self.open("1", "2")
        self.run_cli("seq", "append", "p", two, session=self.session)
        page, = self.json_of("seq", "show", "p", two)["pages"]
        self.assertEqual(self.run_cli("page-table", "p", one, two).stdout,
                         f"{one}: no pages\n{two}: 1 tokens in the last of {page}\n")

    def test_a_session_that_is_closed_gives_its_pages_back_at_once(self):
        other = self.run_cli("session", "open").stdout.strip()
        theirs = self.json_of("seq", "open", "p", "1", session=other)["seqs"][0]
        self.run_cli("seq", "append", "p", theirs, "--tokens", "6", session=other)
        self.assertEqual(self.json_of("pool", "show", "p")["free_pages"], 30)
        self.run_cli("session", "close", session=other)
        shown = self.json_of("pool", "show", "p")
        self.assertEqual((shown["free_pages"], shown["quarantined_pages"], shown["sequences"]), (32, 0, 0))

    def test_truncation_wants_its_option(self):
        one, = self.open("1")
        self.run_cli("seq", "append", "p", one, "--tokens", "9", session=self.session)
        self.fails("KVP_EINVAL", "seq", "advance", "p", one, "4", session=self.session, text="without truncate")
        self.run_cli("seq", "advance", "p", one, "4", "--truncate", session=self.session)
        self.assertEqual(self.json_of("seqlens", "p", one)["lengths"], [4])

    def test_what_does_not_fit_or_match_changes_nothing(self):
        one, two = self.open("1", "2")
        self.run_cli("seq", "advance", "p", two, str(30 * 4), session=self.session)
        self.fails("KVP_ENOPAGES", "seq", "advance", "p", one, "12", session=self.session, text="short of 1 pages")
        self.fails("KVP_EINVAL", "seq", "advance", "p", one, str(33 * 4), session=self.session, text="at most 128")
        self.run_cli("seq", "append", "p", one, "--tokens", "2", session=self.session)
        self.fails("KVP_EMISMATCH", "seq", "append", "p", one, "--at", "1", session=self.session)
        self.assertEqual(self.json_of("seqlens", "p", one)["lengths"], [2])

    def test_wrong_handles_keys_pools_and_missing_sessions_are_refused(self):
        one, = self.open("1")
        self.misused("seq", "open", "p", "1", text="a session is wanted")
        self.misused("seq", "open", "p", "minus", session=self.session, text="a key is `minus'")
        self.misused("seq", "advance", "p", "first", "3", session=self.session, text="`first' is no sequence")
        self.misused("seq", "advance", "p", "0.0", "3", session=self.session, text="no sequence")
        self.misused("seq", "advance", "p", one, "lots", session=self.session, text="TOKENS is `lots'")
        self.fails("KVP_ENOENT", "seq", "open", "nowhere", "1", session=self.session)
        self.fails("KVP_ESTALE", "seq", "advance", "p", "31.77", "3", session=self.session)
        self.fails("KVP_ESTALE", "seq", "show", "p", "31.77")
        self.fails("KVP_ESTALE", "page-table", "p", "31.77")
        other = self.run_cli("session", "open").stdout.strip()
        self.fails("KVP_ENOENT", "seq", "advance", "nowhere", one, "3", session=other)
        self.fails("KVP_EPERM", "seq", "advance", "p", one, "3", session=other)
        self.run_cli("session", "close", session=other)

    def test_list_shows_one_session_or_all(self):
        one, = self.open("1")
        other = self.run_cli("session", "open").stdout.strip()
        theirs = self.json_of("seq", "open", "p", "1", session=other)["seqs"][0]

        def listed(*words, **more):
            return {s["seq"] for s in self.json_of("seq", "list", "p", *words, **more)["sequences"]}
        self.assertEqual(listed(session=self.session), {one})
        self.assertEqual(listed("--all", session=self.session), {one, theirs})
        self.assertEqual(listed(), {one, theirs})
        self.run_cli("seq", "close", "p", theirs, session=other)
        self.run_cli("session", "close", session=other)


class Cache(cli_house.Case):
    """A prompt of 10 tokens, 2 pages and a part, that was written and closed."""

    def setUp(self):
        self.run_cli("pool", "create", "p", *SMALL, "--page-tokens", "4", "--policy", "lru")
        self.session = self.run_cli("session", "open").stdout.strip()
        self.prompt = ",".join(str(7 * i) for i in range(10))
        one, = self.json_of("seq", "open", "p", "1", "--prompt", self.prompt, session=self.session)["seqs"]
        self.run_cli("seq", "advance", "p", one, "10", "--prompt", self.prompt, session=self.session)
        self.run_cli("seq", "append", "p", one, "--tokens", "10", session=self.session)
        self.run_cli("seq", "close", "p", one, session=self.session)

    def tearDown(self):
        self.run_cli("session", "close", session=self.session)
        self.assert_clean()
        self.run_cli("pool", "delete", "p")

    def test_a_prompt_is_found_by_its_tokens_and_taken_along(self):
        self.assertEqual(self.json_of("cache", "match", "p", self.prompt), {"pool": "p", "cached_tokens": 8})
        self.assertEqual(self.run_cli("cache", "match", "p", "1,2,3,4").stdout, "0 tokens are cached\n")
        path = self.daemon.folder / "prompt"
        path.write_text(self.prompt.replace(",", "\n") + "\n")
        self.assertEqual(self.json_of("cache", "match", "p", f"@{path}")["cached_tokens"], 8)
        opened = self.json_of("seq", "open", "p", "2", "--prompt", f"@{path}", session=self.session)
        path.unlink()
        self.assertEqual(opened["cached_tokens"], 8)
        self.assertEqual(self.json_of("seqlens", "p", *opened["seqs"]), {"lengths": [8]})
        shown = self.json_of("cache", "show", "p")
        self.assertEqual((shown["policy"], shown["lookup_blocks"], shown["hit_blocks"], shown["published_pages"],
                          shown["cached_pages"]), ("lru", 4, 2, 2, 0))
        self.run_cli("seq", "close", "p", *opened["seqs"], session=self.session)
        text = self.run_cli("cache", "show", "p").stdout
        self.assertIn("cached      2 pages that nobody holds, of 2 published", text)
        self.assertIn("found       2 of 4 blocks asked for (50.0 %)", text)

    def test_an_engines_keys_are_given_in_hexadecimal(self):
        keys = "00112233445566778899aabbccddeeff,ffeeddccbbaa99887766554433221100"
        one, = self.json_of("seq", "open", "p", "3", session=self.session)["seqs"]
        self.run_cli("seq", "advance", "p", one, "8", "--prompt", keys, "--keys", "--extra", "lora", session=self.session)
        self.run_cli("seq", "append", "p", one, "--tokens", "8", session=self.session)
        self.assertEqual(self.json_of("cache", "match", "p", keys, "--keys", "--extra", "lora")["cached_tokens"], 8)
        self.assertEqual(self.json_of("cache", "match", "p", keys, "--keys")["cached_tokens"], 0)
        self.run_cli("seq", "close", "p", one, session=self.session)

    def test_a_pin_keeps_a_prefix_from_eviction(self):
        self.assertEqual(self.json_of("cache", "pin", "p", self.prompt, "--lease-ms", "60000"),
                         {"pool": "p", "pinned_tokens": 8, "lease_ms": 60000})
        self.assertEqual(self.json_of("cache", "evict", "p"), {"pool": "p", "evicted_pages": 0})
        self.assertEqual(self.json_of("cache", "show", "p")["pins"], 1)
        self.assertEqual(self.run_cli("cache", "unpin", "p", self.prompt).stdout,
                         "8 tokens were pinned, and are no longer\n")
        self.assertEqual(self.json_of("cache", "evict", "p", "--pages", "1"), {"pool": "p", "evicted_pages": 1})
        self.assertEqual(self.json_of("cache", "evict", "p", self.prompt)["evicted_pages"], 1)
        self.assertEqual(self.json_of("cache", "match", "p", self.prompt)["cached_tokens"], 0)

    def test_pages_are_listed_with_their_families(self):
        first, second = sorted(self.json_of("cache", "list", "p")["pages"], key=lambda page: page["parent"])
        self.assertEqual((first["parent"], first["children"], second["parent"], second["children"]),
                         (-1, 1, first["page"], 0))
        self.assertEqual((first["references"], first["tenant"]), (0, os.getuid()))
        self.assertRegex(first["key"], "^[0-9a-f]{32}$")
        self.assertEqual(len(self.run_cli("cache", "list", "p").stdout.splitlines()), 2)

    def test_shares_and_hash_are_said_at_the_making(self):
        made = self.json_of("pool", "create", "q", *SMALL, "--block-hash", "xxh3", "--zero-on-reuse", "off", "--tenant",
                            f"{os.getuid()}:20:5")
        self.assertEqual((made["policy"], made["block_hash"], made["zero_on_reuse"]), ("adaptive", "xxh3", "off"))
        self.assertEqual(made["cache"]["tenants"], [{"tenant": os.getuid(), "pages": 0, "cached_pages": 0,
                                                     "quota_pages": 20, "guaranteed_pages": 5}])
        self.assertIn("policy adaptive, block hash xxh3, zero on reuse off", self.run_cli("pool", "show", "q").stdout)
        self.run_cli("pool", "delete", "q")

    def test_what_can_not_be_is_refused(self):
        self.misused("cache", "match", "p", "1,two", text="a token is `two'")
        self.misused("cache", "match", "p", "4294967296", text="a token is `4294967296'")
        self.misused("cache", "match", "p", "00,0011", "--keys", text="`0011' is no block key")
        self.misused("cache", "match", "p", "xy", "--keys", text="`xy' is no block key")
        self.fails("KVP_EINVAL", "cache", "match", "p", "00", "--keys", text="key_bytes 1, must be 8 to 32")
        self.run_cli("cache", "match", "p", "@/nowhere/at/all", code=2)
        file = self.daemon.folder / "prefix"
        file.write_bytes(b"0,7,14,21\0,28")
        done = self.run_cli("cache", "match", "p", f"@{file}", code=2)
        self.assertEqual((done.stdout, done.stderr), ("", f"kvpool: reading {file}: byte 9 is zero, so it is no text\n"))
        done = self.run_cli("cache", "match", "p", "@/dev/zero", code=2)  # a file without an end
        self.assertEqual(done.stderr, "kvpool: reading /dev/zero: it has more than 268435456 bytes\n")
        done = self.run_cli("replay", "--embedded", "/dev/zero", code=1)
        self.assertEqual(done.stderr, "kvpool: trace /dev/zero, line 1: it has more than 268435456 bytes\n")
        self.misused("cache", "evict", "p", "1,2", "--pages", "3", text="--pages and --all are without a prefix")
        self.misused("seq", "open", "p", "1", "2", "--prompt", "1", text="--prompt is of one sequence",
                     session=self.session)
        self.misused("seq", "open", "p", "1", "--extra", "x", text="--keys and --extra are of --prompt",
                     session=self.session)
        self.misused("pool", "create", "x", *SMALL, "--tenant", "1:2", text="UID:QUOTA:GUARANTEED is wanted")
        self.misused("pool", "create", "x", *SMALL, "--policy", "fifo", text="none of adaptive, lru")
        self.fails("KVP_EINVAL", "pool", "create", "x", *SMALL, "--tenant", "1:2:3", text="more than its quota of 2")
        self.fails("KVP_ENOENT", "cache", "pin", "p", "1,2,3,4", text="the first 0 are cached")
        self.fails("KVP_ENOENT", "cache", "list", "nowhere")


class ConnectOptions(ctypes.Structure):
    """struct kvp_connect_options"""
    _fields_ = [("connect_ms", ctypes.c_uint32), ("reconnect_ms", ctypes.c_uint32), ("call_ms", ctypes.c_uint32),
                ("session", ctypes.c_char_p)]


class Quarantine(cli_house.Case):
    def setUp(self):
        self.run_cli("pool", "create", "q", *SMALL, "--page-tokens", "4")

    def tearDown(self):
        self.run_cli("pool", "delete", "q")
        self.assert_clean()

    def map_pool(self, token):
        """Attach it with its slab in a session by lease: nothing proves then that no one writes any more."""
        with attached(self, "q", token):
            pass

    def test_what_a_session_left_mapped_is_released_by_its_id(self):
        opened = self.json_of("session", "open")
        token, session_id = opened["session"], opened["session_id"]
        self.map_pool(token)
        one = self.run_cli("seq", "open", "q", "1", session=token).stdout.strip()
        self.run_cli("seq", "append", "q", one, "--tokens", "6", session=token)
        self.assertEqual(self.json_of("quarantine", "release", "q", session_id)["released_pages"], 0, "it lives")
        self.run_cli("session", "close", token)
        self.assertEqual(self.json_of("pool", "show", "q")["quarantined_pages"], 2)
        self.assertIn("2 pages in quarantine", self.run_cli("status").stdout)
        log = self.daemon.log_text()
        self.assertRegex(log, rf"info: session {session_id} \(pid .* has ended: it had 1 sequences, in 1 pools\n")
        self.assertRegex(log, rf"warning: pool q: 2 pages of session {session_id} .*: kvpool quarantine release q {session_id}\n")
        self.assertEqual(self.run_cli("quarantine", "release", "q").stdout,
                         "0 pages released; 2 stay in quarantine, of sessions that are to be named: see `kvpool status'\n")
        self.assertEqual(self.run_cli("quarantine", "release", "q", "1").stdout, "0 pages released\n")
        self.assertEqual(self.json_of("quarantine", "release", "q", session_id), {"pool": "q", "released_pages": 2})
        shown = self.json_of("pool", "show", "q")
        self.assertEqual((shown["free_pages"], shown["quarantined_pages"]), (32, 0))

    def test_where_nothing_is_in_quarantine_nothing_is_released(self):
        self.assertEqual(self.json_of("quarantine", "release", "q"), {"pool": "q", "released_pages": 0})
        self.assertEqual(self.run_cli("quarantine", "release", "q").stdout, "0 pages released\n")
        self.assertEqual(self.run_cli("quarantine", "release", "q", "abcdef0123456789").stdout, "0 pages released\n")

    def test_wrong_pools_and_sessions_are_refused(self):
        self.fails("KVP_ENOENT", "quarantine", "release", "nowhere")
        self.misused("quarantine", "release", text="POOL [SESSION_ID] is wanted")
        self.misused("quarantine", "release", "q", "1", "2", text="too many arguments")
        for wrong in ("", "0", "xyz", "1-", "0x1", " 1", "12345678901234567"):
            self.misused("quarantine", "release", "q", wrong, text=f"`{wrong}' is no session")
        self.misused("quarantine", text="  quarantine release POOL [SESSION_ID]")


if __name__ == "__main__":
    unittest.main()
