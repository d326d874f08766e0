"""The command line tool under test: run it as a user would, and look at what it says.

    class CliTest(cli_house.Case):      # a daemon of its own for the class; self.run_cli("pool", "list")
"""
import json
import os
import subprocess
import unittest

from daemon import Daemon

PROGRAM_S = 300
LEASE_MS = 3600 * 1000  # the daemon's own, where a command names none: it outlasts any test


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon("--set", f"limits.lease_ms={LEASE_MS}")
        cls.daemon.__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.daemon.__exit__(None, None, None)

    @staticmethod
    def program():
        return os.path.join(os.environ["KVPOOL_BIN_DIR"], "kvpool")

    def environment(self, session=None, endpoint=None):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("KVPOOL_")}
        environment["KVPOOL_ENDPOINT"] = str(endpoint or self.daemon.session_socket)
        if session is not None:
            environment["KVPOOL_SESSION"] = session
        return environment

    def run_cli(self, *words, code=0, session=None, endpoint=None, stdin=None):
        """Run it; the exit status must be `code`. The completed process, its output as text."""
        done = subprocess.run([self.program(), *words], env=self.environment(session, endpoint), input=stdin,
                              capture_output=True, timeout=PROGRAM_S)
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        self.assertEqual(done.returncode, code, f"kvpool {' '.join(words)}\n{done.stdout}{done.stderr}")
        return done

    def json_of(self, *words, code=0, **more):
        """The one document that it prints with --json."""
        return json.loads(self.run_cli("--json", *words, code=code, **more).stdout)

    def fails(self, name, *words, text="", **more):
        """It must fail with that status by name: one line on stderr, nothing on stdout."""
        done = self.run_cli(*words, code=1, **more)
        self.assertTrue(done.stderr.startswith("kvpool: "), done.stderr)
        self.assertIn(f"({name})", done.stderr)
        self.assertIn(text, done.stderr)
        self.assertEqual(done.stdout, "")
        return done

    def misused(self, *words, text="", **more):
        """It must be refused as wrong usage, with a word on --help."""
        done = self.run_cli(*words, code=2, **more)
        self.assertIn("--help", done.stderr)
        self.assertIn(text, done.stderr)
        self.assertEqual(done.stdout, "")
        return done

    def assert_clean(self):
        self.assertEqual(self.json_of("audit"), {"clean": True, "count": 0, "violations": []})
